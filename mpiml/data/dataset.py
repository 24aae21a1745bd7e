"""Data sets: training and test rows, each with inputs x and labels y."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from mpiml.data.fingerprint import Fingerprint, Properties, of_files, of_values
from mpiml.data.formats import Options, open_files
from mpiml.data.inputs import inputs_of, source_of
from mpiml.data.labels import ProbabilitySource, ValueSource, WeightSource, stored
from mpiml.data.sources import ArraySource, Indices, LabelSource, Source, Zeros
from mpiml.data.subsets import NO_ROWS, Subset, copied, draw, origins
from mpiml.data.text import Windows
from mpiml.errors import ConfigError, DataError
from mpiml.usercode import called_with, is_name, named

DIGITS = Path(__file__).with_name("digits.npz")


@dataclass
class Split:
    """Inputs x, labels y and weights w of the training rows, or of the test rows; without weights, rows count 1.

    Rows of several inputs have a dict, or a tuple, of sources as x. Rows that are not `labelled` have zeros as y.

    Raises DataError if rows have more than one weight.
    """

    x: Source
    y: Source
    w: Source | None = None
    labelled: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.x, Mapping | tuple):
            self.x = source_of(self.x, "x")
        if not (self.w is None or isinstance(self.w, WeightSource)):
            self.w = WeightSource(self.w)

    @classmethod
    def of(cls, sources: Mapping[str, Any], which: str) -> Split:
        """From arrays or sources by their names, x_train and so on, in which `which` is "train" or "test"."""
        named = {c: source_of(sources[key], key) for c in "xyw" if sources.get(key := f"{c}_{which}") is not None}
        return cls(**{"y": Zeros(len(named["x"]), f"y_{which}"), **named}, labelled="y" in named)

    def subset(self, rows: Indices) -> Split:
        """The rows with these numbers, which may be held beside others of this split."""
        w = None if self.w is None else Subset(copied(self.w), rows)
        return Split(Subset(copied(self.x), rows), Subset(copied(self.y), rows), w, self.labelled)

    def columns(self, names: str = "xyw") -> list[Source]:
        """The columns of these names, as far as there are such."""
        return [column for name in names if (column := getattr(self, name)) is not None]

    def sources(self, names: str = "xyw") -> list[Source]:
        """The sources from which the columns of these names are made."""
        return [source for column in self.columns(names) for source, _ in origins(column, NO_ROWS)]

    def ignoring(self, label: int | None) -> Split:
        """These rows with -1 in place of `label`, the one to be ignored; unchanged if it is -1 or None."""
        return self if label in (None, -1) else dataclasses.replace(self, y=LabelSource(self.y, label))

    def __len__(self) -> int:
        return len(self.x)


@dataclass
class Dataset:
    """Training rows and test rows. Integer labels make it a classification, floating-point labels a regression.

    Without test rows, `test` has no rows; `with_tests` takes some of the training rows instead.

    A row has one label, or an array of labels. Classes are numbered from 0. One number may mean "no label", which
    losses and metrics leave out: the number that --ignore names, or -1 if a row has several labels.

    Attributes:
        files: what the rows are read from; must be equal on all ranks, and in a run and its resumption.
        classes: the number of classes; None if it follows from the labels.
        names: of the inputs of a table; empty for other data.
        words: that the labels of a table are, in the order of the classes; empty if they are numbers.
        check: raises DataError for damage that reading rows would not show; one rank's call is enough.
        cut: whether a part of the training data was set aside as test rows when it was opened.
        notes: what a person should know.
        known: properties of files that other ranks of the node have read, which the fingerprint then does not.

    Raises DataError if the four sources do not fit together.
    """

    train: Split
    test: Split = None  # type: ignore[assignment]  # is never None once the object is made
    name: str = "arrays"
    files: Sequence[Path] = field(default=())
    classes: int | None = None
    check: Callable[[], None] | None = None
    names: Sequence[str] = ()
    words: Sequence[str] = ()
    cut: bool = False
    notes: Sequence[str] = field(default=())

    def __post_init__(self) -> None:
        self.known: Properties = {}
        self._origin: Dataset | None = None
        none: Any = self.test
        if none is None:
            self.test = self.train.subset(NO_ROWS)
        for which, split in (("train", self.train), ("test", self.test)):
            if _without_rows(split):
                continue
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
        if inputs_of(self.train.x) != inputs_of(self.test.x):
            raise DataError(f"{self.name}: x_train and x_test have inputs of other names or kinds")
        if (self.train.y.dtype.kind == "f") != (self.test.y.dtype.kind == "f"):
            raise DataError(f"{self.name}: y_train is {self.train.y.dtype}, but y_test is {self.test.y.dtype}")

    @classmethod
    def from_arrays(
        cls,
        x_train: Any,
        y_train: ArrayLike,
        x_test: Any = None,
        y_test: ArrayLike | None = None,
        w_train: ArrayLike | None = None,
        w_test: ArrayLike | None = None,
    ) -> Dataset:
        """A data set of arrays in memory, whose first axis counts rows. Rows of several inputs have a dict, or a tuple,
        of arrays as x; w are weights of rows; test rows may be missing."""
        if (x_test is None) != (y_test is None):
            raise DataError("arrays: x_test and y_test must both be given, or neither")
        train = Split.of({"x_train": x_train, "y_train": y_train, "w_train": w_train}, "train")
        tests = {"x_test": x_test, "y_test": y_test, "w_test": w_test}
        return cls.of_splits(train, None if x_test is None else Split.of(tests, "test"))

    @classmethod
    def of_columns(cls, sources: Mapping[str, Any], tests_only: bool, **others: Any) -> Dataset:
        """A data set of arrays or sources by their names, x_train and so on; of test rows alone if `tests_only`."""
        test = Split.of(sources, "test") if "x_test" in sources else None
        return cls.of_splits(None if tests_only else Split.of(sources, "train"), test, **others)

    @classmethod
    def of_splits(cls, train: Split | None, test: Split | None, **others: Any) -> Dataset:
        """A data set of two splits, of which one may be missing."""
        given = test if train is None else train
        assert given is not None, "a data set has rows"
        none = given.subset(NO_ROWS)
        return cls(none if train is None else train, none if test is None else test, **others)

    def replace(self, **changes: Any) -> Dataset:
        """A copy with other values, which is known by the same fingerprint: the data are the same."""
        other = dataclasses.replace(self, **changes)
        other._origin = self.origin
        return other

    @property
    def origin(self) -> Dataset:
        """The data set of which this one is a copy with changes, whose fingerprint it has."""
        return self._origin or self

    def with_tests(self, fraction: float, seed: int, said: bool, evaluated: bool) -> Dataset:
        """This data set, with a fraction of its training rows as test rows, chosen by the seed, if it has none.

        Args:
            said: whether a person has asked for this fraction.
            evaluated: whether test rows are needed.

        Raises ConfigError for a fraction that leaves no rows to train on, or none that are needed to test on.
        """
        if len(self.test):
            unused = f"--held-out {fraction:g} is not used: there are test rows, {len(self.test)}"
            return self if self.cut or not said else self.replace(notes=[*self.notes, unused])
        if fraction == 0:
            if evaluated:
                works = "add --eval-every 0 to train without tests, or hold out a fraction, such as 0.1"
                raise ConfigError(f"--held-out 0: there are no test rows to evaluate on; {works}")
            return self
        train, test = (self.train.subset(rows) for rows in draw(len(self.train), fraction, seed))
        held = f"no test rows: {len(test)} of {len(self.train)} rows, chosen by --seed, are held out (see --held-out)"
        return self.replace(train=train, test=test, cut=True, notes=[*self.notes, held])

    def with_validation(self, fraction: float, seed: int) -> Dataset:
        """This data set, with a fraction of its training rows, chosen by the seed, in place of the test rows.

        Raises ConfigError for a fraction that leaves no rows to train on, or takes none.
        """
        if not fraction:
            return self
        train, taken = (self.train.subset(rows) for rows in draw(len(self.train), fraction, seed, "validation"))
        left = f"the {len(self.test)} test rows are not read" if len(self.test) else "there are no test rows"
        note = f"validation: {len(taken)} of {len(self.train)} training rows, chosen by --seed; {left}"
        return self.replace(train=train, test=taken, notes=[*self.notes, note])

    @property
    def sampled(self) -> bool:
        """Whether the fingerprint has samples of the values: of arrays and files, but of no other sources."""
        sources = [*self.train.sources(), *self.test.sources()]
        return bool(self.files) or all(isinstance(source, ArraySource) for source in sources)

    @functools.cached_property
    def fingerprint(self) -> Fingerprint:
        """Sizes and checksums of samples of the files and columns: almost surely different for different data."""
        if self.origin is not self:
            return self.origin.fingerprint
        splits = [(which, s) for which, s in (("train", self.train), ("test", self.test)) if not _without_rows(s)]
        named = {f"{c}_{which}": getattr(s, c) for which, s in splits for c in "xyw"}
        columns = {name: stored(column) for name, column in named.items() if column is not None}
        texts = {name: f"{len(column):,} rows of {column.shape} {column.dtype}" for name, column in columns.items()}
        for name, column in columns.items() if not self.files else ():
            texts[name] += of_values(column)
        return of_files(self.files, self.known) + [list(item) for item in texts.items()]

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
        return self.replace(train=train, test=test)


def open_dataset(spec: str, options: Options | None = None) -> Dataset:
    """The data set that `--data` names: digits, files at a path, or what a function package.module:name returns; it may
    have no test rows.

    Raises DataError if it is missing or damaged, ConfigError if the function is missing.
    """
    options = options or Options()
    if is_name(spec):
        function = called_with(named(spec, "--data"), f"--data {spec}")
        try:
            made = function()
        except OSError as error:
            raise DataError(f"--data {spec}: {error}") from error
        from mpiml.data.objects import dataset_of  # which makes a Dataset

        return dataset_of(made, f"--data {spec}: must return", options)
    columns = open_files(str(DIGITS) if spec == "digits" else spec, options)
    name = "digits" if spec == "digits" else "".join(c for c in Path(spec).stem if c not in "*?[]") or "text"
    others = {field.name: getattr(columns, field.name) for field in dataclasses.fields(columns)[1:]}
    return Dataset.of_columns(columns.sources, options.tests_only, name=name, **others)


def _without_rows(split: Split) -> bool:
    """Whether a split stands for rows that there are not: one that was given as such may not be empty."""
    return isinstance(split.x, Subset) and not len(split)
