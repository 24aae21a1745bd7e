"""Checkpoints as anybody can make them, with right digests over whatever they say; and as a run saves them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI
from safetensors.numpy import save_file

from mpiml.clock import Clock
from mpiml.run import checkpoint, step_files, verified
from mpiml.run.checkpoint import Checkpoint
from mpiml.run.contents import Contents
from mpiml.run.digests import little
from mpiml.run.saving import File, Saver
from mpiml.run.segments import Segment
from mpiml.team import Team

TASK = {"shape": [4], "labels": [], "classification": True, "outputs": 3, "tokens": 0}
ARRAYS = {"layers.0.weight": np.ones((4, 3), np.float32), "layers.0.bias": np.zeros(3, np.float32)}  # of Linear(4, 3)
CONFIG = "hidden = []\n"
BLOCK = 1 << 14  # elements that are hashed at once


def forge(
    path: Path,
    config: str = CONFIG,
    task: Mapping[str, Any] | str = TASK,
    arrays: Mapping[str, Any] = ARRAYS,
    **metadata: str,
) -> Path:
    """Write a checkpoint to `path`; by default a good one, of a perceptron without hidden layers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    verified.write(path, arrays, _said(checkpoint.FORMAT, config, task) | metadata, replace=True)
    return path


def forge_before(
    path: Path,
    config: str = CONFIG,
    task: Mapping[str, Any] | str = TASK,
    arrays: Mapping[str, Any] = ARRAYS,
    **metadata: str,
) -> Path:
    """Write a checkpoint in the format that has one SHA-256 of all that it says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_before(path, arrays, _said(checkpoint.BEFORE, config, task) | metadata)
    return path


def write_before(path: Path, arrays: Mapping[str, Any], texts: Mapping[str, str]) -> None:
    """Write a file with one SHA-256 of all that it says."""
    every = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        every.update(f"{name} {list(array.shape)} {array.dtype.name}\n".encode() + little(array).tobytes())
    head = json.dumps({**texts, "sha256": ""}, sort_keys=True) + every.hexdigest()
    made = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    save_file(made, path, {**texts, "sha256": hashlib.sha256(head.encode()).hexdigest()})


def in_format_before(path: Path) -> Path:
    """Write a checkpoint anew, in the format that has one SHA-256 of all that it says."""
    arrays, contents = verified.read(path, lambda name: True)
    write_before(path, arrays, {**contents.texts, "format": checkpoint.BEFORE})
    return path


def _said(format: str, config: str, task: Mapping[str, Any] | str) -> dict[str, str]:
    text = task if isinstance(task, str) else json.dumps(task)
    return {"format": format, "step": "6", "config": config, "task": text}


def loaded(arrays: Mapping[str, Any], config: str = "", origin: str = "the checkpoint", task: str = "") -> Checkpoint:
    """A checkpoint of step 1, as if it had been read from a file."""
    contents = Contents.of(verified.kinds_of(arrays), {})
    return Checkpoint(1, config, arrays, task, None, contents, origin)


def save(
    directory: Path,
    step: int,
    arrays: Mapping[str, Any],
    config: str = "",
    task: str = "",
    constants: Mapping[str, str] | None = None,
    keep: int = 1,
    best: Collection[int] = (),
    clock: Clock | None = None,
) -> Path:
    """Save a checkpoint on one rank as a run does."""
    path = directory / step_files.file_name(step)

    def prepare() -> File:
        texts = checkpoint.texts_of(step, config, task, constants)
        there = verified.stays(path, saver.clock.progress)
        contents = None if there else Contents.of(verified.kinds_of(arrays), texts)
        return File(path, contents, lambda: lambda: step_files.prune(directory, step, keep, best), lambda: None)

    saver = Saver(Team(MPI.COMM_SELF, clock or Clock()), MPI.COMM_SELF)
    try:
        saver.begin(prepare, segments(arrays, constants or ()))
    finally:
        saver.free()
    return path


def segments(arrays: Mapping[str, Any], constants: Iterable[str] = ()) -> list[Segment]:
    """Whole arrays, of which all but constants must be finite."""
    return [Segment(name, 0, little(array).reshape(-1), name not in constants) for name, array in arrays.items()]


def save_changed(directory: Path, saved: Checkpoint, keep: int = 1, **changes: Any) -> Path:
    """Save a checkpoint that has been read, with other fields."""
    changed = dataclasses.replace(saved, **changes)
    return save(directory, changed.step, changed.arrays, changed.config, changed.task, changed.constants, keep=keep)


def digest_of_array(name: str, array: Any) -> bytes:
    """The digest of an array of a checkpoint, computed by hashlib alone."""
    array = array.astype(array.dtype.newbyteorder("<"))
    elements, size = array.tobytes(), BLOCK * array.itemsize
    blocks = [hashlib.sha256(elements[a : a + size]).digest() for a in range(0, len(elements), size)]
    what = f"{name} {list(array.shape)} {array.dtype.name}\n".encode()
    return hashlib.sha256(what + b"".join(blocks)).digest()


def weights_sha256(arrays: Mapping[str, Any]) -> str:
    """The digest of arrays, computed by hashlib alone."""
    every = b"".join(digest_of_array(name, arrays[name]) for name in sorted(arrays))
    return hashlib.sha256(every).hexdigest()
