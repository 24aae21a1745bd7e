"""Text and tokens for language models: a row is a window of T of them, its labels are those that come next."""

from __future__ import annotations

import functools
import resource
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from mpiml.data.npy import npy_file
from mpiml.data.sources import Indices, Rows, check_whole, file_size
from mpiml.errors import DataError

BYTES = np.dtype(np.uint8)
SHARE = 8  # one in so many of the files that a process may have open may be one of these


class Tokens:
    """Files one after the other as one sequence, of which only what is asked for is read.

    There may be more files than a process may have open, and a file that is mapped into memory is open: those that were
    read last stay mapped. Threads may share it.

    Args:
        dtype: of a token; a .npy file has its own.
    """

    def __init__(self, paths: Sequence[Path], dtype: np.dtype):
        self.paths, self.dtype = paths, dtype
        self._begins: list[int] = []  # the byte of each file at which its tokens begin
        sizes = [self._length(number, path) for number, path in enumerate(paths)]
        self.ends = np.cumsum(sizes, dtype=np.int64)
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        open_files = limit if limit != resource.RLIM_INFINITY else 1 << 20
        self._mapped = functools.lru_cache(max(open_files // SHARE, 1))(self._map)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, stop: int, out: NDArray[np.generic]) -> None:
        """Put tokens start..stop-1 into `out`."""
        number, at = int(np.searchsorted(self.ends, start, side="right")), start
        while at < stop:
            begin = int(self.ends[number - 1]) if number else 0
            until = min(stop, int(self.ends[number]))
            if until > at:  # an empty file cannot be mapped
                out[at - start : until - start] = self._file(number)[at - begin : until - begin]
            at, number = until, number + 1

    def windows(self, starts: Indices, length: int) -> Rows:
        """The `length` tokens from each of these places on, those of a file all at once."""
        taken = np.empty((len(starts), length), self.dtype)
        files = np.searchsorted(self.ends, starts, side="right")
        inside = starts + length <= self.ends[files]
        for number in set(files[inside].tolist()):
            here = inside & (files == number)
            begin = int(self.ends[number - 1]) if number else 0
            taken[here] = sliding_window_view(self._file(number), length)[starts[here] - begin]
        for place in np.flatnonzero(~inside).tolist():  # over the end of a file into the next ones
            self.read(int(starts[place]), int(starts[place]) + length, taken[place])
        return taken

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

    def _file(self, number: int) -> NDArray[np.generic]:
        array = self._mapped(number)
        check_whole(array, str(self.paths[number]))
        return array

    def _map(self, number: int) -> NDArray[np.generic]:
        path, length = self.paths[number], int(self.ends[number]) - (int(self.ends[number - 1]) if number else 0)
        try:
            return np.memmap(path, self.dtype, "r", self._begins[number], (length,))
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from None
        except ValueError:  # of NumPy, for a file with fewer bytes
            raise DataError(f"{path} was cut short while it was read: it holds {file_size(path):,} bytes") from None


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
        outside = indices[(indices < 0) | (indices >= self.length)]
        if len(outside):
            raise IndexError(f"{self.name} has no row {outside[0]}")
        return self.tokens.windows(self.first + indices * self.context, self.context)


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
