"""The rows of a micro-batch, or of a chunk of an evaluation, read when they are asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpiml.data.dataset import Split
from mpiml.data.inputs import inputs_of, pack, unpack
from mpiml.errors import DataError

Transform = Callable[[Any, NDArray[Any]], tuple[Any, Any]]  # (x, y) of a micro-batch -> those to train on


@dataclass
class Batch:
    """The rows that a stage processes at once: a micro-batch, or a chunk of an evaluation.

    `index` is its number in the whole step or evaluation, `rows` its number of rows; `select` returns the rows' numbers
    in `split`. Rows are read only when x() or y() is called, because only the first stage needs inputs and only the
    last needs labels. With a `transform`, either call reads both.
    """

    index: int
    rows: int
    split: Split
    select: Callable[[], NDArray[np.integer]]
    dtype: DTypeLike
    transform: Transform | None = None

    def x(self) -> NDArray[np.floating]:
        """The inputs, in the run's dtype."""
        return self._transformed[0] if self.transform else self._x()

    def y(self) -> NDArray[np.generic]:
        """The labels: classes as np.intp, values in the run's dtype."""
        return self._transformed[1] if self.transform else self._y()

    def w(self) -> NDArray[np.floating] | None:
        """The weights of the rows, (rows,), in the run's dtype; None if each counts 1."""
        return None if self.split.w is None else self.split.w.rows(self._numbers).astype(self.dtype, copy=False)

    @functools.cached_property
    def _numbers(self) -> NDArray[np.integer]:
        return self.select()

    def _x(self) -> NDArray[np.floating]:
        return self.split.x.rows(self._numbers).astype(self.dtype, copy=False)

    def _y(self) -> NDArray[np.generic]:
        return self.split.y.rows(self._numbers).astype(self._label_dtype, copy=False)

    @property
    def _label_dtype(self) -> DTypeLike:
        return self.dtype if self.split.y.dtype.kind == "f" else np.intp

    @functools.cached_property
    def _transformed(self) -> tuple[NDArray[np.floating], NDArray[np.generic]]:
        """x and y from the user's function. Raises DataError unless they have the shapes that they had before."""
        assert self.transform, "only a batch with a transform is transformed"
        inputs = inputs_of(self.split.x)
        x, y = self._x(), self._y()
        x, y = self.transform(unpack(x, inputs) if inputs else x, y)
        x = pack(x, inputs, self.rows, "--transform") if inputs else x
        for name, array, source in (("x", x, self.split.x), ("y", y, self.split.y)):
            needed = (self.rows, *source.shape)
            if np.shape(array) != needed:
                raise DataError(f"--transform gave {name} of shape {np.shape(array)}; {needed} is needed")
        return np.asarray(x, self.dtype), np.asarray(y, self._label_dtype)
