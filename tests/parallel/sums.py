"""What tests of the gradient sum share: vectors whose sum depends on the order, and the same sum done serially."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml.nn.parameters import Layout, Parameter, constant
from mpiml.parallel.gradient_sum import GradientSum, LibrarySum, OrderedSum
from mpiml.parallel.memory import FencedMemory, Memory, PrivateMemory, SharedMemory
from mpiml.parallel.tree import depth
from mpiml.parallel.values import Values
from mpiml.vectors import BLOCK, bytes_of

WORLD = MPI.COMM_WORLD
Array = NDArray[np.floating]


# From fewer blocks than ranks, over padding after every parameter, to slices of several pieces.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "tiny": [(3,)],
    "small": [(5, 7), (7,), (7, 3), (3,)],
    "large": [(300, 500), (500,), (BLOCK + 1, 3), (3,)],
}
MADE: list[GradientSum] = []  # by `make`, until somebody frees them


def layout_of(name: str, dtype: str) -> Layout:
    return Layout([Parameter(shape, constant(0.0)) for shape in SHAPES[name]], dtype)


LENGTH = 1 << 20


@functools.cache
def pool(dtype: str) -> Array:
    """Numbers of very different sizes, whose sum depends on the order."""
    rng = np.random.default_rng(0)
    return (rng.standard_normal(LENGTH) * 2.0 ** rng.integers(-12, 12, LENGTH)).astype(dtype)


def scattered(layout: Layout, *key: int) -> Array:
    """A vector of numbers from the pool for all that is updated, other ones for every key; the padding is zero."""
    start = hash(key) % (LENGTH - layout.updated)
    vector: Array = pool(layout.dtype)[start : start + layout.updated] * is_real(layout)
    return vector


@functools.lru_cache(16)
def is_real(layout: Layout) -> NDArray[np.bool_]:
    """Which elements of what is updated belong to parameters."""
    mask = np.zeros(layout.updated, bool)
    for block in layout.blocks():
        mask[block.start : block.stop] = True
    return mask


def tree(parts: Sequence[Array], low: int, size: int) -> Array:
    """The canonical sum by its definition: halves added up, a missing right half passes the left one up."""
    if size == 1:
        return parts[low]
    left, middle = tree(parts, low, size // 2), low + size // 2
    return left if middle >= len(parts) else left + tree(parts, middle, size // 2)


def serial_sum(parts: Sequence[Array], leaf: int = 1) -> Array:
    """The sum of micro-batches, of which runs of `leaf` are added one after the other."""
    leaves = [functools.reduce(np.add, parts[first : first + leaf]) for first in range(0, len(parts), leaf)]
    return tree(leaves, 0, 1 << (len(leaves) - 1).bit_length())


def feed(sum_: GradientSum, parts: Sequence[Array], stride: int = 0) -> None:
    """What a step's backward passes do; the last of them writes `stride` elements at a time, or all at once."""
    for index, m in enumerate(range(*sum_.plan.microbatches)):
        slot, last = sum_.slots[sum_.plan.slots[index]], m + 1 == sum_.plan.microbatches[1]
        if last and sum_.complete and stride:
            slot[...] = np.nan
            for start in reversed(range(0, len(slot), stride)):
                slot[start : start + stride] = parts[m][start : start + stride]
                sum_.complete(start)
        else:
            slot[...] = parts[m]
        sum_.accumulate(index)
    WORLD.Barrier()  # the step record is agreed on before the sum starts


def make(
    kind: type,
    layout: Layout,
    microbatches: int,
    comm: MPI.Intracomm = WORLD,
    where: str = "private",
    bucket: int = 0,
    halved: bool = False,
    leaf: int = 1,
) -> Any:
    """A sum whose ranks live on one node ("shared"), on nodes of three and fewer ("nodes"; "fenced": where stores may
    be reordered), of two ("pairs"), or each by itself."""
    flat = (layout.size, layout.blocks(), layout.dtype)
    memory: Memory = PrivateMemory()
    if where != "private":
        at_once = comm.size if where == "shared" else 2 if where == "pairs" else 3
        local = comm.Split(comm.rank // at_once, comm.rank)
        slot, values = (bytes_of(size, layout.dtype) for size in (layout.updated, layout.size))
        shared = FencedMemory if where == "fenced" else SharedMemory
        memory = shared(local, depth(comm.rank, comm.size, microbatches, leaf) * slot, values)
    if kind is LibrarySum:
        MADE.append(LibrarySum(comm, Values(MPI.COMM_SELF, memory, *flat), microbatches, leaf=leaf))
    else:
        MADE.append(OrderedSum(Values(comm, memory, *flat, bucket, halved), microbatches, leaf=leaf))
    return MADE[-1]


def has_the_bits_of_the_tree(
    sum_: OrderedSum, layout: Layout, microbatches: int, step: int, stride: int = 0, leaf: int = 1
) -> bool:
    """Whether a step, in which nothing may be left of the one before, sums what it should, and all ranks get it."""
    good = []
    parts = [scattered(layout, step, m) for m in range(microbatches)]
    expected = serial_sum(parts, leaf)
    feed(sum_, parts, stride)
    sum_.start()
    for index, piece in enumerate(sum_.values.pieces):
        total = sum_.total(index, np.full(piece.stop - piece.start, np.nan, layout.dtype))
        good.append(total.tobytes() == expected[piece.start : piece.stop].tobytes())
        sum_.values.vector[piece.start : piece.stop] = total
    sum_.publish()
    return all(good) and sum_.values.vector[: layout.updated].tobytes() == expected.tobytes()
