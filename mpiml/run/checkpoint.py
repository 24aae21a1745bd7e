"""Checkpoints: one safetensors file for the whole model, whichever grid wrote it, verified by a digest when read."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpiml.clock import unwatched
from mpiml.documents import AVERAGE, check_regular, shown, texts
from mpiml.errors import NotFiniteError, OutputError
from mpiml.run.directory import PART, named_errors, replacing

Array = NDArray[Any]
Arrays = Mapping[str, Array]
Kind = tuple[str, tuple[int, ...]]  # an array's dtype and shape
Progress = Callable[[], object]  # called after each part of a long piece of work
FORMAT = "mpiml-1"
NAME = re.compile(r"step-(\d+)\.safetensors")
DIGITS = 18  # the most that a step's number has
KINDS = {"F": ("float", (16, 32, 64)), "I": ("int", (8, 16, 32, 64)), "U": ("uint", (8, 16, 32, 64))}
DTYPES = {f"{kind}{bits}": f"{name}{bits}" for kind, (name, sizes) in KINDS.items() for bits in sizes}
DTYPES |= {"BOOL": "bool", "BF16": "bfloat16", "C64": "complex64"}  # by their names in safetensors
BESIDE = ("optimizer.", "data.", AVERAGE)  # prefixes of names of arrays that are not the model's


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
    """

    step: int
    config: str
    arrays: Arrays
    task: str = ""
    constants: Mapping[str, str] | None = None
    origin: str = "the checkpoint"

    @property
    def header(self) -> Header:
        """What there is to know of the model without its arrays' values."""
        return Header(self.origin, kinds_of(self.arrays), self.constants)


def digest(arrays: Iterable[tuple[str, Array]], progress: Progress = unwatched) -> str:
    """SHA-256 of named arrays in the given order: each one's name, shape, dtype and bytes, little-endian."""
    sha = hashlib.sha256()
    for name, array in arrays:
        little = _little(array)
        sha.update(f"{name} {list(array.shape)} {little.dtype.name}\n".encode())
        content = _bytes(little)
        for first in range(0, len(content), PART):
            sha.update(content[first : first + PART])
            progress()
    return sha.hexdigest()


def is_of_model(name: str) -> bool:
    """Whether an array of a checkpoint is the model's, an average or not, or normalises its inputs."""
    return not name.startswith("optimizer.")


def file_name(step: int) -> str:
    """The file name of the checkpoint after a step."""
    return f"step-{step:09d}.safetensors"


def save(
    directory: Path, checkpoint: Checkpoint, keep: int, progress: Progress = unwatched, best: Collection[int] = ()
) -> Path:
    """Write a checkpoint, then `prune`.

    The file gets its name only when it is whole and on disk. An existing file of that name is never changed: it stays
    if it is whole, else it is renamed to .damaged.

    Raises NotFiniteError for weights that are not finite, OutputError if the file cannot be written. Constants, such as
    a mask of -inf, may be what they are.
    """
    constants = checkpoint.constants or {}
    for name, array in checkpoint.arrays.items():
        if name not in constants and not np.isfinite(array).all():
            raise NotFiniteError(f"{name} is not finite after step {checkpoint.step}; nothing of it is saved")
        progress()
    path = directory / file_name(checkpoint.step)
    metadata = {"format": FORMAT, "step": str(checkpoint.step), "config": checkpoint.config, "task": checkpoint.task}
    if checkpoint.constants is not None:
        metadata["constants"] = json.dumps(checkpoint.constants)
    metadata["sha256"] = _content(metadata, sorted(checkpoint.arrays.items()), progress)
    with named_errors("write the checkpoint", path):
        if path.exists():
            with contextlib.suppress(OutputError):
                load(path, progress=progress)
                return path  # it is whole
            others = (path.with_suffix(f".damaged{number or ''}") for number in itertools.count())
            os.rename(path, next(other for other in others if not other.exists()))
        _write(path, checkpoint.arrays, metadata, progress)
    prune(directory, checkpoint.step, keep, best)
    return path


def prune(directory: Path, step: int, keep: int, best: Collection[int] = ()) -> None:
    """Remove all checkpoints up to a step but the newest `keep` and those of the steps `best`.

    Those of later steps are neither counted nor removed: they are damaged, or the run would not be at this step.
    """
    older = [file for file in listed(directory) if _step(file) <= step]
    for old in older[keep:]:
        if _step(old) not in best:
            with named_errors("remove", old):
                old.unlink(missing_ok=True)


def _write(path: Path, arrays: Arrays, metadata: Mapping[str, str], progress: Progress) -> None:
    """Write a safetensors file: the length of the header in 8 bytes, the header, and the arrays one after another, the
    widest dtype first, so that all are aligned (https://huggingface.co/docs/safetensors, "Format").

    The library would choose name and mode of the unfinished file itself, and report no progress.
    """
    ordered = [(name, _little(array)) for name, array in sorted(arrays.items())]
    ordered.sort(key=lambda named: -named[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, array in ordered:
        dtype = f"{array.dtype.kind.upper()}{8 * array.dtype.itemsize}" if array.dtype.kind != "b" else "BOOL"
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with replacing(path, "write the checkpoint", progress) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for _, array in ordered:
            file.write(_bytes(array))


def _little(array: Array) -> Array:
    return np.asarray(array, array.dtype.newbyteorder("<"), order="C")


def _bytes(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def load(path: Path, wanted: Callable[[str], bool] = lambda name: True, progress: Progress = unwatched) -> Checkpoint:
    """Read a checkpoint, verify all of it, and keep the arrays whose names are wanted.

    Raises OutputError if it cannot be read or is damaged.
    """
    kept: dict[str, Array] = {}

    def read(file: Any) -> Iterator[tuple[str, Array]]:
        for name in sorted(file.keys()):
            array = file.get_tensor(name)
            if wanted(name):
                kept[name] = array
            yield name, array

    with opened(path) as file:
        metadata = file.metadata() or {}
        claimed = metadata.pop("sha256", "")
        computed = _content(metadata, read(file), progress)
    if metadata.get("format") != FORMAT:
        raise OutputError(f"{path} is not a checkpoint of mpiml")
    if claimed != computed:
        raise OutputError(f"{path} is damaged: its content does not match its SHA-256")
    step, config, task = (metadata.get(name, "") for name in ("step", "config", "task"))
    if not (step.isascii() and step.isdecimal() and len(step) <= DIGITS):
        raise OutputError(f"{path} is damaged: step is {shown(step)}, but must be a whole number")
    return Checkpoint(int(step), config, kept, task, _constants(metadata, path), str(path))


def header(path: Path) -> Header:
    """The header of a checkpoint; nothing else of it is read. Raises OutputError if it has none."""
    with opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        kinds = {
            name: (DTYPES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape()))
            for name, part in slices.items()
        }
        return Header(str(path), kinds, _constants(file.metadata() or {}, path))


def _constants(metadata: Mapping[str, str], path: Path) -> dict[str, str] | None:
    """The entries of constants in a file; None if it has none, or an empty text."""
    text = metadata.get("constants", "")
    return texts(text, f"{path}: constants") if text else None


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file to read in a block. Raises OutputError if it cannot be opened, or read in the block."""
    import safetensors

    try:
        check_regular(path)
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # safetensors has its own class of error for damaged files
        raise OutputError(f"{path} is damaged: {error}") from None


def kinds_of(arrays: Arrays) -> dict[str, Kind]:
    """The kinds of arrays, by name."""
    return {name: (array.dtype.name, array.shape) for name, array in arrays.items()}


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
    """The newest checkpoint that `load` can read, and what is wrong with newer ones.

    None if there are no checkpoint files. Raises OutputError if there are some but none can be used, or if the
    directory cannot be read.
    """
    problems: list[str] = []
    for path in listed(directory):
        try:
            return load(path, wanted, progress), problems
        except OutputError as error:
            problems.append(str(error))
    if problems:
        raise OutputError(f"no checkpoint in {directory} can be used: {'; '.join(problems)}")
    return None, problems


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


def listed(directory: Path) -> list[Path]:
    """Checkpoint files, newest first."""
    with named_errors("read", directory), os.scandir(directory) as entries:
        files = [Path(entry.path) for entry in entries if NAME.fullmatch(entry.name) and entry.is_file()]
    return sorted(files, key=lambda file: (_step(file), file.name), reverse=True)


def last_step(directory: Path) -> int:
    """The step of the newest checkpoint file, from its name; 0 if there is none."""
    return max(map(_step, listed(directory)), default=0)


def _step(file: Path) -> int:
    match = NAME.fullmatch(file.name)
    assert match, "only files with such names are listed"
    return int(match[1])


def _content(metadata: Mapping[str, str], arrays: Iterable[tuple[str, Array]], progress: Progress = unwatched) -> str:
    """SHA-256 of the whole content of a checkpoint; the arrays are in the order of their names."""
    head = json.dumps({**metadata, "sha256": ""}, sort_keys=True)
    return hashlib.sha256(f"{head}{digest(arrays, progress)}".encode()).hexdigest()
