"""Text and tokens for language models: a row is a window of T of them, its labels are those that come next."""

from __future__ import annotations

import functools
import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from mpiml.data.npy import npy_file
from mpiml.data.sources import Indices, Rows, file_size
from mpiml.errors import DataError

BYTES = np.dtype(np.uint8)
SHARE = 8  # one in so many of the files that a process may have open may be one of these


class Tokens:
    """Files one after the other as one sequence, of which only what is asked for is read.

    There may be more files than a process may have open: those that were read last stay open. Threads may share it.

    Args:
        dtype: of a token; a .npy file has its own.
    """

    def __init__(self, paths: Sequence[Path], dtype: np.dtype):
        self.paths, self.dtype = paths, dtype
        self._begins: list[int] = []  # the byte of each file at which its tokens begin
        sizes = [self._length(number, path) for number, path in enumerate(paths)]
        self.ends = np.cumsum(sizes, dtype=np.int64)
        open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._opened = functools.lru_cache(max(open_files // SHARE, 1))(_open)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, stop: int, out: NDArray[np.generic]) -> None:
        """Put tokens start..stop-1 into `out`."""
        number, at = int(np.searchsorted(self.ends, start, side="right")), start
        while at < stop:
            begin = int(self.ends[number - 1]) if number else 0
            until = min(stop, int(self.ends[number]))
            self._fill(number, at - begin, out[at - start : until - start])
            at, number = until, number + 1

    def _length(self, number: int, path: Path) -> int:
        size = file_size(path)
        if path.suffix == ".npy" and self.dtype != BYTES:
            source = npy_file(path)
            if source.shape or source.dtype.kind not in "ui":
                raise DataError(f"{path} is {source.dtype} in rows of {source.shape}; tokens are integers on one axis")
            if number and source.dtype != self.dtype:
                raise DataError(f"{path} is {source.dtype}, but {self.paths[0]} is {self.dtype}")
            self.dtype = source.dtype
            self._begins.append(size - len(source) * self.dtype.itemsize)
            return len(source)
        length, odd = divmod(size, self.dtype.itemsize)
        if odd:
            raise DataError(f"{path}: its {size:,} bytes are no whole number of {self.dtype} tokens")
        self._begins.append(0)
        return length

    def _fill(self, number: int, first: int, out: NDArray[np.generic]) -> None:
        """Read the tokens of one file from number `first` on."""
        path, rest = self.paths[number], out.view(np.uint8)
        at = self._begins[number] + first * self.dtype.itemsize
        while len(rest):
            file = self._opened(path)
            try:
                count = os.preadv(file.fileno(), [rest.data], at)
            except OSError as error:
                raise DataError(f"cannot read {path}: {error.strerror or error}") from None
            if not count:
                holds, needed = file_size(path), at + len(rest)
                raise DataError(f"{path} was cut short while it was read: it holds {holds:,} of {needed:,} bytes")
            rest, at = rest[count:], at + count


def _open(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


class Windows:
    """Rows of `context` tokens, one after the other, of tokens start..stop-1.

    Args:
        shift: 0 for inputs, 1 for labels.
    """

    def __init__(self, tokens: Tokens, context: int, start: int, stop: int, shift: int, name: str):
        self.tokens, self.context, self.first, self.name = tokens, context, start + shift, name
        self.length = max((stop - start - 1) // context, 0)
        self.shape: tuple[int, ...] = (context,)
        self.dtype = tokens.dtype

    def __len__(self) -> int:
        return self.length

    def hold(self, rows: Indices) -> None:
        pass

    def rows(self, indices: Indices) -> Rows:
        found = np.empty((len(indices), self.context), self.dtype)
        for place, row in enumerate(indices.tolist()):
            if not 0 <= row < self.length:
                raise IndexError(f"{self.name} has no row {row}")
            start = self.first + row * self.context
            self.tokens.read(start, start + self.context, found[place])
        return found


def windows(train: Tokens, test: Tokens | None, context: int, held_out: float, name: str) -> list[Windows]:
    """x_train, y_train, x_test and y_test of text or tokens.

    Args:
        test: the tokens to test on; if there are none, the last part, `held_out`, of those to train on.
    """
    cut = len(train) if test else len(train) - round(held_out * len(train))
    spans = {"train": (train, 0, cut), "test": (test, 0, len(test)) if test else (train, cut, len(train))}
    for which, (_, start, stop) in spans.items():
        if stop - start <= context:
            raise DataError(f"{name}: {stop - start} tokens to {which} on are no row of {context} and one more")
    return [
        Windows(tokens, context, start, stop, shift, f"{name}: {column}_{which}")
        for which, (tokens, start, stop) in spans.items()
        for shift, column in enumerate("xy")
    ]
