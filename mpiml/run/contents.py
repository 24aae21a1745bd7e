"""What a safetensors file holds and where, and its header, which can be written when all else is on disk."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpiml.documents import check_regular
from mpiml.errors import OutputError
from mpiml.run.digests import SIZE, Kind

Texts = Mapping[str, str]
KINDS = {"F": ("float", (16, 32, 64)), "I": ("int", (8, 16, 32, 64)), "U": ("uint", (8, 16, 32, 64))}
DTYPES = {f"{kind}{bits}": f"{name}{bits}" for kind, (name, sizes) in KINDS.items() for bits in sizes}
DTYPES |= {"BOOL": "bool", "BF16": "bfloat16", "C64": "complex64"}  # by their names in safetensors
CODES = {dtype: code for code, dtype in DTYPES.items()}
# The digest of a header is that of its bytes with zeros in the place of the digest, with which it begins. It holds the
# digests of all arrays, so it is one of the whole file.
NOTHING = "0" * 2 * SIZE
BEGIN = '{"__metadata__": {"sha256": "'
DIGESTS = "digests"  # the text with the digests of all arrays, in the order of their names


@dataclass(frozen=True)
class Contents:
    """The arrays of a file and its texts.

    Attributes:
        kinds: of the arrays, by name.
        texts: all but digests.
        starts: where the bytes of each array begin in the file.
        size: of the file in bytes.
        digests: of the arrays, by name, where they are in a file; None in one that has a digest of another form.
    """

    kinds: Mapping[str, Kind]
    texts: Texts
    starts: Mapping[str, int]
    size: int
    digests: Mapping[str, bytes] | None = None

    @classmethod
    def of(cls, kinds: Mapping[str, Kind], texts: Texts) -> Contents:
        """Those of a file to be written: one array after another, the widest dtype first, so that all are aligned
        (https://huggingface.co/docs/safetensors, "Format")."""
        order = sorted(sorted(kinds), key=lambda name: -np.dtype(kinds[name][0]).itemsize)
        starts, end = dict[str, int](), 0
        for name in order:
            starts[name], end = end, end + bytes_of(kinds[name])
        first = len(cls(kinds, texts, starts, end).header(dict.fromkeys(kinds, bytes(SIZE))))
        return cls(kinds, texts, {name: first + start for name, start in starts.items()}, first + end)

    @property
    def first(self) -> int:
        """Where the arrays begin, behind the header."""
        return min(self.starts.values(), default=self.size)

    def header(self, digests: Mapping[str, bytes]) -> bytes:
        """The beginning of the file: the length of the header in 8 bytes, and the header."""
        every = "".join(digests[name].hex() for name in sorted(digests))
        fields: dict[str, Any] = {"__metadata__": {"sha256": NOTHING, **self.texts, DIGESTS: every}}
        before = min(self.starts.values(), default=0)
        for name, start in self.starts.items():
            dtype, shape = self.kinds[name]
            ends = [start - before, start - before + bytes_of((dtype, shape))]
            fields[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": ends}
        head = json.dumps(fields).encode()
        head = head.replace(NOTHING.encode(), hashlib.sha256(head).hexdigest().encode(), 1)
        head += b" " * (-len(head) % 8)
        return len(head).to_bytes(8, "little") + head


def bytes_of(kind: Kind) -> int:
    """How many bytes an array takes."""
    dtype, shape = kind
    return int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize


def contents_in(path: Path) -> Contents:
    """What a file holds, whose header is verified if it has digests of its arrays. Raises OutputError if it cannot be
    read or is damaged; a text `sha256` is left where there are no digests of arrays."""
    with opened(path), open(path, "rb") as file:  # the library has checked that header and size of the file fit
        length = int.from_bytes(file.read(8), "little")
        head = file.read(length)
        fields = json.loads(head)
    texts, entries = fields.pop("__metadata__", None) or {}, fields
    kinds = {
        name: (DTYPES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"])) for name, entry in entries.items()
    }
    starts = {name: 8 + length + entry["data_offsets"][0] for name, entry in entries.items()}
    size = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if not head.startswith(BEGIN.encode()) or DIGESTS not in texts:
        return Contents(kinds, texts, starts, size)
    every, claimed, after = texts.pop(DIGESTS), texts.pop("sha256"), len(BEGIN) + len(NOTHING)
    blank = f"{BEGIN}{NOTHING}".encode() + head[after:].rstrip(b" ")
    if hashlib.sha256(blank).hexdigest() != claimed or not re.fullmatch(
        f"([0-9a-f]{{{2 * SIZE}}}){{{len(kinds)}}}", every
    ):
        raise OutputError(f"{path} is damaged: its header does not match its SHA-256")
    each = bytes.fromhex(every)
    digests = {name: each[SIZE * number : SIZE * (number + 1)] for number, name in enumerate(sorted(kinds))}
    return Contents(kinds, texts, starts, size, digests)


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
