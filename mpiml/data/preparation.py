"""What is done to inputs before a model sees them, by values that a checkpoint keeps."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpiml.data.dataset import Split
from mpiml.data.sources import Source

Floats = NDArray[np.float64]


class Preparation(ABC):
    """The base of dataclasses whose fields are arrays of the shape of a row, named NAMES in a checkpoint."""

    NAMES: ClassVar[Sequence[str]]

    @abstractmethod
    def applied(self, source: Source, dtype: DTypeLike) -> Source:
        """The prepared inputs; `dtype` is the run's."""

    def arrays(self) -> dict[str, Floats]:
        """The values by their names in a checkpoint."""
        return dict(zip(self.NAMES, vars(self).values(), strict=True))

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Floats]) -> Self:
        """The reverse of `arrays`."""
        make: Any = cls
        made: Self = make(*(arrays[name] for name in cls.NAMES))
        return made

    def leave(self, parts: Iterable[slice]) -> None:  # noqa: B027
        """Leave some parts of flat rows as they are, where that is possible."""


def prepared(split: Split, preparations: Sequence[Preparation], dtype: DTypeLike) -> Split:
    """A split whose inputs are prepared, in this order."""
    x = split.x
    for preparation in preparations:
        x = preparation.applied(x, dtype)
    return dataclasses.replace(split, x=x)
