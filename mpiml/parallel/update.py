"""The update: sum, divide, clip, optimize and average, piece by piece while each is in cache."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from mpi4py import MPI

from mpiml import vectors
from mpiml.errors import known_to_all
from mpiml.parallel import exact
from mpiml.parallel.gradient_sum import GradientSum
from mpiml.parallel.slices import Piece, place
from mpiml.parallel.state import EMA
from mpiml.parallel.ties import Ties
from mpiml.team import Team, wait
from mpiml.vectors import Operands, Vector


class Optimizer(Protocol):
    """An optimizer as the update uses it (mpiml.nn.optimizers)."""

    @property
    def states(self) -> tuple[str, ...]: ...

    @property
    def layerwise(self) -> bool: ...

    def prepare(self, on: Operands, scale: float, step: int) -> None: ...

    def trust_ratio(self, value: float, total: float, scale: float) -> float: ...

    def update(self, on: Operands, scale: float, rate: float, step: int) -> None: ...


class Update:
    """Updates the values of a stage by the summed gradient; collective over all ranks of the run.

    With `ema` it keeps an exponential moving average of what the optimizer changes: after step t, the sum over all
    steps s up to t of ema^(t - s) times the values after s, divided by the sum of these factors. So after the first
    step it is the values themselves: those before it do not count.
    Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", SIAM J. Control Optim. 30, 1992; the
    division as in Adam (Kingma and Ba, ICLR 2015).

    Args:
        team: all ranks of the run, for the norm.
        replica: of this rank.
        sum_: of this stage.
        clip: the largest norm that the gradient may have; 0 for no limit.
        rows: (step) -> its rows over all replicas; for running averages.
        ema: the part of the average that stays in a step; 0 for no average.
        ties: what adds up gradients of arrays that stand in several layers, if the model has such.

    Attributes:
        states: the optimizer's state vectors and the average by name, for the parts that this replica holds, one after
            another.
        finite: whether all values that this rank computed in its last step are finite.
        counts: whether what this rank holds counts in sums over all ranks: of those that hold the same, one does.
    """

    def __init__(
        self,
        team: Team,
        replica: int,
        sum_: GradientSum,
        optimizer: Optimizer,
        clip: float,
        rows: Callable[[int], int],
        ema: float = 0.0,
        ties: Ties | None = None,
    ):
        self.comm, self.clock, self.sum, self.optimizer, self.clip = team.comm, team.clock, sum_, optimizer, clip
        self.rows, self.ema, self.finite, self.pieces = rows, ema, True, sum_.values.pieces
        dtype, self._vectors = sum_.values.dtype, sum_.values.vectors
        size = sum(stop - start for start, stop in sum_.values.held)
        names = (*optimizer.states, EMA) if ema else optimizer.states
        self.states = {name: self._vectors.zeros(size, dtype) for name in names}
        self.ties, self._tied = ties, ties.totals if ties else {}
        kept = [sum_.slots[0][piece.start : piece.stop] for piece in self.pieces]
        self._kept = [self._tied.get(index, one) for index, one in enumerate(kept)]
        longest = max((piece.stop - piece.start for piece in self.pieces), default=0)
        scratch = [self._vectors.empty(longest, dtype) for _ in range(2)]
        self._operands = [self._operands_of(piece, *scratch) for piece in self.pieces]
        self.counts = replica in sum_.values.owners
        self._in_norm = [self.counts and piece.counted and piece.momentum is None for piece in self.pieces]

    def step(self, rate: float, weight: float, step: int, measure: bool) -> float | None:
        """Do step number `step`, from 1 on, with learning rate `rate`, on a batch whose weights sum to `weight`.

        Returns the norm of the mean gradient before clipping if `measure` or if there is clipping, else None. If it is
        not finite, or if `weight` is 0, no value has changed. The average counts this step all the same.
        """
        if not weight:
            self.sum.drop()
            for on in self._operands:
                self._average(on, step)
            return 0.0
        self.clock("communication")
        self.sum.start()
        self.clock("update")
        if self.ties:
            self.ties.add()
        scale = 1.0 / weight
        norm = None
        if measure or self.clip:
            norm = self._norm() * scale
            if not np.isfinite(norm):
                return norm
            if self.clip and norm > self.clip:
                scale *= self.clip / norm
        kept, finite = norm is not None, True
        if self.optimizer.layerwise:
            self._trust(scale, step, kept)
            kept = True
        for index, (piece, on) in enumerate(zip(self.pieces, self._operands, strict=True)):
            on.total = self._kept[index] if kept else self._total(index, on.scratch[0])
            if piece.momentum is None:
                self.optimizer.update(on, scale, rate * piece.rate, step)
                self._average(on, step)
            else:
                vectors.average(on, self.rows(step), piece.momentum)
            finite = finite and self._vectors.is_finite(on.value)
        self.finite = finite
        self.clock("communication")
        self.sum.publish()
        return norm

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """In a block all values are their averages, if there are any; collective. After it they are what they were, but
        not if one rank fails alone, because the others do not come here then."""
        self._exchange()
        try:
            yield
        except BaseException as error:
            if known_to_all(error, self.comm.size):
                self._exchange()
            raise
        self._exchange()

    def _exchange(self) -> None:
        """Put values in the place of averages and averages in the place of values."""
        if not self.ema:
            return
        values = self.sum.values
        with self.clock.booked("evaluation"):
            self.clock("communication")
            values.memory.barrier()  # ranks that share the values may still compute with them
            self.clock("update")
            for on in self._operands:
                if on.average is not None:
                    spare, _ = on.scratch
                    spare[...] = on.value
                    on.value[...] = on.average
                    on.average[...] = spare
            self.clock("communication")
            values.publish()

    def _total(self, index: int, out: Vector) -> Vector:
        """The summed gradient of a piece, over all places of its array: in `out`, or where it lies."""
        return self._tied[index] if index in self._tied else self.sum.total(index, out)

    def _average(self, on: Operands, step: int) -> None:
        """Count the values of a piece after a step in their average."""
        if on.average is not None:
            part = (1.0 - self.ema) / (1.0 - self.ema**step)
            vectors.approach(on.average, on.value, part, on.scratch[0], on.xp)

    def _operands_of(self, piece: Piece, grad: Vector, spare: Vector) -> Operands:
        length, where = piece.stop - piece.start, place(self.sum.values.held, piece.start, piece.stop)
        states = {name: state[where] for name, state in self.states.items()}
        average = states.pop(EMA, None)
        value, scratch = self.sum.values.vector[piece.start : piece.stop], (grad[:length], spare[:length])
        operands = Operands(value, list(states.values()), scratch, scratch[0], piece.decay, xp=self._vectors)
        if piece.momentum is None:
            operands.average = average
        return operands

    def _trust(self, scale: float, step: int, kept: bool) -> None:
        """Prepare each piece for the optimizer, and give those of matrices their trust ratio: its two norms are exact
        sums over all replicas that hold parts of the matrix. The sum is kept, as by `_norm` if that was called before.
        """
        values = self.sum.values
        squares: list[list[tuple[float, float]]] = [[] for _ in range(values.matrices)]
        for index, (piece, on) in enumerate(zip(self.pieces, self._operands, strict=True)):
            on.total = self._kept[index]
            if not kept:
                self._total(index, on.total)
            if piece.momentum is None:
                self.optimizer.prepare(on, scale, step)
            if piece.matrix is not None:
                pairs = (self._vectors.square_sums(vector, piece.blocks) for vector in (on.value, on.total))
                squares[piece.matrix] += zip(*pairs, strict=True)
        rows = np.zeros((max(map(len, squares), default=0), values.matrices, 2))
        for matrix, of_blocks in enumerate(squares):
            rows[: len(of_blocks), matrix] = np.reshape(of_blocks, (-1, 2))
        total = exact.digits(rows.reshape(len(rows), 2 * values.matrices))
        self.clock("communication")
        wait([values.comm.Iallreduce(MPI.IN_PLACE, total)])
        self.clock("update")
        norms = np.sqrt(exact.rounded(total)).reshape(-1, 2).tolist()
        for piece, on in zip(self.pieces, self._operands, strict=True):
            if piece.matrix is not None:
                of_value, of_total = norms[piece.matrix]
                on.trust = self.optimizer.trust_ratio(of_value, of_total, scale)

    def _norm(self) -> float:
        """The norm of the summed gradient over all stages; the sum is kept in this replica's first slot."""
        squares: list[float] = []
        for index, piece in enumerate(self.pieces):
            self._total(index, self._kept[index])
            if self._in_norm[index]:
                squares += self._vectors.square_sums(self._kept[index], piece.blocks)
        total = exact.digits(np.array(squares).reshape(-1, 1))
        self.clock("communication")
        wait([self.comm.Iallreduce(MPI.IN_PLACE, total)])
        self.clock("update")
        return math.sqrt(exact.rounded(total)[0])
