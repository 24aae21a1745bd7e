"""Named arrays and texts in one safetensors file, whose content is verified by a digest when it is read."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiml.clock import unwatched
from mpiml.documents import check_regular
from mpiml.errors import OutputError
from mpiml.run.directory import PART, named_errors, replacing

Array = NDArray[Any]
Arrays = Mapping[str, Array]
Texts = Mapping[str, str]
Kind = tuple[str, tuple[int, ...]]  # an array's dtype and shape
Progress = Callable[[], object]  # called after each part of a long piece of work
KINDS = {"F": ("float", (16, 32, 64)), "I": ("int", (8, 16, 32, 64)), "U": ("uint", (8, 16, 32, 64))}
DTYPES = {f"{kind}{bits}": f"{name}{bits}" for kind, (name, sizes) in KINDS.items() for bits in sizes}
DTYPES |= {"BOOL": "bool", "BF16": "bfloat16", "C64": "complex64"}  # by their names in safetensors


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


def write(path: Path, arrays: Arrays, texts: Texts, progress: Progress = unwatched, replace: bool = False) -> None:
    """Write a file that `read` verifies; it gets its name only when it is whole and on disk.

    An existing file of that name is never changed: it stays if it is whole, else it is renamed to .damaged. With
    `replace` the new one takes the place of either, at once.

    Raises OutputError if it cannot be written.
    """
    with named_errors("write the checkpoint", path):
        if path.exists() and not replace:
            with contextlib.suppress(OutputError):
                read(path, lambda name: False, progress)
                return  # it is whole
            others = (path.with_suffix(f".damaged{number or ''}") for number in itertools.count())
            os.rename(path, next(other for other in others if not other.exists()))
        _write(path, arrays, {**texts, "sha256": _content(texts, sorted(arrays.items()), progress)}, progress)


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


def read(path: Path, wanted: Callable[[str], bool], progress: Progress = unwatched) -> tuple[dict[str, Array], Texts]:
    """The arrays whose names are wanted, and the texts of a file, all of which is verified. Raises OutputError if it
    cannot be read or is damaged."""
    kept: dict[str, Array] = {}

    def each(file: Any) -> Iterator[tuple[str, Array]]:
        for name in sorted(file.keys()):
            array = file.get_tensor(name)
            if wanted(name):
                kept[name] = array
            yield name, array

    with opened(path) as file:
        texts = file.metadata() or {}
        claimed = texts.pop("sha256", "")
        computed = _content(texts, each(file), progress)
    if claimed != computed:
        raise OutputError(f"{path} is damaged: its content does not match its SHA-256")
    return kept, texts


def head(path: Path) -> tuple[dict[str, Kind], Texts]:
    """The kinds of a file's arrays by name, and its texts; nothing else of it is read, or verified. Raises OutputError
    if it has none."""
    with opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        kinds = {
            name: (DTYPES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape()))
            for name, part in slices.items()
        }
        return kinds, file.metadata() or {}


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


def _content(texts: Texts, arrays: Iterable[tuple[str, Array]], progress: Progress = unwatched) -> str:
    """SHA-256 of the whole content of a file; the arrays are in the order of their names."""
    head = json.dumps({**texts, "sha256": ""}, sort_keys=True)
    return hashlib.sha256(f"{head}{digest(arrays, progress)}".encode()).hexdigest()
