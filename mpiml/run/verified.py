"""Named arrays and texts in one safetensors file, which one rank writes and reads; verified by digests when it is read.
Files of which every rank has a part are written by mpiml.run.saving, and read by mpiml.run.shared_file."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiml.clock import unwatched
from mpiml.errors import OutputError
from mpiml.run import digests
from mpiml.run.contents import Contents, Texts, contents_in
from mpiml.run.digests import Kind, content, little
from mpiml.run.directory import named_errors, replacing

Array = NDArray[Any]
Arrays = Mapping[str, Array]
Progress = Callable[[], object]  # called after each part of a long piece of work
PART = 1 << 20  # elements that are read or hashed at once: whole blocks


def write(path: Path, arrays: Arrays, texts: Texts, progress: Progress = unwatched, replace: bool = False) -> None:
    """Write a file that `read` verifies; it gets its name only when it is whole and on disk.

    An existing file of that name is never changed: it stays if it is whole, else it is renamed to .damaged. With
    `replace` the new one takes the place of either, at once.

    Raises OutputError if it cannot be written.
    """
    if not replace and stays(path, progress):
        return
    contents = Contents.of(kinds_of(arrays), texts)
    known = {name: digest(name, arrays[name], progress) for name in arrays}
    with replacing(path, "write the checkpoint", progress) as file:
        file.write(contents.header(known))
        for name in contents.starts:
            file.write(content(little(arrays[name])))


def stays(path: Path, progress: Progress = unwatched) -> bool:
    """Whether there is a whole file of that name; a damaged one is renamed. Raises OutputError if it cannot be."""
    with named_errors("write the checkpoint", path):
        if path.exists():
            with contextlib.suppress(OutputError):
                read(path, lambda name: True, progress, keep=False)
                return True
            others = (path.with_suffix(f".damaged{number or ''}") for number in itertools.count())
            os.rename(path, next(other for other in others if not other.exists()))
    return False


def read(
    path: Path, wanted: Callable[[str], bool], progress: Progress = unwatched, keep: bool = True
) -> tuple[dict[str, Array], Contents]:
    """The arrays whose names are wanted, which are verified, and what else the file holds; without `keep` no arrays.

    Raises OutputError if it cannot be read or is damaged.
    """
    contents, kept = contents_in(path), dict[str, Array]()
    whole = contents.digests is None  # one digest of all that it says, in the place of some for each array
    total = hashlib.sha256()
    for name in sorted(contents.kinds):
        if not (whole or wanted(name)):
            continue
        array = one_array(path, contents, name, progress)
        if whole:
            _add(total, name, array, progress)
        if keep and wanted(name):
            kept[name] = array
    texts = dict(contents.texts)
    if whole and _of_all(texts, total.hexdigest()) != texts.pop("sha256", ""):
        raise OutputError(f"{path} is damaged: its content does not match its SHA-256")
    return kept, dataclasses.replace(contents, texts=texts)


def one_array(path: Path, contents: Contents, name: str, progress: Progress = unwatched) -> Array:
    """One array of a file, which is verified if the file has digests of its arrays.

    Raises OutputError if it cannot be read or is damaged.
    """
    array = _array(path, contents, name, progress)
    if contents.digests is not None and digest(name, array, progress) != contents.digests[name]:
        raise OutputError(f"{path} is damaged: {name} does not match its SHA-256")
    return array


def kinds_of(arrays: Arrays) -> dict[str, Kind]:
    """The kinds of arrays, by name."""
    return {name: (array.dtype.name, array.shape) for name, array in arrays.items()}


def read_into(descriptor: int, start: int, elements: Array, progress: Progress = unwatched) -> None:
    """Read contiguous elements from a place in an open file. Raises OSError if they cannot be read, EOFError if the
    file is shorter."""
    for first in range(0, elements.size, PART):
        part = elements[first : first + PART]
        rest = content(part)
        at = start + first * elements.itemsize
        while rest:
            count = os.preadv(descriptor, [rest], at)
            if not count:
                raise EOFError
            rest, at = rest[count:], at + count
        if not part.dtype.newbyteorder("<").isnative:
            part.byteswap(inplace=True)
        progress()


def _array(path: Path, contents: Contents, name: str, progress: Progress) -> Array:
    dtype, shape = contents.kinds[name]
    try:
        array = np.empty(shape, np.dtype(dtype))
    except (TypeError, ValueError, MemoryError) as error:
        raise OutputError(f"cannot read {path}: {name} is {dtype} {shape}: {error}") from None
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            read_into(descriptor, contents.starts[name], array.reshape(-1), progress)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror or error}") from None
    except EOFError:
        raise OutputError(f"{path} is damaged: it ends within {name}") from None
    return array


def digest(name: str, array: Array, progress: Progress = unwatched) -> bytes:
    """The digest of an array of that name."""
    flat, blocks = little(array).reshape(-1), []
    for first in range(0, flat.size, PART):
        blocks.append(digests.of_blocks(flat[first : first + PART]))
        progress()
    return digests.of_array(name, (array.dtype.name, array.shape), b"".join(blocks))


def _add(total: Any, name: str, array: Array, progress: Progress) -> None:
    """Count an array in the SHA-256 over all arrays of a file that has one digest: name, shape, dtype, bytes."""
    total.update(f"{name} {list(array.shape)} {array.dtype.name}\n".encode())
    flat = little(array).reshape(-1)
    for first in range(0, flat.size, PART):
        total.update(content(flat[first : first + PART]))
        progress()


def _of_all(texts: Texts, arrays: str) -> str:
    """The SHA-256 of the content of a file that has one digest, by that of its arrays."""
    head = json.dumps({**texts, "sha256": ""}, sort_keys=True)
    return hashlib.sha256(f"{head}{arrays}".encode()).hexdigest()
