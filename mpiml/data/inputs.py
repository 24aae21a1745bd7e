"""Several inputs of a row, such as an image and some numbers: packed side by side into one flat row."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiml.data.sources import ArraySource, Indices, Rows, Source, WrappedSource
from mpiml.errors import DataError

# Of each input of a row: its name ("" if the inputs have none, but an order), shape, and the kind of its dtype.
Inputs = tuple[tuple[str, tuple[int, ...], str], ...]


class InputsSource(Source):
    """A source whose rows are flat if they have several inputs; `inputs` says which, None if there is one."""

    inputs: Inputs | None


class Packed(InputsSource):
    """The rows of several sources, each row flat and beside each other."""

    def __init__(self, parts: Sequence[Source], names: Sequence[str], name: str):
        for label, part in zip(names, parts, strict=True):
            if len(part) != len(parts[0]):
                raise DataError(
                    f"{name}: {label or part.name} has {len(part)} rows, but {parts[0].name} {len(parts[0])}"
                )
        self.parts, self.name = list(parts), name
        self.inputs = tuple((n, p.shape, p.dtype.kind) for n, p in zip(names, parts, strict=True))
        self.shape: tuple[int, ...] = (sum(math.prod(part.shape) for part in parts),)
        self.dtype = np.result_type(*(part.dtype for part in parts))

    def __len__(self) -> int:
        return len(self.parts[0])

    def hold(self, rows: Indices) -> None:
        for part in self.parts:
            part.hold(rows)

    def rows(self, indices: Indices) -> Rows:
        flat = [part.rows(indices).reshape(len(indices), -1) for part in self.parts]
        packed: Rows = np.concatenate(flat, axis=1, dtype=self.dtype)
        return packed


def source_of(values: Any, name: str) -> Source:
    """A source of arrays, array-likes or sources: of one, or of several inputs in a dict, or in a tuple of arrays.

    Those of a dict are packed in the order of their names: two dicts of equal names may have been filled differently.
    """
    if isinstance(values, Mapping):
        if not all(isinstance(key, str) and key for key in values) or not values:
            raise DataError(f"{name}: several inputs are a dict of names and arrays, but its keys are {[*values]}")
        return packed([values[key] for key in sorted(values)], sorted(values), name)
    if isinstance(values, tuple) and values and all(_has_rows(part) for part in values):
        return packed(values, [""] * len(values), name)
    if is_source(values):
        source: Source = values
        return source
    try:
        return ArraySource(values, name)
    except DataError:
        raise
    except ValueError as error:
        hint = "several inputs of a row are a dict or a tuple of arrays"
        raise DataError(f"{name}: no array can be made of this {type(values).__name__} ({error}); {hint}") from None


def packed(parts: Sequence[Any], names: Sequence[str], name: str) -> Packed:
    """A source of several inputs, which are arrays or sources."""
    labels = [f"{name}: {label or number}" for number, label in enumerate(names)]
    sources = [p if is_source(p) else ArraySource(p, label) for p, label in zip(parts, labels, strict=True)]
    return Packed(sources, names, name)


def is_source(values: Any) -> bool:
    """Whether an object has what a Source needs."""
    return all(hasattr(values, name) for name in ("rows", "hold", "shape", "dtype", "__len__"))


def _has_rows(part: Any) -> bool:
    return is_source(part) or bool(getattr(part, "shape", ()))


def inputs_of(source: Source) -> Inputs | None:
    """The inputs that rows of a source are packed from; None if they are one."""
    while isinstance(source, WrappedSource):
        source = source.source
    return source.inputs if isinstance(source, InputsSource) else None


def shapes(inputs: Inputs) -> Any:
    """The shapes of inputs, as a dict by their names, or as a tuple."""
    return _named(inputs, [shape for _, shape, _ in inputs])


def spans(inputs: Inputs) -> list[slice]:
    """Which of the values of a packed row each input is."""
    ends = itertools.accumulate((math.prod(shape) for _, shape, _ in inputs), initial=0)
    return list(itertools.starmap(slice, itertools.pairwise(ends)))


def unpack(x: NDArray[Any], inputs: Inputs) -> Any:
    """The inputs of packed rows x, views of it, as a dict by their names, or as a tuple."""
    columns = zip(spans(inputs), inputs, strict=True)
    return _named(inputs, [x[:, span].reshape(len(x), *shape) for span, (_, shape, _) in columns])


def pack(x: Any, inputs: Inputs, rows: int, what: str) -> NDArray[Any]:
    """The reverse of `unpack`. Raises DataError, beginning with `what`, unless all inputs are there in their shapes."""
    names = [name for name, _, _ in inputs]
    fits = isinstance(x, Mapping) and set(x) == set(names) if names[0] else isinstance(x, tuple | list)
    parts = ([x[name] for name in names] if names[0] else list(x)) if fits else []
    given, needed = [np.shape(part) for part in parts], [(rows, *shape) for _, shape, _ in inputs]
    if given != needed:
        text = _named(inputs, given) if len(given) == len(needed) else f"a {type(x).__name__}"
        raise DataError(f"{what} gave x of shapes {text}; {_named(inputs, needed)} is needed")
    return np.concatenate([np.reshape(part, (rows, -1)) for part in parts], axis=1)


def _named(inputs: Inputs, values: Sequence[Any]) -> Any:
    names = [name for name, _, _ in inputs]
    return dict(zip(names, values, strict=True)) if names[0] else tuple(values)
