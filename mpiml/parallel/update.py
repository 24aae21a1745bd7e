"""The update: sum, divide, clip and optimize, piece by piece while each is in cache."""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from mpiml import vectors
from mpiml.parallel.gradient_sum import GradientSum
from mpiml.parallel.slices import Piece, place
from mpiml.team import Team, allgather, wait
from mpiml.vectors import Operands, Vector


class Optimizer(Protocol):
    """An optimizer as the update uses it (mpiml.nn.optimizers)."""

    @property
    def states(self) -> tuple[str, ...]: ...

    def update(self, on: Operands, scale: float, rate: float, step: int) -> None: ...


class Update:
    """Updates the values of a stage by the summed gradient; collective over all ranks of the run.

    Args:
        team: all ranks of the run, for the norm.
        replica: of this rank.
        sum_: of this stage.
        clip: the largest norm that the gradient may have; 0 for no limit.
        rows: (step) -> its rows over all replicas; for running averages.

    Attributes:
        states: the optimizer's state vectors by name, for the parts that this replica holds, one after another.
        finite: whether all values that this rank computed in its last step are finite.
    """

    def __init__(
        self, team: Team, replica: int, sum_: GradientSum, optimizer: Optimizer, clip: float, rows: Callable[[int], int]
    ):
        self.comm, self.clock, self.sum, self.optimizer, self.clip = team.comm, team.clock, sum_, optimizer, clip
        self.rows, self.finite, self.pieces = rows, True, sum_.values.pieces
        dtype = sum_.values.vector.dtype
        size = sum(stop - start for start, stop in sum_.values.held)
        self.states = {name: vectors.zeros(size, dtype) for name in optimizer.states}
        self._kept = [sum_.slots[0][piece.start : piece.stop] for piece in self.pieces]
        longest = max((piece.stop - piece.start for piece in self.pieces), default=0)
        scratch = [vectors.empty(longest, dtype) for _ in range(2)]
        self._operands = [self._operands_of(piece, *scratch) for piece in self.pieces]
        counts = replica in {holder for holder, _, _ in sum_.values.holders}
        self._in_norm = [counts and piece.momentum is None for piece in self.pieces]
        blocks = [len(piece.blocks) for piece, counted in zip(self.pieces, self._in_norm, strict=True) if counted]
        self._squares = allgather(team.comm, sum(blocks))

    def step(self, rate: float, weight: float, step: int, measure: bool) -> float | None:
        """Do step number `step`, from 1 on, with learning rate `rate`, on a batch whose weights sum to `weight`.

        Returns the norm of the mean gradient before clipping if `measure` or if there is clipping, else None. If it is
        not finite, or if `weight` is 0, no value has changed.
        """
        if not weight:
            self.sum.drop()
            return 0.0
        self.clock("communication")
        self.sum.start()
        self.clock("update")
        scale = 1.0 / weight
        norm = None
        if measure or self.clip:
            norm = self._norm() * scale
            if not np.isfinite(norm):
                return norm
            if self.clip and norm > self.clip:
                scale *= self.clip / norm
        finite = True
        for index, (piece, on) in enumerate(zip(self.pieces, self._operands, strict=True)):
            on.total = self.sum.total(index, on.scratch[0]) if norm is None else self._kept[index]
            if piece.momentum is None:
                self.optimizer.update(on, scale, rate * piece.rate, step)
            else:
                vectors.average(on, self.rows(step), piece.momentum)
            finite = finite and vectors.is_finite(on.value)
        self.finite = finite
        self.clock("communication")
        self.sum.publish()
        return norm

    def _operands_of(self, piece: Piece, grad: Vector, spare: Vector) -> Operands:
        length, where = piece.stop - piece.start, place(self.sum.values.held, piece.start, piece.stop)
        states = [state[where] for state in self.states.values()]
        scratch = grad[:length], spare[:length]
        return Operands(self.sum.values.vector[piece.start : piece.stop], states, scratch, scratch[0], piece.decay)

    def _norm(self) -> float:
        """The norm of the summed gradient over all stages; the sum is kept in this replica's first slot."""
        squares: list[float] = []
        for index, piece in enumerate(self.pieces):
            self.sum.total(index, self._kept[index])
            if self._in_norm[index]:
                squares += vectors.square_sums(self._kept[index], piece.blocks)
        everyone = np.empty(sum(self._squares))
        self.clock("communication")
        wait([self.comm.Iallgatherv(np.array(squares), [everyone, self._squares])])
        self.clock("update")
        return vectors.norm(everyone)
