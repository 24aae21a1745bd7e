"""The sum of arrays over the micro-batches of a step, with the same bits on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml import vectors
from mpiml.errors import ConfigError, NotFiniteError, first_few, known_to_all
from mpiml.loop import trees
from mpiml.loop.checks import apart, check_comm, check_loss, check_weight, kinds_of, not_finite, write
from mpiml.loop.flat import Flat
from mpiml.loop.guard import clock
from mpiml.parallel import grid as grids
from mpiml.parallel.gradient_sum import OrderedSum
from mpiml.parallel.memory import Memory, SharedMemory, share
from mpiml.parallel.record import Agreement, Record, agree
from mpiml.parallel.tree import depth
from mpiml.parallel.values import Values
from mpiml.partition import part
from mpiml.run.process import reuse_memory
from mpiml.team import Team, share_cores
from mpiml.vectors import Vector, bytes_of

CALLS = ("sum", "mean", "meet", "close")  # at which ranks meet


class Sum:
    """The sum, or the mean, of arrays over all micro-batches of a step; collective to make and to close.

        sum = Sum(like=gradients, microbatches=8)
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
        slots: for each of them, in order, arrays in the form of `like`. What is written there before `put(m)` need not
            be copied. A slot is the micro-batch's from the `put` of the one before it on, or from the last sum on.
        weight, loss: of the last sum, over all micro-batches.
        bad_loss: the first micro-batch whose loss was not finite, or None.
        problem: why memory could not be shared, or None.
        neighbours, cores: how many ranks this node has, and how many cores these may use.

    Raises ConfigError, on all ranks alike, if ranks have other forms or settings, if the arrays cannot be summed, and
    for fewer micro-batches than ranks.
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
        team = Team(check_comm(comm), clock())
        asked = team.size if microbatches is None else microbatches
        kinds = team.together(lambda: kinds_of(like, asked, memory, team.size))
        settings = {"microbatches": str(asked), "memory": memory, "finite": str(bool(finite))}
        forms = {f"`like`, {name}": f"{dtype} {shape}" for name, (dtype, shape) in kinds.items()}
        team.check_alike(settings | forms, "all ranks make the same Sum")
        self.microbatches, self._finite = int(asked), finite
        self.weight = self.loss = 0.0
        self.bad_loss: int | None = None
        self._names, self._numbers = list(kinds), [trees.is_number(value) for value in trees.values(like)]
        self._form = trees.rebuilt(like, range(len(kinds)))
        self._grid = grids.build(team, 1)
        self.own = range(*part(self._grid.replica, team.size, self.microbatches))
        self.neighbours, self.cores = self._grid.node.size, self._grid.cores
        share_cores(self.neighbours, self.cores)  # the threads of a rank that sums have nothing to do
        # Of each micro-batch loss and weight; of each rank, in the row of its first, at which call it is, and numbers.
        self._table = np.zeros((self.microbatches, 2 + len(CALLS) + numbers))
        self._done = 0  # micro-batches of this step that are here
        self._met = False  # whether their weights are agreed on
        self._open = True
        by_kind = {kind: {i: s for i, (k, s) in enumerate(kinds.values()) if k == kind} for kind in trees.KINDS}
        self._place([Flat(dtype, shapes) for dtype, shapes in by_kind.items() if shapes], memory)

    def _place(self, flats: Sequence[Flat], kind: str) -> None:
        """Allocate the vectors; collective. Sums of two dtypes share no messages, and no counters in shared memory."""
        grid, self._sums, memories = self._grid, list[OrderedSum](), list[Memory]()
        table = Agreement.bytes_needed(grid.node.size, *self._table.shape) + bytes_of(grid.node.size, np.float64)
        count = depth(grid.replica, grid.replicas, self.microbatches)
        for flat in flats:
            each = bytes_of(flat.size, flat.dtype)
            memory, self.problem = share(grid.comm, grid.node, count * each, each + table, kind)
            comm = grid.data.Dup() if memories else grid.data
            grid.made += [comm] if memories else []
            values = Values(comm, memory, flat.size, flat.blocks(), flat.dtype)
            self._sums.append(OrderedSum(values, self.microbatches, clock()))
            memories.append(memory)
        first, self._alone = memories[0], len(self._sums[0].values.nodes) == 1
        bad = first.common(first.ranks, np.float64)
        self._bad, self._own_bad = bad, bad[first.rank : first.rank + 1]
        self._agree: Any = lambda table, *flags: agree(grid.comm, table, *flags)
        if isinstance(first, SharedMemory):
            self._agree = Agreement(grid, first, *self._table.shape)
        plan = self._sums[0].plan
        self._leaves = [self._ordered(flats, [sum_.slots[number] for sum_ in self._sums]) for number in range(count)]
        self.slots = [trees.rebuilt(self._form, self._leaves[number]) for number in plan.slots]
        self._totals = self._ordered(flats, [sum_.values.vector for sum_ in self._sums])
        for view in self._totals:
            view.flags.writeable = False

    def _ordered(self, flats: Sequence[Flat], flat_vectors: Sequence[Vector]) -> list[NDArray[Any]]:
        """The leaves in vectors, in the order of `like`."""
        views = dict[int, NDArray[Any]]()
        for flat, vector in zip(flats, flat_vectors, strict=True):
            views |= flat.views(vector)
        return [views[number] for number in range(len(self._names))]

    def put(self, m: int, arrays: Any = None, weight: float = 1.0, loss: float = 0.0) -> None:
        """Add `weight` times the arrays of micro-batch m, one of this rank's, in their order; without `arrays`, what is
        in its slot. With weight 0 the arrays count for nothing, even if they are not finite. A loss is added up beside
        them, as it is.

        Raises ConfigError for another micro-batch than the next, for arrays of another form than `like`, and for a
        weight that is not a number, 0 or more.
        """
        clock()("compute")
        index = self._done
        if not self._open or index == len(self.own) or m != self.own[index]:
            raise ConfigError(f"put(m={m!r}): {self._expected()}")
        loss, weight = check_loss(m, loss), check_weight(m, weight)
        number = self._sums[0].plan.slots[index]
        given = list(trees.values(self.slots[index]) if arrays is None else self._in_form(arrays))
        if len(given) != len(self._names):
            raise ConfigError(f"put(m={m}): the slot has {len(given)} arrays, but `like` had {len(self._names)}")
        with np.errstate(all="ignore"):  # the sum is looked at
            for name, value, view in zip(self._names, given, self._leaves[number], strict=True):
                if value is not view or weight != 1:
                    write(value, view, weight, f"put(m={m}): {name}")
            for sum_ in self._sums:
                sum_.accumulate(index)
        self._table[m, :2] = loss, weight
        self._done += 1

    def _in_form(self, arrays: Any) -> list[Any]:
        """The leaves of arrays of the form of `like`."""
        given = list(trees.leaves(arrays))
        if [name for name, _ in given] != self._names:
            here, there = ([name for name, _ in given], self._names)
            odd = [f"{name} is not in `like`" for name in here if name not in there]
            odd += [f"{name} is missing" for name in there if name not in here]
            raise ConfigError(f"put: the arrays have another form than `like`: {first_few(odd)}")
        return [value for _, value in given]

    def mean(self, copy: bool = True) -> Any:
        """The sum over all micro-batches, divided by the sum of their weights, if that is not 0; else as `sum`."""
        return self._total(copy, divided=True)

    def sum(self, copy: bool = True) -> Any:
        """The sum over all micro-batches; collective, when each rank has put all of its own.

        Returns arrays in the form of `like`, with Python's own numbers in the place of such; without `copy` they are
        arrays that cannot be written to, and that hold until the next `sum` or `mean`.

        Raises ConfigError if a micro-batch has not been put. On all ranks alike: NotFiniteError if the sum is not
        finite, and the next step may be put then; RunError if other ranks are at mean(), or close the sum.
        """
        return self._total(copy, divided=False)

    def _total(self, copy: bool, divided: bool) -> Any:
        if not self._open or self._done < len(self.own):
            raise ConfigError(f"{'mean()' if divided else 'sum()'} is asked for: {self._expected()}")
        if not self._met:
            self._meet("mean" if divided else "sum")
        self._done, self._met = 0, False
        bad = self._add_up(1.0 / self.weight if divided and self.weight else 1.0)
        if bad and self._finite:
            raise self._not_finite()
        clock()("compute")
        if not copy:
            return trees.rebuilt(self._form, self._totals)
        pairs = zip(self._totals, self._numbers, strict=True)
        return trees.rebuilt(self._form, [float(view) if number else view.copy() for view, number in pairs])

    def meet(self, numbers: Sequence[float] = ()) -> list[float]:
        """Agree on weights and losses, and add up these numbers of all ranks; collective. `sum` and `mean` do it where
        it has not been done. What the numbers show may be a reason to `drop` the sum, on all ranks alike.

        Returns the sums of the numbers, in the order of the ranks. Raises as `sum`.
        """
        sums = self._meet("meet", numbers)
        self._met = True
        clock()("compute")
        return sums

    def drop(self) -> None:
        """Do without the sum of what has been put; collective."""
        clock()("communication")
        for sum_ in self._sums:
            sum_.drop()
        self._done, self._met = 0, False
        clock()("compute")

    def _meet(self, call: str, numbers: Sequence[float] = ()) -> list[float]:
        """Wait until all ranks are at the same call. Returns the sums of their numbers; collective.

        Raises RunError, on all ranks alike, if they are at different ones.
        """
        clock()("communication")
        team = self._grid.team
        self._table[self.own.start, 2 : 2 + len(CALLS)] = [call == one for one in CALLS]
        self._table[self.own.start, 2 + len(CALLS) :][: len(numbers)] = numbers
        record: Record = self._agree(self._table, False, False)
        self._table[:] = 0
        if record.metric[CALLS.index(call)] < team.size:
            calls = team.allgather((call, clock().step, team.name))
            self._free()
            raise apart(calls)
        self.weight, self.loss, self.bad_loss = record.weight, record.loss, record.bad_entry
        return record.metric[len(CALLS) :]

    def _add_up(self, scale: float) -> bool:
        """Make `scale` times the total in the values of the sums. Returns whether it is not finite anywhere."""
        finite = True
        with np.errstate(all="ignore"):
            for sum_ in self._sums:
                finite = self._add_up_one(sum_, scale) and finite
        self._own_bad[:] = not finite  # the others of the node read it after the barrier of publish
        for sum_ in self._sums:
            sum_.publish()
        if self._alone:
            return bool(self._bad.any())
        return bool(self._finite and self._agree(self._table[:0], not finite, False).broken)

    def _add_up_one(self, sum_: OrderedSum, scale: float) -> bool:
        """The part of this rank in one sum. Returns whether it is finite."""
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
        return finite

    def _expected(self) -> str:
        """What this rank has to put next, for a message."""
        if not self._open:
            return "the sum is closed"
        if self._done == len(self.own):
            return f"rank {self._grid.team.name} has put all of its {self._own_text()}; mean() or sum() come next"
        return f"rank {self._grid.team.name} has {self._own_text()}, and {self.own[self._done]} comes next"

    def _own_text(self) -> str:
        """This rank's micro-batches, for a message."""
        first, last = self.own.start, self.own.stop - 1
        return f"micro-batch {first}" if first == last else f"micro-batches {first} to {last}"

    def _not_finite(self) -> NotFiniteError:
        """The error of a sum that is not finite, the same on all ranks; collective."""
        bad = [name for name, total in zip(self._names, self._totals, strict=True) if not np.isfinite(total).all()]
        left = sum(1 - count for count in self._sums[0].plan.counts)  # the partial sums of this rank's own
        put = [(name, leaf) for leaves in self._leaves[:left] for name, leaf in zip(self._names, leaves, strict=True)]
        to_blame = {name for name, leaf in put if not np.isfinite(leaf).all()}
        team = self._grid.team
        own = team.name, self._own_text(), [name for name in bad if name in to_blame]
        return not_finite(bad, team.allgather(own), clock().step)

    def close(self) -> None:
        """Give back what the MPI library holds for the sum; collective. What was returned without `copy` stays.

        Raises RunError, on all ranks alike, if other ranks still sum.
        """
        if self._open:
            self._meet("close")
            self._free()
            clock()("compute")

    def _free(self) -> None:
        self._open = False
        begun = self._grid.team.allgather(self._done > 0)
        for sum_ in self._sums:
            if any(begun) and not self._done:
                sum_.start()  # others have begun a step: their messages have to be met
            sum_.free()
            sum_.values.free()
        self._grid.free()

    def __enter__(self) -> Sum:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._open and known_to_all(error, self._grid.team.size):
            self.close()
