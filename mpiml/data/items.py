"""Rows that are items of an object with len and [number], as the map-style data sets of PyTorch and Hugging Face are:
(x, y) or dicts of arrays, numbers, images or CPU tensors."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mpiml.data.inputs import Inputs, InputsSource
from mpiml.data.sources import Indices, Rows
from mpiml.errors import DataError
from mpiml.random import Draws, keyed

LABELS = ("label", "labels", "y", "target")  # keys of dicts that hold labels
KEPT = 1 << 26  # bytes of labels that are kept, because their items were made for the inputs
SAMPLES = 8  # items that a fingerprint is of
ONE_AT_A_TIME = threading.Lock()  # an object may not bear two threads at once, nor may two that share a file


class Item(NamedTuple):
    """The arrays of an item: its inputs, with their names ("" if they have none), and its label, if it has one."""

    names: Sequence[str]
    parts: Sequence[Rows]
    label: Rows | None

    def kinds(self) -> list[tuple[str, tuple[int, ...]]]:
        return [(name, part.shape) for name, part in zip([*self.names, "label"], self.arrays(), strict=False)]

    def arrays(self) -> list[Rows]:
        """The inputs, then the label."""
        return [*self.parts, *([] if self.label is None else [self.label])]

    def same_as(self, other: Item) -> bool:
        """Whether both hold the same bytes."""
        return [part.tobytes() for part in self.arrays()] == [part.tobytes() for part in other.arrays()]

    def may_be(self, first: Item) -> bool:
        """Whether this item, of the same kinds, can be in the dtypes of another without a loss."""
        pairs = zip(self.arrays(), first.arrays(), strict=True)
        return all(np.can_cast(one.dtype, other.dtype, "same_kind") for one, other in pairs)


class Items:
    """The items of an object: `x`, a source of their inputs, and `y`, one of their labels, None if they have none.

    The label of an item is kept when its inputs are read, so that it is made once where a rank needs both. What items
    draw from generators of the process, those in `draws`, is a function of the seed and of the item's number.

    Args:
        which: "train" or "test".
        labelled: whether items must have labels.

    Raises DataError if items are none of the kinds above, or if one is not the same when it is made again.
    """

    def __init__(self, rows: Any, which: str, labelled: bool, seed: int):
        self._rows, self._name, self._labelled, self._seed = rows, f"x_{which}", labelled, seed
        self._labels: dict[int, Rows] = {}  # in the order in which they came
        self.length, self.draws = len(rows), frozenset[str]()
        if not self.length:
            raise DataError(f"{self._name} has no rows")
        self._first = self._tried(0)
        self._tried(self.length - 1)
        kinds = [(name, part.shape, part.dtype.kind) for name, part in zip(*self._first[:2], strict=True)]
        several = len(kinds) > 1 or bool(kinds[0][0])
        self.inputs: Inputs | None = tuple(kinds) if several else None
        self.x = ItemSource(self, f"x_{which}", self._row(0)[0], self.inputs)
        label = self._first.label
        self.y = None if label is None else ItemSource(self, f"y_{which}", label)

    def read(self, index: int, label: bool) -> Rows:
        """The inputs, or the label, of an item."""
        with ONE_AT_A_TIME:
            if label and index in self._labels:
                return self._labels[index]
            x, y = self._row(index)
            if label:
                assert y is not None, "items without labels have no source of labels"
                return y
            if y is not None:
                self._labels[index] = y
                while len(self._labels) * y.nbytes > KEPT:
                    del self._labels[next(iter(self._labels))]
            return x

    def _row(self, index: int) -> tuple[Rows, Rows | None]:
        """The inputs of an item, flat beside each other if they are several, and its label."""
        item, first = self._made(index), self._first
        if item.kinds() != first.kinds() or not item.may_be(first):
            here, there = (", ".join(_described(each)) for each in (item, first))
            raise DataError(f"{self._name}: row {index} is {here}, but row 0 is {there}; all rows must be alike")
        x = item.parts[0] if self.inputs is None else np.concatenate([part.reshape(-1) for part in item.parts])
        return x, item.label

    def _tried(self, index: int) -> Item:
        """An item that is made twice, to see what it draws from."""
        with Draws(self._seed, "item", index) as drawn:
            item = self._made(index)
        self.draws |= drawn.which
        if not item.same_as(self._made(index)):
            raise DataError(
                f"{self._name}: row {index} is another one when it is asked for again: it draws from a generator of "
                "its own, and every layout must train on the same rows; draw in a --transform instead, from its rng"
            )
        return item

    def _made(self, index: int) -> Item:
        where = f"{self._name}: row {index}"
        with keyed(self.draws, self._seed, "item", index):
            try:
                item = self._rows[index]
            except Exception as error:
                raise DataError(f"{where}: {type(error).__name__}: {' '.join(str(error).split())}") from error
            return _item(item, self._labelled, where)


class ItemSource(InputsSource):
    """The inputs, or the labels, of items."""

    def __init__(self, items: Items, name: str, row: Rows, inputs: Inputs | None = None):
        self.items, self.name, self.shape, self.dtype, self.inputs = items, name, row.shape, row.dtype, inputs

    def __len__(self) -> int:
        return self.items.length

    @property
    def draws(self) -> frozenset[str]:
        """The generators of the process that items draw from."""
        return self.items.draws

    def rows(self, indices: Indices) -> Rows:
        rows, label = np.empty((len(indices), *self.shape), self.dtype), self.name.startswith("y")
        for position, index in enumerate(indices.tolist()):
            rows[position] = self.items.read(index, label)
        return rows

    def samples(self) -> Rows:
        """Some rows, from the first to the last."""
        return self.rows(np.unique(np.linspace(0, len(self) - 1, SAMPLES).astype(np.int64)))


def _item(item: Any, labelled: bool, where: str) -> Item:
    """What an object gives for a number, as arrays. Raises DataError, beginning with `where`, if it is no item."""
    if isinstance(item, Mapping):
        keys = [key for key in LABELS if key in item]
        if len(keys) > 1 or (labelled and not keys) or len(item) == len(keys):
            what = f"is a dict of {', '.join(map(str, item)) or 'nothing'}"
            raise DataError(
                f"{where} {what}; one entry must be the label, named {' or '.join(LABELS)}, the others inputs"
            )
        x: Any = {key: value for key, value in item.items() if key not in keys}
        x = next(iter(x.values())) if len(x) == 1 else x
        return Item(*_inputs(x, where), _array(item[keys[0]], f"{where}: {keys[0]}") if keys else None)
    if isinstance(item, tuple | list) and len(item) == 2:
        return Item(*_inputs(item[0], where), _array(item[1], f"{where}: its label"))
    if labelled or isinstance(item, str | bytes):
        of = f" of {len(item)}" if isinstance(item, tuple | list) else ""
        several = "; several inputs of a row are a dict or a tuple: ((a, b), y)" if of else ""
        raise DataError(f"{where} is a {type(item).__name__}{of}, but must be (x, y), or a dict with a label{several}")
    return Item(*_inputs(item[0] if isinstance(item, tuple) and len(item) == 1 else item, where), None)


def _inputs(x: Any, where: str) -> tuple[list[str], list[Rows]]:
    """The names and arrays of an item's inputs."""
    if isinstance(x, Mapping) and x:
        names = sorted(map(str, x))
        return names, [_array(x[name], f"{where}: {name}") for name in names]
    if isinstance(x, tuple) and not all(isinstance(part, int | float) for part in x):
        return [""] * len(x), [_array(part, f"{where}: input {number}") for number, part in enumerate(x)]
    return [""], [_array(x, where)]


def _array(value: Any, where: str) -> Rows:
    try:
        array = np.asarray(value)
    except Exception as error:  # of any class: np.asarray calls the value's own code
        raise DataError(f"{where} is a {type(value).__name__} of which no array can be made: {error}") from None
    if array.dtype.kind not in "biuf":
        text = f"{array.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
        raise DataError(f"{where} is {text}, not numbers; leave it out, or make numbers of it")
    return array


def _described(item: Item) -> list[str]:
    names = [*(name or "x" for name in item.names), "label"]
    return [f"{name} {array.shape} {array.dtype}" for name, array in zip(names, item.arrays(), strict=False)]
