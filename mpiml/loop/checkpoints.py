"""Checkpoints of a loop of one's own: arrays, and what belongs to them, in files that are whole or are not there."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml.documents import from_json, shown
from mpiml.errors import ConfigError, OutputError
from mpiml.loop import trees
from mpiml.loop.checks import check_comm, check_path, check_whole
from mpiml.loop.guard import PROGRAM, called, clock, deadlines
from mpiml.run import step_files, verified
from mpiml.run.checkpoint import OF_LOOPS
from mpiml.run.console import say
from mpiml.run.contents import CODES, contents_in
from mpiml.run.directory import LEFT_OF_CHECKPOINTS, named_errors, sweep, sync
from mpiml.run.step_files import DIGITS
from mpiml.team import Team


class Saved(NamedTuple):
    """A checkpoint.

    Attributes:
        arrays: by name; of lists, tuples and dicts within each other, "layers.0.weight".
        meta: what has been saved with them.
    """

    step: int
    arrays: dict[str, NDArray[Any]]
    meta: dict[str, Any]

    def into(self, like: Any) -> Any:
        """The arrays in the form of `like`. Raises ConfigError unless names, shapes and dtypes are the same."""
        wanted = dict(trees.leaves(like))
        if wanted.keys() != self.arrays.keys():
            other = min(wanted.keys() ^ self.arrays.keys())
            which = "is not in the checkpoint" if other in wanted else "is in the checkpoint alone"
            raise ConfigError(f"the checkpoint of step {self.step}: {other} {which}")
        for name, value in wanted.items():
            array, saved = _array(value, name), self.arrays[name]
            if (array.dtype, array.shape) != (saved.dtype, saved.shape):
                has = f"{saved.dtype} {saved.shape}"
                raise ConfigError(
                    f"the checkpoint of step {self.step}: {name} is {has}, not {array.dtype} {array.shape}"
                )
        leaves = ((self.arrays[name], value) for name, value in wanted.items())
        return trees.rebuilt(like, [type(value)(a) if trees.is_number(value) else a for a, value in leaves])


class Checkpoints:
    """A directory of checkpoints, one safetensors file each; every method is collective.

        checkpoints = Checkpoints("runs/mine/checkpoints")
        saved = checkpoints.newest()
        first = saved.step + 1 if saved else 1
        ...
        checkpoints.save(step, {"weights": weights, "velocity": velocity}, {"lr": 0.1})

    A file gets its name when it is whole and on disk, and its content is verified by a SHA-256 when it is read: after a
    crash at any moment the state before is there, or the new one.

    Args:
        directory: is made if it does not exist.
        comm: the ranks (default: all). Rank 0 reads and writes.
        keep: how many checkpoints are kept, the newest.

    Raises, on all ranks alike, ConfigError for settings that do not work, or if ranks have different directories;
    OutputError if the directory cannot be made.
    """

    @called
    def __init__(self, directory: str | os.PathLike[str], comm: MPI.Intracomm | None = None, keep: int = 3):
        self._team = Team(check_comm(comm), clock())
        checked = self._team.together(lambda: (check_path("directory", directory), check_whole("keep", keep, 1)))
        self.directory, self.keep = checked
        self._team.check_alike({"directory": str(self.directory)}, "rank 0 writes for all")
        self._team.on_rank_0(self._make)

    @called
    def save(self, step: int, arrays: Any, meta: Mapping[str, Any] | None = None) -> None:
        """Write the checkpoint of a step, in the place of one of the same step, and remove all but the newest.

        Args:
            arrays: an array or number, or lists, tuples and dicts of such, of any dtype; those of rank 0 are written.
            meta: what JSON can say; that of rank 0.

        Raises, on all ranks alike, ConfigError for what cannot be saved, or if ranks save different steps; OutputError
        if it cannot be written.
        """
        began = time.monotonic()
        with clock().doing("checkpoint"):
            self._team.check_alike({"the step that is saved": str(step)})
            self._team.on_rank_0(lambda: self._write(step, arrays, {} if meta is None else meta))
        for deadline in deadlines():
            deadline.saved(time.monotonic() - began)

    @called
    def newest(self) -> Saved | None:
        """The newest checkpoint that is whole, the same on all ranks; None if there is none yet. Rank 0 says on stderr
        which ones it has skipped, and what is wrong with them.

        Raises, on all ranks alike, OutputError if there are some but none can be used.
        """
        arrays: dict[str, NDArray[Any]] = {}  # on rank 0

        def read() -> tuple[int, dict[str, Any], list[tuple[str, np.dtype[Any], tuple[int, ...]]]] | None:
            newest, problems = step_files.newest(self.directory, self._load)
            for problem in problems:
                say(f"{PROGRAM}: warning: skipped {problem}", sys.stderr)
            if newest is None:
                return None
            arrays.update(newest.arrays)
            return newest.step, newest.meta, [(name, a.dtype, a.shape) for name, a in arrays.items()]

        with clock().doing("checkpoint"):
            header = self._team.on_rank_0(read)
            if header is None:
                return None
            step, meta, kinds = header
            for name, dtype, shape in kinds:
                if name not in arrays:
                    arrays[name] = np.empty(shape, dtype)
                self._team.broadcast_array(arrays[name])
        for deadline in deadlines():
            deadline.expect(sum(array.nbytes for array in arrays.values()))
        return Saved(step, arrays, meta)

    def _make(self) -> None:
        with named_errors("create", self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            sync(self.directory.parent)
        sweep(self.directory, LEFT_OF_CHECKPOINTS)

    def _write(self, step: int, arrays: Any, meta: Mapping[str, Any]) -> None:
        step = check_whole("save: step", step, 0)
        if step >= 10**DIGITS:
            raise ConfigError(f"save: step {step}: must have at most {DIGITS} digits")
        if not isinstance(meta, Mapping):
            raise ConfigError(f"save: meta is a {type(meta).__name__}: must be a dict")
        try:
            text = json.dumps(dict(meta), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"save: meta is not what JSON can say: {error}") from None
        named = _named(arrays)
        for name, array in named.items():
            if array.dtype.kind == "V" or array.dtype.name not in CODES:  # V: not NumPy's own
                what = f"save: {name} is {array.dtype}, which checkpoints cannot hold"
                raise ConfigError(f"{what}: save numbers of NumPy's own types, and texts in `meta`")
        texts = {"format": OF_LOOPS, "step": str(step), "meta": text}
        verified.write(self.directory / step_files.file_name(step), named, texts, clock().progress, replace=True)
        step_files.prune(self.directory, step, self.keep)

    def _load(self, path: Path) -> Saved:
        if contents_in(path).texts.get("format") != OF_LOOPS:
            raise OutputError(f"{path} is not a checkpoint of a loop of one's own")
        arrays, contents = verified.read(path, lambda name: True, clock().progress)
        texts = contents.texts
        meta = from_json(texts.get("meta", ""), f"{path}: meta")
        if not isinstance(meta, dict):
            raise OutputError(f"{path} is damaged: meta is {shown(meta)}, but must be an object")
        return Saved(step_files.step_in(texts, path), arrays, meta)


def _named(arrays: Any) -> dict[str, NDArray[Any]]:
    """The leaves as arrays, by name. Raises ConfigError if two would have one name, or one that files cannot have."""
    named: dict[str, NDArray[Any]] = {}
    for name, value in trees.leaves(arrays):
        if name in named or name == "__metadata__" or not name.isprintable():
            why = "two arrays have it" if name in named else "files cannot have it"
            raise ConfigError(f"save: the name {name!r}: {why}; choose another key")
        named[name] = _array(value, f"save: {name}")
    return named


def _array(value: Any, name: str) -> NDArray[Any]:
    """A leaf as an array, of which Python's own whole numbers and truth values stay such."""
    return np.asarray(value) if trees.is_number(value) else trees.array(value, name)
