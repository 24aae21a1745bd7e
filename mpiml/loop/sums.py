"""The sum of arrays over the micro-batches of a step, with the same bits on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from mpiml.errors import ConfigError, NotFiniteError, first_few, known_to_all
from mpiml.loop import trees
from mpiml.loop.checks import (
    apart,
    check_comm,
    check_loss,
    check_numbers,
    check_weight,
    communicators_for,
    kinds_of,
    not_finite,
)
from mpiml.loop.flat import Flat, FlatSums
from mpiml.loop.guard import called, clock
from mpiml.parallel import grid as grids
from mpiml.partition import part, part_of
from mpiml.run.process import reuse_memory
from mpiml.team import Team, share_cores

CALLS = ("sum", "mean", "meet", "drop", "close")  # at which ranks meet
AT = {call: [float(call == one) for one in CALLS] for call in CALLS}


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
        weight, loss: of the last sum, over all micro-batches.
        bad_loss: the first micro-batch whose loss was not finite, or None.
        node_ranks, cores: how many ranks this node has, and how many cores these may use.

    Raises ConfigError, on all ranks alike, if ranks have other forms or settings, if the arrays cannot be summed, and
    for fewer micro-batches than ranks.
    """

    @called
    @communicators_for("Sum")
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
        team = Team(check_comm(comm, "; what is summed is given as like=..."), clock())
        asked = team.size if microbatches is None else microbatches
        kinds = team.together(lambda: kinds_of(like, asked, memory, finite, numbers, team.size))
        settings = {"microbatches": asked, "memory": memory, "finite": finite, "numbers": numbers}
        forms = {f"`like`, {name}": f"{dtype} {shape}" for name, (dtype, shape) in kinds.items()}
        team.check_alike(
            {name: str(value) for name, value in (settings | forms).items()}, "all ranks make the same Sum"
        )
        self.microbatches, self._finite, self._numbers = int(asked), finite, int(numbers)
        self.weight = self.loss = 0.0
        self.bad_loss: int | None = None
        self._names, self._is_number = list(kinds), [trees.is_number(value) for value in trees.values(like)]
        self._form = trees.rebuilt(like, range(len(kinds)))
        self._grid = grids.build(team, 1)
        self.own = range(*part(self._grid.replica, team.size, self.microbatches))
        self.node_ranks, self.cores = self._grid.node.size, self._grid.cores
        share_cores(self.node_ranks, self.cores)  # the threads of a rank that sums have nothing to do
        # Of each of this rank's micro-batches loss and weight; in the row of the first, at which call this rank is,
        # whether it has put all, and numbers.
        self._rows = np.zeros((len(self.own), 3 + len(CALLS) + numbers))
        self._done = 0  # micro-batches of this step that are here
        self._met = False  # whether all ranks have put all, and their weights are agreed on
        self._open = True
        by_kind = {kind: {i: s for i, (k, s) in enumerate(kinds.values()) if k == kind} for kind in trees.KINDS}
        flats = [Flat(dtype, shapes) for dtype, shapes in by_kind.items() if shapes]
        columns = self._rows.shape[1]
        self._flat = FlatSums(self._grid, flats, self.microbatches, columns, memory, finite, clock())
        self._slots = [trees.rebuilt(self._form, self._flat.leaves[number]) for number in self._flat.slots]

    @property
    def slots(self) -> Slots:
        """For each of this rank's micro-batches, in order, arrays in the form of `like` to write into; see `Slots`."""
        return Slots(self)

    @property
    def total(self) -> Any:
        """Where `sum` and `mean` leave what they return without `copy`."""
        return trees.rebuilt(self._form, self._flat.totals)

    def rank_of(self, m: int) -> int:
        """The rank that puts micro-batch m, as the launcher numbers ranks."""
        team = self._grid.team
        return team.launched[part_of(m, team.size, self.microbatches)]

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
        given = list(trees.values(self._slots[index]) if arrays is None else self._in_form(m, arrays))
        if len(given) != len(self._names):
            raise ConfigError(f"put(m={m}): the slot has {len(given)} arrays, but `like` had {len(self._names)}")
        for name, value, view in zip(self._names, given, self._flat.leaves[self._flat.slots[index]], strict=True):
            if value is not view or weight != 1:
                trees.write(value, view, weight, f"put(m={m}): {name}")
        self._flat.accumulate(index)
        self._rows[index, :2] = loss, weight
        self._done += 1

    def _in_form(self, m: int, arrays: Any) -> list[Any]:
        """The leaves of arrays of the form of `like`."""
        given = list(trees.leaves(arrays))
        if [name for name, _ in given] != self._names:
            here, there = ([name for name, _ in given], self._names)
            odd = [f"{name} is not in `like`" for name in here if name not in there]
            odd += [f"{name} is missing" for name in there if name not in here]
            raise ConfigError(f"put(m={m}): the arrays have another form than `like`: {first_few(odd)}")
        return [value for _, value in given]

    @called
    def mean(self, copy: bool = True) -> Any:
        """The sum over all micro-batches, divided by the sum of their weights, if that is not 0; else as `sum`."""
        return self._total(copy, divided=True)

    @called
    def sum(self, copy: bool = True) -> Any:
        """The sum over all micro-batches; collective, when each rank has put all of its own.

        Returns arrays in the form of `like`, with Python's own numbers in the place of such; without `copy` they are
        arrays that cannot be written to, and that hold until the next `sum` or `mean`.

        Raises ConfigError if a micro-batch has not been put. On all ranks alike: NotFiniteError if the sum is not
        finite, and the next step may be put then; RunError if other ranks are at mean(), or close the sum.
        """
        return self._total(copy, divided=False)

    def _total(self, copy: bool, divided: bool) -> Any:
        if self._done < len(self.own):
            raise ConfigError(f"{'mean()' if divided else 'sum()'} is asked for: {self._expected()}")
        if not self._met:
            self._meet("mean" if divided else "sum")
        self._done, self._met = 0, False
        bad = self._flat.add_up(1.0 / self.weight if divided and self.weight else 1.0)
        if bad and self._finite:
            raise self._not_finite()
        clock()("compute")
        if not copy:
            return self.total
        pairs = zip(self._flat.totals, self._is_number, strict=True)
        return trees.rebuilt(self._form, [float(view) if number else view.copy() for view, number in pairs])

    @called
    def meet(self, numbers: Sequence[float] = ()) -> list[float]:
        """Add up these numbers over the ranks; collective, at any time. Once all ranks have put all, they also agree on
        weight and losses, as `sum` and `mean` do otherwise, and may all `drop` the sum for what these show.

        Returns the sums, in the order of `numbers`. Raises as `sum`; ConfigError for more or fewer numbers than the Sum
        was made for.
        """
        complete, *sums = self._meet("meet", check_numbers(numbers, self._numbers))
        self._met = complete == self._grid.team.size
        clock()("compute")
        return sums

    @called
    def drop(self) -> None:
        """Do without the sum of what has been put; collective. Raises RunError as `sum`."""
        if not self._met:
            self._meet("drop")
        clock()("communication")
        self._flat.drop()
        self._done, self._met = 0, False
        clock()("compute")

    def _meet(self, call: str, numbers: Sequence[float] = ()) -> list[float]:
        """Wait until all ranks are at the same call; collective. Returns how many have put all their micro-batches, and
        the sums of the numbers.

        Raises RunError, on all ranks alike, if they are at different ones.
        """
        if not self._open:
            raise ConfigError(f"{call}() is asked for: {self._expected()}")
        clock()("communication")
        team, row = self._grid.team, self._rows[0]
        row[2 : 2 + len(CALLS)] = AT[call]
        row[2 + len(CALLS)] = complete = self._done == len(self.own)
        if not complete:
            self._rows[self._done :, :2] = 0  # of the step before
        row[3 + len(CALLS) :] = numbers or 0.0
        record = self._flat.agree(self._rows, False, False)
        if record.metric[CALLS.index(call)] < team.size:
            calls = team.allgather((call, clock().step, team.name))
            self._free()
            raise apart(calls)
        if call != "close":
            self.weight, self.loss, self.bad_loss = record.weight, record.loss, record.bad_entry
        return record.metric[len(CALLS) :]

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
        bad = [name for name, total in zip(self._names, self._flat.totals, strict=True) if not np.isfinite(total).all()]
        put = [pair for leaves in self._flat.partial_sums() for pair in zip(self._names, leaves, strict=True)]
        to_blame = {name for name, leaf in put if not np.isfinite(leaf).all()}
        team = self._grid.team
        own = team.name, self._own_text(), [name for name in bad if name in to_blame]
        return not_finite(bad, team.allgather(own), clock().step)

    @called
    def close(self) -> None:
        """Give back what the MPI library holds for the sum; collective. What was returned without `copy` stays.

        Raises RunError, on all ranks alike, if other ranks still sum.
        """
        if self._open:
            self._meet("close")
            self._free()
            clock()("compute")

    def _free(self) -> None:
        self._open = self._met = False
        self._flat.drop()
        self._flat.free()
        self._grid.free()

    def __enter__(self) -> Sum:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._open and known_to_all(error, self._grid.team.size):
            self.close()


class Slots:
    """For each of a rank's micro-batches, in order, arrays in the form of `like`. What is written there before `put(m)`
    need not be copied.

    They share memory, as what has been put is added up there. So a slot can be had when its micro-batch comes next;
    ConfigError before and after. `trees` are all of them, for those who keep to the order by themselves.
    """

    def __init__(self, of: Sum):
        self.trees, self._of = of._slots, of

    def __len__(self) -> int:
        return len(self.trees)

    def __getitem__(self, index: int) -> Any:
        own = self._of.own
        if index not in range(-len(own), len(own)):
            raise ConfigError(f"slots[{index!r}]: there are {len(own)}, one for each micro-batch of this rank")
        if self._of._done != index % len(own):
            raise ConfigError(f"slots[{index}] is for micro-batch {own[index]}: {self._of._expected()}")
        return self.trees[index]

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))
