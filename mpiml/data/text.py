"""Text and tokens for language models: a row is a window of T tokens, its labels are the T tokens one further on."""

from __future__ import annotations

import functools
import resource
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from mpiml.data.npy import npy_file
from mpiml.data.sources import Indices, Rows, Source, check_whole, file_size
from mpiml.errors import DataError

BYTES = np.dtype(np.uint8)
SHARE = 8  # at most 1 / SHARE of the files that a process may have open are files of tokens


class Tokens:
    """The tokens of several files, one file after the other; only the parts that are used are read.

    A file that is mapped into memory counts as open, and there may be more files than a process may have open: only
    those that were used last stay mapped. Threads may share an object.

    Args:
        dtype: of a token in files without a header; .npy files say their own.
    """

    def __init__(self, paths: Sequence[Path], dtype: np.dtype):
        self.paths, self.dtype = paths, dtype
        self._offsets: list[int] = []  # the byte of each file at which its tokens begin
        sizes = [self._length(number, path) for number, path in enumerate(paths)]
        self.bounds = np.cumsum([0, *sizes], dtype=np.int64)  # file n holds tokens bounds[n] to bounds[n + 1] - 1
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        open_files = limit if limit != resource.RLIM_INFINITY else 1 << 20
        self._mapped = functools.lru_cache(max(open_files // SHARE, 1))(self._map)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def read(self, start: int, stop: int, out: NDArray[np.generic]) -> None:
        """Copy tokens start..stop-1 into `out`."""
        number, at = int(np.searchsorted(self.bounds, start, side="right")) - 1, start
        while at < stop:
            begin, end = self.bounds[number : number + 2].tolist()
            until = min(stop, end)
            if until > at:  # an empty file cannot be mapped
                out[at - start : until - start] = self._file(number)[at - begin : until - begin]
            at, number = until, number + 1

    def windows(self, starts: Indices, length: int) -> Rows:
        """The `length` tokens that begin at each of `starts`, (len(starts), length); reads all windows of a file at
        once."""
        rows = np.empty((len(starts), length), self.dtype)
        files = np.searchsorted(self.bounds, starts, side="right") - 1
        inside = starts + length <= self.bounds[files + 1]
        for number in set(files[inside].tolist()):
            of_file = inside & (files == number)
            rows[of_file] = sliding_window_view(self._file(number), length)[starts[of_file] - self.bounds[number]]
        for index in np.flatnonzero(~inside).tolist():  # windows that go on in the next file
            self.read(int(starts[index]), int(starts[index]) + length, rows[index])
        return rows

    def _length(self, number: int, path: Path) -> int:
        size = file_size(path)
        if path.suffix == ".npy" and self.dtype != BYTES:
            source = npy_file(path)
            if source.shape or source.dtype.kind not in "ui":
                raise DataError(f"{path} is {source.dtype} in rows of {source.shape}; tokens are integers on one axis")
            if number and source.dtype != self.dtype:
                raise DataError(f"{path} is {source.dtype}, but {self.paths[0]} is {self.dtype}")
            self.dtype = source.dtype
            self._offsets.append(size - len(source) * self.dtype.itemsize)
            return len(source)
        length, odd = divmod(size, self.dtype.itemsize)
        if odd:
            raise DataError(f"{path}: its {size:,} bytes are not a whole number of {self.dtype} tokens")
        self._offsets.append(0)
        return length

    def _file(self, number: int) -> NDArray[np.generic]:
        array = self._mapped(number)
        check_whole(array, str(self.paths[number]))
        return array

    def _map(self, number: int) -> NDArray[np.generic]:
        path, length = self.paths[number], int(self.bounds[number + 1] - self.bounds[number])
        try:
            return np.memmap(path, self.dtype, "r", self._offsets[number], (length,))
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from None
        except ValueError:  # NumPy's, if the file holds fewer bytes
            raise DataError(f"{path} was cut short while it was read: it holds {file_size(path):,} bytes") from None


class Windows(Source):
    """A source that cuts tokens start..stop-1 into consecutive rows of `context` tokens, dropping the rest.

    Args:
        shift: 0 for inputs; 1 for labels, each the token that follows its input.
    """

    def __init__(self, tokens: Tokens, context: int, start: int, stop: int, shift: int, name: str):
        self.tokens, self.context, self.first, self.name = tokens, context, start + shift, name
        self.length = max((stop - start - 1) // context, 0)
        self.shape: tuple[int, ...] = (context,)
        self.dtype = tokens.dtype

    def __len__(self) -> int:
        return self.length

    def rows(self, indices: Indices) -> Rows:
        outside = indices[(indices < 0) | (indices >= self.length)]
        if len(outside):
            raise IndexError(f"{self.name} has no row {outside[0]}")
        return self.tokens.windows(self.first + indices * self.context, self.context)


def windows(train: Tokens, test: Tokens | None, context: int, held_out: float, name: str) -> list[Windows]:
    """x_train, y_train, x_test and y_test of text or tokens.

    Args:
        test: the tokens to test on; if None, the last `held_out` (a fraction) of the tokens in `train`; there are none
            if that is 0.
    """
    cut = len(train) if test else len(train) - round(held_out * len(train))
    spans = {"train": (train, 0, cut), "test": (test, 0, len(test)) if test else (train, cut, len(train))}
    if not test and not held_out:
        del spans["test"]
    for which, (_, start, stop) in spans.items():
        if stop - start <= context:
            raise DataError(f"{name}: {stop - start} tokens to {which} on are too few: a row needs {context} + 1")
    return [
        Windows(tokens, context, start, stop, shift, f"{name}: {column}_{which}")
        for which, (tokens, start, stop) in spans.items()
        for shift, column in enumerate("xy")
    ]
