"""A data set from what a user's program has: arrays by name, or data sets with len and [number]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpiml.data.dataset import Dataset, Split
from mpiml.data.formats import Options
from mpiml.data.items import Items
from mpiml.data.names import COLUMNS, columns, listed, unused
from mpiml.data.sources import Zeros
from mpiml.errors import DataError

TESTS = ("test", "validation", "valid", "val")  # names of the split to test on: the first that is there
NOTHING = object()
WANTED = (
    "a Dataset, a dict of arrays x_train, y_train and so on, or one or two data sets (to train on, to test on) that "
    "have len and [number]"
)


def dataset_of(made: Any, what: str, options: Options) -> Dataset:
    """A data set from a Dataset, arrays by name, a pair or a dict of map-style data sets, or a single one.

    `what` begins the messages: "--data mine:load: must return". Raises DataError for anything else.
    """
    if isinstance(made, Dataset):
        data = made
    elif isinstance(made, Mapping) and not _splits(made):
        keys, where = [str(key) for key in made], _subject(what)
        chosen = columns(keys, options.arrays, options.tests_only, where)
        notes = () if options.tests_only else unused(keys, chosen, where)
        named = {column: made[name] for column, name in chosen.items()}
        return Dataset.of_columns(named, options.tests_only, notes=notes)
    elif options.tests_only and _is_array(made):
        return Dataset.of_columns({"x_test": made}, tests_only=True)
    elif arrays := _pairs_of_arrays(made):
        data = Dataset.of_columns(arrays, tests_only=False)
    else:
        return _of_items(*_pair(made, what, options.tests_only), options, what)
    if options.tests_only and not len(data.test):
        raise DataError(f"{_subject(what)}: there are no test rows, which alone are wanted here")
    return data


def _of_items(train: Any, test: Any, options: Options, what: str) -> Dataset:
    splits, notes = {}, []
    for which, rows in (("train", train), ("test", test)):
        if rows is not NOTHING and (which == "test" or not options.tests_only):
            _check_map_style(rows, what)
            items = Items(rows, which, not options.tests_only, options.seed)
            y = items.y or Zeros(items.length, f"y_{which}")
            splits[which] = Split(items.x, y, labelled=items.y is not None)
            if items.draws:
                drawn = f"x_{which}: items draw from the generators of {' and '.join(sorted(items.draws))}"
                notes.append(f"{drawn}: a row gets the same random numbers in every epoch; --transform draws anew")
    if options.tests_only:
        return Dataset.of_splits(None, splits["test"], notes=notes)
    return Dataset.of_splits(splits["train"], splits.get("test"), notes=notes)


def _pair(made: Any, what: str, tests_only: bool) -> tuple[Any, Any]:
    """The data sets to train on and to test on, of which one is NOTHING if it is not there."""
    if isinstance(made, Mapping):
        train, test = made.get("train", NOTHING), next((made[name] for name in TESTS if name in made), NOTHING)
        if NOTHING is (test if tests_only else train):
            need = "test rows" if tests_only else "rows to train on"
            raise DataError(f"{_subject(what)}: there are no {need}; it holds {listed([*map(str, made)])}")
        return train, test
    if isinstance(made, tuple | list) and made and all(_is_data_set(one, made) for one in made):
        if len(made) != 2:
            raise DataError(f"{what} one data set, or two, to train on and to test on, but there are {len(made)}")
        return made[0], made[1]
    return (NOTHING, made) if tests_only else (made, NOTHING)


def _splits(made: Mapping[Any, Any]) -> bool:
    """Whether a dict is one of data sets, by the names "train", "test" and so on."""
    return any(name in made for name in ("train", *TESTS)) and not any(str(key).lower() in COLUMNS for key in made)


def _pairs_of_arrays(made: Any) -> dict[str, Any] | None:
    """The columns of ((x_train, y_train), (x_test, y_test)), if it is that."""
    if not isinstance(made, tuple) or len(made) != 2:
        return None
    if not all(isinstance(pair, tuple) and len(pair) == 2 and _is_array(pair[1]) for pair in made):
        return None
    (x_train, y_train), (x_test, y_test) = made
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def _is_array(made: Any) -> bool:
    return hasattr(made, "shape") and hasattr(made, "dtype") and bool(made.shape)


def _is_map_style(made: Any) -> bool:
    """Whether rows can be had by their numbers."""
    named = isinstance(made, str | bytes | Mapping | tuple | set) or _is_array(made) or _is_stream(made)
    return not named and hasattr(made, "__len__") and hasattr(made, "__getitem__")


def _is_data_set(one: Any, among: Any) -> bool:
    """Whether an object in a list or tuple is a data set; a list in a list may as well be an item (x, y)."""
    return _is_map_style(one) and not (isinstance(one, list) and isinstance(among, list))


def _is_stream(made: Any) -> bool:
    numbered = hasattr(made, "__len__") and hasattr(made, "__getitem__")
    named = any(kind.__name__ == "IterableDataset" for kind in type(made).__mro__)
    return named or (hasattr(made, "__iter__") and not numbered)


def _check_map_style(rows: Any, what: str) -> None:
    """Raise DataError for an object whose items are not rows, or which gives them only one after the other."""
    if isinstance(rows, tuple | list) and (streams := [one for one in rows if _is_stream(one)]):
        rows = streams[0]
    kind = type(rows).__name__
    if isinstance(rows, tuple):
        kind = f"a tuple of {', '.join(type(one).__name__ for one in rows) or 'nothing'}"
    verb = "returns" if what.endswith("return") else "is"
    if _is_stream(rows) and not isinstance(rows, Mapping | set):
        loader = " (of a DataLoader, its .dataset)" if hasattr(rows, "dataset") else ""
        raise DataError(
            f"{_subject(what)} {verb} a stream, {kind}, whose rows have no numbers, but each rank reads rows of its "
            f"own; give a data set with len and [number]{loader}, or write the rows to files once, such as .npy or HDF5"
        )
    if not _is_map_style(rows):
        raise DataError(f"{what} {WANTED}, but {verb} {kind}")


def _subject(what: str) -> str:
    """What a message is about, without the verb."""
    return what.removesuffix(" must return").removesuffix(" must be").removesuffix(":")
