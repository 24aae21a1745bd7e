"""The sum of arrays over the micro-batches of a step, with the same bits on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml import vectors
from mpiml.errors import ConfigError, NotFiniteError, known_to_all
from mpiml.loop import trees
from mpiml.loop.guard import clock
from mpiml.loop.rows import check_microbatches
from mpiml.parallel import grid as grids
from mpiml.parallel.gradient_sum import OrderedSum
from mpiml.parallel.memory import SharedMemory, share
from mpiml.parallel.record import Agreement, agree
from mpiml.parallel.tree import depth
from mpiml.parallel.values import Values
from mpiml.partition import part
from mpiml.run.process import reuse_memory
from mpiml.team import Team
from mpiml.vectors import ALIGNMENT, BLOCK, Block, Vector, bytes_of


class Flat:
    """All leaves of one dtype in one vector, each from a 64-byte boundary on."""

    def __init__(self, dtype: np.dtype[Any], shapes: Sequence[tuple[int, ...]]):
        self.dtype, self.shapes, self.size = dtype, shapes, 0
        self.places: list[slice] = []
        per_line = ALIGNMENT // dtype.itemsize
        for shape in shapes:
            length = int(np.prod(shape, dtype=np.int64))
            self.places.append(slice(self.size, self.size + length))
            self.size += -(-length // per_line) * per_line

    def blocks(self) -> list[Block]:
        """The blocks of the vector."""
        return [
            Block(a, min(a + BLOCK, place.stop), decay=False)
            for place in self.places
            for a in range(place.start, place.stop, BLOCK)
        ]

    def views(self, vector: Vector) -> list[NDArray[Any]]:
        """The leaves in a vector."""
        return [vector[place].reshape(shape) for place, shape in zip(self.places, self.shapes, strict=True)]


class Sum:
    """The sum, or the mean, of arrays over all micro-batches of a step; collective to make and to close.

        sum = Sum(comm, like=gradients, microbatches=8)
        for m, rows in data.mine(step):
            sum.put(m, gradients_of(rows), weight=len(rows))
        gradients = sum.mean()

    Each array is added up as one binary tree over the micro-batches, whoever holds them: the same bits on any number of
    ranks and nodes. Ranks of a node read each other's arrays in memory that they share.

    Args:
        comm: the ranks that sum (default: all).
        like: an array or number, or lists, tuples and dicts of such: the form of what is summed. float32 and float64;
            numbers are float64. NumPy arrays, and what NumPy makes an array of without a device: tensors, JAX arrays.
        microbatches: of a step, over all ranks (default: one each).
        memory: "shared", "private", or "auto": shared where that is possible.
        finite: whether a sum that is not finite is an error.
        numbers: how many numbers of each rank `meet` adds up beside the arrays.

    Attributes:
        own: the micro-batches of this rank, a range, as those of `Rows`.
        weight, loss: of the last sum, over all micro-batches.
        bad_loss: the first micro-batch whose loss was not finite, or None.
        cores, neighbours: how many cores the ranks of this node may use, and how many ranks these are.

    Raises ConfigError, on all ranks alike, if ranks have other forms, or too few micro-batches.
    """

    def __init__(
        self,
        comm: MPI.Intracomm | None = None,
        like: Any = None,
        microbatches: int | None = None,
        memory: str = "auto",
        finite: bool = True,
        numbers: int = 0,
    ):
        reuse_memory()  # for the arrays that are returned
        team = Team(MPI.COMM_WORLD if comm is None else comm, clock())
        self.microbatches = team.size if microbatches is None else microbatches
        check_microbatches(self.microbatches, team.size)
        self._like, self._finite, self._columns = like, finite, 2 + numbers
        self.weight = self.loss = 0.0
        self.bad_loss: int | None = None
        named = team.together(lambda: [(name, trees.array(value, name)) for name, value in trees.leaves(like)])
        self._names = [name for name, _ in named]
        self._kinds = [(array.dtype, array.shape) for _, array in named]
        team.check_alike({name: f"{a.dtype} {a.shape}" for name, a in named}, "all ranks must sum the same arrays")
        self._grid = grids.build(team, 1)
        self.cores, self.neighbours = self._grid.cores, self._grid.node.size
        self._flats = [
            Flat(dtype, [shape for kind, shape in self._kinds if kind == dtype])
            for dtype in trees.KINDS
            if any(kind == dtype for kind, _ in self._kinds)
        ]
        kinds = [flat.dtype for flat in self._flats]
        self._where = [kinds.index(dtype) for dtype, _ in self._kinds]  # the vector of each leaf
        self.own = range(*part(self._grid.replica, team.size, self.microbatches))
        self._place(memory)
        self._done = 0  # micro-batches of this step that are here
        self._met = False  # whether the weights of this step are agreed on

    def _place(self, kind: str) -> None:
        """Allocate the vectors; collective."""
        grid, table = self._grid, Agreement.bytes_needed(self._grid.node.size, self.microbatches, self._columns)
        slots = depth(grid.replica, grid.replicas, self.microbatches)
        each = sum(bytes_of(flat.size, flat.dtype) for flat in self._flats)
        memory, self.problem = share(grid.comm, grid.node, slots * each, each + table, kind)
        self._sums = [
            OrderedSum(Values(grid.data, memory, flat.size, flat.blocks(), flat.dtype), self.microbatches, clock())
            for flat in self._flats
        ]
        self._agree: Any = lambda table, *flags: agree(grid.comm, table, *flags)
        if isinstance(memory, SharedMemory):
            self._agree = Agreement(grid, memory, self.microbatches, self._columns)
        self._table = np.zeros((self.microbatches, self._columns))
        self._totals = [flat.views(sum_.values.vector) for flat, sum_ in zip(self._flats, self._sums, strict=True)]
        for views in self._totals:
            for view in views:
                view.flags.writeable = False

    @property
    def slots(self) -> list[Any]:
        """For each of this rank's micro-batches, in order, the arrays of its slot: what is written there before
        `put(m)` need not be copied. A slot is the micro-batch's from the `put` of the one before it on."""
        plan = self._sums[0].plan
        return [self._slot(number) for number in plan.slots]

    def _slot(self, number: int) -> Any:
        return self._tree([f.views(s.slots[number]) for f, s in zip(self._flats, self._sums, strict=True)])

    def put(self, m: int, arrays: Any = None, weight: float = 1.0, loss: float = 0.0) -> None:
        """Add `weight` times the arrays of micro-batch m, one of this rank's, in their order; without `arrays`, what
        has been written to its slot. A loss is added up beside them, as it is.

        Raises ConfigError for another micro-batch than the next, or for arrays of another form than `like`.
        """
        clock()("compute")
        if self._done == len(self.own) or m != self.own[self._done]:
            raise ConfigError(f"put(m={m}): {self._expected()}")
        number = self._sums[0].plan.slots[self._done]
        views = [f.views(s.slots[number]) for f, s in zip(self._flats, self._sums, strict=True)]
        if arrays is not None:
            self._write(arrays, weight, list(self._in_order(views)))
        elif weight != 1:
            for sum_ in self._sums:
                np.multiply(sum_.slots[number], weight, out=sum_.slots[number])
        for sum_ in self._sums:
            sum_.accumulate(self._done)
        self._table[m, :2] = loss, weight
        self._done += 1

    def _write(self, arrays: Any, weight: float, views: Sequence[NDArray[Any]]) -> None:
        given = list(trees.leaves(arrays))
        if [name for name, _ in given] != self._names:
            raise ConfigError(
                f"put: the arrays are {_some([n for n, _ in given])}, but `like` had {_some(self._names)}"
            )
        for (name, value), (dtype, shape), view in zip(given, self._kinds, views, strict=True):
            array = trees.array(value, name)
            if (array.dtype, array.shape) != (dtype, shape):
                raise ConfigError(f"put: {name} is {array.dtype} {array.shape}, but was {dtype} {shape} in `like`")
            np.multiply(array, array.dtype.type(weight), out=view) if weight != 1 else np.copyto(view, array)

    def mean(self, copy: bool = True) -> Any:
        """The sum over all micro-batches, divided by their weights; collective. As `sum`."""
        return self._total(copy, divided=True)

    def sum(self, copy: bool = True) -> Any:
        """The sum over all micro-batches; collective, when each rank has put all of its own.

        Returns arrays in the form of `like`; without `copy` they cannot be written to, and hold until the next `put`.

        Raises ConfigError if a micro-batch has not been put, NotFiniteError, on all ranks alike, if the sum is not
        finite.
        """
        return self._total(copy, divided=False)

    def meet(self, numbers: Sequence[float] = ()) -> list[float]:
        """Agree on weights and losses, and add up these numbers of all ranks; collective. `sum` and `mean` do it where
        it has not been done. What the numbers show may be a reason not to ask for the sum, on all ranks alike.

        Returns the sums of the numbers, in the order of the ranks.
        """
        clock()("communication")
        self._table[self.own.start, 2 : 2 + len(numbers)] = numbers
        record = self._agree(self._table, False, False)
        self.loss, self.weight, self.bad_loss = record.loss, record.weight, record.bad_entry
        self._table[:] = 0
        self._met = True
        clock()("compute")
        return list(record.metric)

    def drop(self) -> None:
        """Do without the sum of what has been put; collective."""
        clock()("communication")
        for sum_ in self._sums:
            sum_.drop()
        self._done, self._met = 0, False
        clock()("compute")

    def _total(self, copy: bool, divided: bool) -> Any:
        if self._done < len(self.own):
            raise ConfigError(f"the sum is asked for, but {self._expected()}")
        if not self._met:
            self.meet()
        clock()("communication")
        scale = 1.0 / self.weight if divided and self.weight else 1.0
        finite = [self._add_up(sum_, scale) for sum_ in self._sums]
        if self._finite:
            bad = self._agree(self._table[:0], not all(finite), False).broken
            if bad:
                raise self._not_finite()
        self._done, self._met = 0, False
        clock()("compute")
        return self._tree(self._totals, copy)

    def _add_up(self, sum_: OrderedSum, scale: float) -> bool:
        """Make the total in the values of a sum. Returns whether this rank's part of it is finite."""
        sum_.start()
        finite, vector = True, sum_.values.vector
        for index, piece in enumerate(sum_.values.pieces):
            out = vector[piece.start : piece.stop]
            total = sum_.total(index, out)
            if scale != 1:
                np.multiply(total, scale, out=out)
            elif total is not out:
                np.copyto(out, total)
            finite = finite and (not self._finite or vectors.is_finite(out))
        sum_.publish()
        return finite

    def _in_order(self, of_flats: Sequence[Sequence[NDArray[Any]]]) -> Iterator[NDArray[Any]]:
        """The leaves of all vectors in the order of `like`."""
        left = [iter(views) for views in of_flats]
        return (next(left[flat]) for flat in self._where)

    def _tree(self, of_flats: Sequence[Sequence[NDArray[Any]]], copy: bool = False) -> Any:
        """The leaves of all vectors in the form of `like`."""
        return trees.rebuilt(self._like, [view.copy() if copy else view for view in self._in_order(of_flats)])

    def _expected(self) -> str:
        """What this rank has to put next, for a message."""
        rank, own = self._grid.team.name, f"micro-batches {self.own.start} to {self.own.stop - 1}"
        if self._done == len(self.own):
            return f"rank {rank} has put all of its {own}; mean() or sum() come next"
        return f"rank {rank} has {own}, and {self.own[self._done]} comes next"

    def _not_finite(self) -> NotFiniteError:
        """The error of a sum that is not finite, the same on all ranks; collective."""
        bad = [
            name
            for name, total in zip(self._names, self._in_order(self._totals), strict=True)
            if not np.isfinite(total).all()
        ]
        return NotFiniteError(f"the sum of {_some(bad)} is not finite").on_all_ranks()

    def close(self) -> None:
        """Give back what the MPI library holds for the sum; collective."""
        for sum_ in self._sums:
            sum_.free()
            sum_.values.free()
        self._grid.free()

    def __enter__(self) -> Sum:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if known_to_all(error, self._grid.team.size):
            self.close()


def _some(names: Sequence[str]) -> str:
    """The first of these names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
