"""Checkpoints: one safetensors file for the whole model, whatever grid wrote it, checked by a digest when read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiml.errors import NotFiniteError, OutputError
from mpiml.run.directory import PARTIAL, named_errors, sync_directory

Arrays = Mapping[str, NDArray[Any]]
FORMAT = "mpiml-1"


@dataclass
class Checkpoint:
    """A run's state after a step.

    Attributes:
        arrays: parameters ("layers.3.weight") and optimizer state ("optimizer.mean.layers.3.weight").
        config: the run's settings, as TOML.
    """

    step: int
    config: str
    arrays: Arrays


def digest(arrays: Arrays) -> str:
    """SHA-256 of arrays in their order: of each its name, shape, dtype and bytes, little-endian."""
    sha = hashlib.sha256()
    for name, array in arrays.items():
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        sha.update(f"{name} {list(array.shape)} {little.dtype.name}\n".encode())
        sha.update(little.data)
    return sha.hexdigest()


def file_name(step: int) -> str:
    """Of the checkpoint after a step."""
    return f"step-{step:09d}.safetensors"


def save(directory: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint under a name of its own, then remove all but the newest `keep`.

    The file appears under its name only when it is whole and on disk. An existing file is never written to: it is
    left alone if it is whole, and kept aside if it is damaged. Later checkpoints do not count as new: if this one
    is written after them, they could not be used.

    Raises NotFiniteError for weights that are not finite, OutputError if the file cannot be written.
    """
    import safetensors.numpy

    for name, array in checkpoint.arrays.items():
        if not np.isfinite(array).all():
            raise NotFiniteError(f"{name} is not finite after step {checkpoint.step}; nothing of it is saved")
    path = directory / file_name(checkpoint.step)
    temporary = directory / f".{path.name}.{os.getpid()}{PARTIAL}"
    arrays = {name: np.asarray(array, order="C") for name, array in checkpoint.arrays.items()}
    metadata = {"format": FORMAT, "step": str(checkpoint.step), "config": checkpoint.config}
    metadata["sha256"] = _content(metadata, arrays)
    with named_errors("write the checkpoint", path):
        if path.exists():
            if _is_whole(path):
                return path
            os.rename(path, _free_name(path.with_suffix(".damaged")))
        try:
            safetensors.numpy.save_file(arrays, temporary, metadata)
        except OSError:
            raise
        except Exception as error:  # the library has its own class for input/output errors
            raise OutputError(f"cannot write the checkpoint {path}: {error}") from error
        descriptor = os.open(temporary, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        os.rename(temporary, path)
        sync_directory(directory)
        older = [file for file in listed(directory) if file.name <= path.name]
        for old in older[keep:]:
            old.unlink()
    return path


def load(path: Path) -> Checkpoint:
    """Read and verify a checkpoint. Raises OutputError, naming what is wrong."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # safetensors raises a class of its own for damaged files
        raise OutputError(f"{path} is damaged: {error}") from None
    if metadata.get("format") != FORMAT:
        raise OutputError(f"{path} is not a checkpoint of mpiml")
    claimed = metadata.pop("sha256", "")
    if claimed != _content(metadata, arrays):
        raise OutputError(f"{path} is damaged: its content does not match its SHA-256")
    return Checkpoint(int(metadata["step"]), metadata["config"], arrays)


def newest(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with newer ones.

    None if there are no checkpoint files. Raises OutputError if there are some but none can be used.
    """
    problems: list[str] = []
    for path in listed(directory):
        try:
            return load(path), problems
        except OutputError as error:
            problems.append(str(error))
    if problems:
        raise OutputError(f"no checkpoint in {directory} can be used: {'; '.join(problems)}")
    return None, problems


def listed(directory: Path) -> list[Path]:
    """Checkpoint files, newest first."""
    with named_errors("read", directory):
        return sorted(directory.glob("step-*.safetensors"), reverse=True)


def _content(metadata: Mapping[str, str], arrays: Arrays) -> str:
    head = json.dumps({**metadata, "sha256": ""}, sort_keys=True)
    return hashlib.sha256(f"{head}{digest(dict(sorted(arrays.items())))}".encode()).hexdigest()


def _is_whole(path: Path) -> bool:
    try:
        load(path)
    except OutputError:
        return False
    return True


def _free_name(path: Path) -> Path:
    number = 0
    while path.exists():
        number += 1
        path = path.with_suffix(f".damaged{number}")
    return path
