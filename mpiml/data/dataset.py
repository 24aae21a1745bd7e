"""Data sets: training and test rows, each with inputs x and labels y."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from mpiml.data.fingerprint import Fingerprint, of_array, of_files
from mpiml.data.formats import KEYS, Options, open_files
from mpiml.data.labels import ProbabilitySource, ValueSource, WeightSource, stored
from mpiml.data.sources import ArraySource, LabelSource, Source
from mpiml.data.text import Windows
from mpiml.errors import DataError
from mpiml.usercode import called_with, is_name, named

DIGITS = Path(__file__).with_name("digits.npz")


@dataclass
class Split:
    """Inputs x, labels y and weights w of the training rows, or of the test rows; without weights, rows count 1.

    Raises DataError if rows have more than one weight.
    """

    x: Source
    y: Source
    w: Source | None = None

    def __post_init__(self) -> None:
        if not (self.w is None or isinstance(self.w, WeightSource)):
            self.w = WeightSource(self.w)

    def ignoring(self, label: int | None) -> Split:
        """These rows with -1 in place of `label`, the one to be ignored; unchanged if it is -1 or None."""
        return self if label in (None, -1) else dataclasses.replace(self, y=LabelSource(self.y, label))

    def __len__(self) -> int:
        return len(self.x)


@dataclass
class Dataset:
    """Training rows and test rows. Integer labels make it a classification, floating-point labels a regression.

    A row has one label, or an array of labels. Classes are numbered from 0. One number may mean "no label", which
    losses and metrics leave out: the number that --ignore names, or -1 if a row has several labels.

    Attributes:
        files: what the rows are read from; must be equal on all ranks, and in a run and its resumption.
        classes: the number of classes; None if it follows from the labels.
        names: of the inputs of a table; empty for other data.
        words: that the labels of a table are, in the order of the classes; empty if they are numbers.
        check: raises DataError for damage that reading rows would not show; one rank's call is enough.

    Raises DataError if the four sources do not fit together.
    """

    train: Split
    test: Split
    name: str = "arrays"
    files: Sequence[Path] = field(default=())
    classes: int | None = None
    check: Callable[[], None] | None = None
    names: Sequence[str] = ()
    words: Sequence[str] = ()

    def __post_init__(self) -> None:
        for which, split in (("train", self.train), ("test", self.test)):
            if len(split.x) != len(split.y):
                raise DataError(f"{self.name}: x_{which} has {len(split.x)} rows, but y_{which} has {len(split.y)}")
            if split.w is not None and len(split.x) != len(split.w):
                raise DataError(f"{self.name}: x_{which} has {len(split.x)} rows, but w_{which} has {len(split.w)}")
            if not len(split):
                raise DataError(f"{self.name}: x_{which} has no rows")
            for column, source in (("x", split.x), ("y", split.y)):
                if 0 in source.shape:
                    raise DataError(f"{self.name}: rows of {column}_{which} are {source.shape}: they have no values")
        for column, train, test in (("x", self.train.x, self.test.x), ("y", self.train.y, self.test.y)):
            if train.shape != test.shape:
                raise DataError(f"{self.name}: rows of {column}_train are {train.shape}, of {column}_test {test.shape}")
        if (self.train.y.dtype.kind == "f") != (self.test.y.dtype.kind == "f"):
            raise DataError(f"{self.name}: y_train is {self.train.y.dtype}, but y_test is {self.test.y.dtype}")

    @classmethod
    def from_arrays(
        cls,
        x_train: ArrayLike,
        y_train: ArrayLike,
        x_test: ArrayLike,
        y_test: ArrayLike,
        w_train: ArrayLike | None = None,
        w_test: ArrayLike | None = None,
    ) -> Dataset:
        """A data set of arrays in memory, whose first axis counts rows; `w_train`, `w_test`: weights of the rows."""
        x, y = ArraySource(x_train, "x_train"), ArraySource(y_train, "y_train")
        train, test = Split(x, y), Split(ArraySource(x_test, "x_test"), ArraySource(y_test, "y_test"))
        for split, weights, name in ((train, w_train, "w_train"), (test, w_test, "w_test")):
            split.w = None if weights is None else WeightSource(ArraySource(weights, name))
        return cls(train, test)

    @property
    def sampled(self) -> bool:
        """Whether the fingerprint has samples of the values: of arrays and files, but of no other sources."""
        columns = (getattr(split, column) for split in (self.train, self.test) for column in ("x", "y", "w"))
        return bool(self.files) or all(one is None or isinstance(stored(one), ArraySource) for one in columns)

    @functools.cached_property
    def fingerprint(self) -> Fingerprint:
        """Sizes and checksums of samples of the files and columns: almost surely different for different data."""
        columns = {
            f"{column}_{which}": stored(getattr(split, column))
            for which, split in (("train", self.train), ("test", self.test))
            for column in ("x", "y", "w")
            if getattr(split, column) is not None
        }
        texts = {name: f"{len(column):,} rows of {column.shape} {column.dtype}" for name, column in columns.items()}
        for name, column in columns.items():
            if isinstance(column, ArraySource) and not self.files:
                texts[name] += f", {of_array(column.array)}"
        return of_files(self.files) + [list(item) for item in texts.items()]

    @property
    def classification(self) -> bool:
        """Whether labels are classes, not values."""
        return self.train.y.dtype.kind != "f"

    @property
    def language_model(self) -> bool:
        """Whether inputs are token ids, each with a label: integers on one axis, as long as that of the labels."""
        x, y = self.train.x, self.train.y
        integers = self.classification and x.dtype.kind in "iu" and len(x.shape) == 1 and x.shape == y.shape
        return integers and (x.shape > (1,) or isinstance(x, Windows))

    @property
    def row_labels(self) -> int:
        """How many labels a row has."""
        return math.prod(self.train.y.shape)

    def ignored(self, setting: int | None) -> int | None:
        """The label that means "no label": `setting` if given, else -1 if a row has several classes as labels, such as
        tokens or pixels. None if every label counts."""
        return -1 if setting is None and self.classification and self.row_labels > 1 else setting

    def with_values(self) -> Dataset:
        """This data set as a regression: integer labels become values."""
        return self._with_labels(ValueSource) if self.classification else self

    def with_probabilities(self) -> Dataset:
        """This data set with labels from 0 to 1, integers or not; reading others raises DataError."""
        return self._with_labels(ProbabilitySource)

    def _with_labels(self, kind: type[ValueSource]) -> Dataset:
        train, test = (dataclasses.replace(split, y=kind(split.y)) for split in (self.train, self.test))
        return dataclasses.replace(self, train=train, test=test)


def check_dataset(value: object, what: str) -> Dataset:
    """The value itself. Raises DataError, in which it is called `what`, unless it is a data set."""
    if not isinstance(value, Dataset):
        raise DataError(f"{what} must be a Dataset, but is {type(value).__name__}")
    return value


def open_dataset(spec: str, options: Options | None = None) -> Dataset:
    """The data set that `--data` names: digits, files at a path, or what a function package.module:name returns.

    Raises DataError if it is missing or damaged, ConfigError if the function is missing.
    """
    if is_name(spec):
        function = called_with(named(spec, "--data"), f"--data {spec}")
        try:
            dataset = function()
        except OSError as error:
            raise DataError(f"--data {spec}: {error}") from error
        if not isinstance(dataset, Dataset):
            raise DataError(f"--data {spec}: must return a Dataset, but returns {type(dataset).__name__}")
        return dataset
    columns = open_files(str(DIGITS) if spec == "digits" else spec, options or Options())
    if len(columns.sources) < len(KEYS):
        raise DataError(f"--data {spec}: there are no rows to test on")
    x_train, y_train, x_test, y_test = columns.sources
    name = "digits" if spec == "digits" else "".join(c for c in Path(spec).stem if c not in "*?[]") or "text"
    train, test = Split(x_train, y_train), Split(x_test, y_test)
    more = (columns.files, columns.classes, columns.check, columns.names, columns.words)
    return Dataset(train, test, name, *more)


Transform = Callable[[NDArray[Any], NDArray[Any]], tuple[Any, Any]]  # (x, y) of a micro-batch -> those to train on


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
        return None if self.split.w is None else self.split.w.rows(self.select()).astype(self.dtype, copy=False)

    def _x(self) -> NDArray[np.floating]:
        return self.split.x.rows(self.select()).astype(self.dtype, copy=False)

    def _y(self) -> NDArray[np.generic]:
        return self.split.y.rows(self.select()).astype(self._label_dtype, copy=False)

    @property
    def _label_dtype(self) -> DTypeLike:
        return self.dtype if self.split.y.dtype.kind == "f" else np.intp

    @functools.cached_property
    def _transformed(self) -> tuple[NDArray[np.floating], NDArray[np.generic]]:
        """x and y from the user's function. Raises DataError unless they have the shapes that they had before."""
        assert self.transform, "only a batch with a transform is transformed"
        x, y = self.transform(self._x(), self._y())
        for name, array, source in (("x", x, self.split.x), ("y", y, self.split.y)):
            needed = (self.rows, *source.shape)
            if np.shape(array) != needed:
                raise DataError(f"--transform gave {name} of shape {np.shape(array)}; {needed} is needed")
        return np.asarray(x, self.dtype), np.asarray(y, self._label_dtype)
