"""Checkpoints: one safetensors file for the whole model, whichever grid wrote it, verified by a digest when read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mpiml.clock import unwatched
from mpiml.documents import AVERAGE, texts
from mpiml.errors import OutputError
from mpiml.run import step_files, verified
from mpiml.run.contents import Contents, contents_in
from mpiml.run.digests import Kind
from mpiml.run.step_files import listed
from mpiml.run.verified import Arrays, Progress

FORMAT = "mpiml-2"
BEFORE = "mpiml-1"  # has one digest of all that a file says
OF_LOOPS = "mpiml-arrays-1"  # the format of checkpoints of loops of one's own (mpiml.loop.checkpoints)
# Prefixes of names of arrays that are not the model's: the last three are of workers (mpiml.training.workers).
STATES = ("optimizer.", "outer.", "worker.", "round.")
BESIDE = (*STATES, "data.", AVERAGE)


class Header(NamedTuple):
    """The kinds of a checkpoint's arrays by name, and `origin` and `constants` as Checkpoint has them."""

    origin: str
    kinds: Mapping[str, Kind]
    constants: Mapping[str, str] | None


@dataclass
class Checkpoint:
    """A run's state after a step.

    Attributes:
        arrays: parameters and constants ("layers.3.weight"), averages of parameters ("ema.layers.3.weight"), optimizer
            state ("optimizer.mean.layers.3.weight").
        config: the run's settings, as TOML.
        task: what the data set requires of the model, as JSON; empty if unknown.
        constants: the entry of each of the model's constants, by name: "array" if it is one of these, else a checksum;
            None if the file has no entries.
        origin: the file that it was read from, for messages. Its content is data that anybody may have written.
        contents: what else there is in the file, of which `arrays` are only those that were wanted.
    """

    step: int
    config: str
    arrays: Arrays
    task: str
    constants: Mapping[str, str] | None
    contents: Contents
    origin: str = "the checkpoint"

    @property
    def header(self) -> Header:
        """What there is to know of the model without its arrays' values."""
        return Header(self.origin, self.contents.kinds, self.constants)


def is_of_model(name: str) -> bool:
    """Whether an array of a checkpoint is the model's, an average or not, or normalises its inputs."""
    return not name.startswith(STATES)


def texts_of(step: int, config: str, task: str, constants: Mapping[str, str] | None) -> dict[str, str]:
    """The metadata of a checkpoint, fields as of Checkpoint."""
    metadata = {"format": FORMAT, "step": str(step), "config": config, "task": task}
    return metadata if constants is None else metadata | {"constants": json.dumps(constants)}


def load(
    path: Path, wanted: Callable[[str], bool] = lambda name: True, progress: Progress = unwatched, keep: bool = True
) -> Checkpoint:
    """Read a checkpoint's texts and the arrays whose names are wanted, and verify these; without `keep` it has none.

    Raises OutputError if it cannot be read or is damaged.
    """
    if contents_in(path).texts.get("format") not in (FORMAT, BEFORE):
        raise OutputError(f"{path} is not a checkpoint of mpiml")
    kept, contents = verified.read(path, wanted, progress, keep)
    texts = contents.texts
    config, task = texts.get("config", ""), texts.get("task", "")
    return Checkpoint(step_files.step_in(texts, path), config, kept, task, _constants(texts, path), contents, str(path))


def header(path: Path) -> Header:
    """The header of a checkpoint; nothing else of it is read. Raises OutputError if it has none."""
    contents = contents_in(path)
    return Header(str(path), contents.kinds, _constants(contents.texts, path))


def _constants(metadata: Mapping[str, str], path: Path) -> dict[str, str] | None:
    """The entries of constants in a file; None if it has none, or an empty text."""
    text = metadata.get("constants", "")
    return texts(text, f"{path}: constants") if text else None


def check_kinds(origin: str, saved: Mapping[str, Kind], needed: Mapping[str, Kind]) -> None:
    """Raise OutputError unless a checkpoint's arrays are those of a model, by name, dtype and shape.

    It may have optimizer state, averages and normalisation that are not needed.
    """
    for name, kind in needed.items():
        if name not in saved:
            raise OutputError(f"{origin} has no {name}: it is of another model or optimizer")
        if saved[name] != kind:
            has, needs = (f"{dtype} {shape}" for dtype, shape in (saved[name], kind))
            raise OutputError(f"{origin}: {name} is {has}, the model's {needs}")
    if more := [name for name in saved if name not in needed and not name.startswith(BESIDE)]:
        raise OutputError(f"{origin} has {min(more)}, which the model does not have: it is of another model")


def newest(
    directory: Path, wanted: Callable[[str], bool] = lambda name: True, progress: Progress = unwatched
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that `load` can read, and what is wrong with newer ones, as `step_files.newest`."""
    return step_files.newest(directory, lambda path: load(path, wanted, progress))


def check_newest(directory: Path, check: Callable[[Header], object]) -> None:
    """Raise OutputError if there are checkpoints with readable headers, but `check` raises it for all of them."""
    problems: list[OutputError] = []
    for path in listed(directory):
        try:
            saved = header(path)
        except OutputError:
            continue  # `newest` reports what is wrong with it
        try:
            check(saved)
            return
        except OutputError as error:
            problems.append(error)
    if problems:
        raise problems[0]
