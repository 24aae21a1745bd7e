"""Arithmetic on flat vectors that lie on a device: the functions of mpiml.vectors with the same results, bit for bit.

Each function does one operation of IEEE arithmetic an element, which is rounded alike on all devices. Sums are in the
order in which NumPy adds up: of halves, down to 128 elements, which are added up as eight sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import DTypeLike
from torch import Tensor

if TYPE_CHECKING:
    from mpiml.devices.device import Device

LEAF = 128  # elements that NumPy does not halve any more
LANES = 8
PIECE = 1 << 24  # elements that are updated at once: so many that starting an operation takes no time beside it


class OnDevice:
    """The functions of mpiml.vectors, and NumPy's for elements, of vectors on a device."""

    multiply, add, subtract, sqrt = torch.multiply, torch.add, torch.subtract, torch.sqrt
    piece = PIECE

    def __init__(self, device: Device):
        self._device = device

    def divide(self, a: Tensor, b: Tensor | float, out: Tensor) -> Tensor:
        """a / b. CUDA's quotient by a number of the host would be a product with its inverse, which is rounded."""
        return torch.divide(a, b if isinstance(b, Tensor) else a.new_full((), b), out=out)

    def empty(self, size: int, dtype: DTypeLike) -> Tensor:
        return self._device.empty(size, dtype)

    def zeros(self, size: int, dtype: DTypeLike) -> Tensor:
        return self.empty(size, dtype).zero_()

    def is_finite(self, vector: Tensor) -> bool:
        """Whether every element is finite."""
        return bool(torch.isfinite(vector).all())

    def square_sums(self, vector: Tensor, blocks: Iterable[tuple[int, int]]) -> list[float]:
        """The sum of squares of vector[start:stop], in float64, for each block (start, stop)."""
        sums: list[Tensor] = []
        for start, length, count in _runs(list(blocks)):
            rows = vector[start : start + count * length].view(count, length)
            parts = rows.split(max(1, PIECE // max(length, 1)))  # which are in memory twice, as float64
            sums += (sums_of_rows(part.double().square()) for part in parts)
        return [] if not sums else torch.cat(sums).tolist()


def sums_of_rows(rows: Tensor) -> Tensor:
    """The sum of each row (count, length), added up as NumPy does it: (count,)."""
    count, length = rows.shape
    if length < LANES:
        return _added(rows.unbind(1)) if length else rows.new_zeros(count)
    if length <= LEAF:
        whole = length - length % LANES
        lanes = _added(rows[:, :whole].view(count, -1, LANES).unbind(1))
        while lanes.shape[1] > 1:
            lanes = lanes[:, 0::2] + lanes[:, 1::2]
        return _added([lanes[:, 0], *rows[:, whole:].unbind(1)])
    half = length // 2 - length // 2 % LANES
    if 2 * half == length:
        halves = sums_of_rows(rows.view(2 * count, half)).view(count, 2)
        return halves[:, 0] + halves[:, 1]
    return sums_of_rows(rows[:, :half].contiguous()) + sums_of_rows(rows[:, half:].contiguous())


def _added(terms: Sequence[Any]) -> Any:
    """The sum of terms, one after another."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _runs(blocks: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Blocks next to each other that are equally long, as (start, length, count)."""
    first = 0
    for index in range(1, len(blocks) + 1):
        start, stop = blocks[first]
        length = stop - start
        if index == len(blocks) or blocks[index] != (start + (index - first) * length, stop + (index - first) * length):
            yield start, length, index - first
            first = index
