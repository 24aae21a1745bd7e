"""Arrays of safetensors files that other programs wrote, in NumPy's types."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiml.clock import unwatched
from mpiml.documents import check_regular
from mpiml.errors import OutputError
from mpiml.run import checkpoint
from mpiml.run.checkpoint import Header
from mpiml.run.contents import DIGESTS, contents_in, opened
from mpiml.run.verified import Progress

OWN = ("task", "sha256", DIGESTS)  # in the metadata of checkpoints, damaged ones too; others may have a "config"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
SAVE = "in Python, safetensors.torch.save_file(model.state_dict(), 'model.safetensors') writes one"


def header(path: Path) -> tuple[Header, bool]:
    """The header of a safetensors file, and whether another program wrote it, so that it is no checkpoint. Complex
    arrays of such a file are real ones, pairs on one more axis. Raises OutputError for all other files."""
    _check_safetensors(path)
    foreign = contents_in(path).texts.keys().isdisjoint(OWN)
    file = checkpoint.header(path)
    pairs = {name: ("float32", (*kind[1], 2)) for name, kind in file.kinds.items() if kind[0] == "complex64"}
    return file._replace(kinds={**file.kinds, **pairs}) if foreign else file, foreign


def arrays(
    path: Path, names: Iterable[str], progress: Progress = unwatched, foreign: bool = True
) -> Iterator[NDArray[Any]]:
    """The arrays of these names, of the kinds that `header` says (with `foreign`, as it does), but bfloat16 as float32:
    one after the other, so that no two need memory at once. Raises OutputError if they cannot be read."""
    starts = contents_in(path).starts
    with opened(path) as file:
        for name in names:
            if file.get_slice(name).get_dtype() == "BF16":
                shape = file.get_slice(name).get_shape()
                array = _bfloat16(path, starts[name], math.prod(shape)).reshape(shape)
            else:
                array = file.get_tensor(name)
            yield array[..., None].view(np.float32) if foreign and array.dtype.kind == "c" else array
            progress()


def _bfloat16(path: Path, start: int, count: int) -> NDArray[np.float32]:
    """Numbers of which a file has the upper halves of float32, which NumPy has no type for."""
    upper = np.fromfile(path, "<u2", count, offset=start)
    return (upper.astype(np.uint32) << 16).view(np.float32)


def _check_safetensors(path: Path) -> None:
    """Raise OutputError, which says what to do, for files that people have in place of safetensors files."""
    if not path.exists():
        return  # which is said where it is opened
    check_regular(path)
    with open(path, "rb") as file:
        first = file.read(9)
    if first[8:] == b"{":
        return
    if first.startswith(b"GGUF"):
        raise OutputError(f"{path} is a GGUF file; give the safetensors file that it was made from")
    if first.startswith(b"{"):
        raise OutputError(f"{path} is JSON, as an index of several files is; give one safetensors file: {SAVE}")
    if path.suffix in PICKLES or (first.startswith((b"PK", b"\x80")) and path.suffix != ".npz"):
        raise OutputError(f"{path} is a pickle, which may run code, so it is not read; give a safetensors file: {SAVE}")
    if len(first) == 9:  # the length of a header, and its first character
        raise OutputError(f"{path} is damaged, or not a safetensors file: its header does not begin with {{")
