"""Leaves of a tree side by side in one vector, of which they are views."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiml.vectors import ALIGNMENT, BLOCK, Block, Vector


class Flat:
    """All leaves of one dtype in one vector, each from a 64-byte boundary on.

    Attributes:
        leaves: their numbers among all leaves.
        size: of the vector, in elements.
    """

    def __init__(self, dtype: np.dtype[Any], shapes: dict[int, tuple[int, ...]]):
        self.dtype, self.leaves, self.shapes, self.size = dtype, list(shapes), list(shapes.values()), 0
        self.places: list[slice] = []
        per_line = ALIGNMENT // dtype.itemsize
        for shape in self.shapes:
            length = math.prod(shape)
            self.places.append(slice(self.size, self.size + length))
            self.size += -(-length // per_line) * per_line

    def blocks(self) -> list[Block]:
        """The blocks of the vector."""
        return [
            Block(a, min(a + BLOCK, place.stop), decay=False)
            for place in self.places
            for a in range(place.start, place.stop, BLOCK)
        ]

    def views(self, vector: Vector) -> dict[int, NDArray[Any]]:
        """The leaves in a vector, by their numbers."""
        views = [vector[place].reshape(shape) for place, shape in zip(self.places, self.shapes, strict=True)]
        return dict(zip(self.leaves, views, strict=True))
