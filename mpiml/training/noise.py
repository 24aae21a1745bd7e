"""The noise scale of the gradient: the batch size beyond which more rows bring little.

McCandlish, Kaplan, Amodei and the OpenAI Dota Team, "An empirical model of large-batch training", arXiv 1812.06162,
2018: the "simple" noise scale, S / G2. There S is the trace of the covariance of one row's gradient, and G2 the squared
norm of the gradient over all rows, of which a batch's is an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml import vectors
from mpiml.parallel import exact
from mpiml.run import log
from mpiml.team import wait
from mpiml.vectors import Block, Vector

Pair = tuple[float, float]  # S and G2, as estimated in one step, or as averages over steps
DECAY = 0.9  # of the averages: what a logged step keeps of them
NOTHING: Pair = (0.0, 0.0)


class NoiseScale:
    """Measures the noise scale at some steps; it changes nothing.

    The squares of the gradients are sums over fixed blocks, added up exactly, so no layout changes them.

    Args:
        comm: all ranks of the run.
        blocks: of this rank's stage. Those of running averages have no gradient, and do not count.
        computes: with gradients where they are: mpiml.vectors, or functions of the same names.

    Attributes:
        averages: of the estimates so far. Both begin at 0, and their ratio is that of weighted means, as both are too
            small by the same factor.
    """

    def __init__(self, comm: MPI.Intracomm, blocks: Iterable[Block], computes: Any = vectors):
        self.comm, self.averages, self._vectors = comm, NOTHING, computes
        self._blocks = [(block.start, block.stop) for block in blocks if block.momentum is None]
        self._squares = exact.digits(np.empty((0, 1)))

    def count(self, gradient: Vector) -> None:
        """Count the gradient of one micro-batch of this rank's stage, summed over its rows."""
        squares = self._vectors.square_sums(gradient, self._blocks)
        self._squares += exact.digits(np.array(squares).reshape(-1, 1))

    def measured(self, weights: NDArray[np.float64], weight: float, norm: float, rows: int) -> log.Noise:
        """The noise scale after a step whose gradients have been counted; collective.

        Args:
            weights: of the micro-batches that this rank has scored; 0 of others.
            weight, norm, rows: of the whole step: the sum of its weights, the norm of its mean gradient, and its rows.
        """
        total = np.concatenate([self._squares, exact.digits(np.square(weights).reshape(-1, 1))])
        self._squares[:] = 0
        wait([self.comm.Iallreduce(MPI.IN_PLACE, total)])
        squares, square_weights = exact.rounded(total)
        pair = estimates(squares, square_weights, weight, norm, rows)
        if pair is None:
            return log.Noise(scale(self.averages), None, None)
        self.averages = averaged(self.averages, pair)
        return log.Noise(scale(self.averages), *pair)


def estimates(squares: float, square_weights: float, weight: float, norm: float, rows: int) -> Pair | None:
    """Unbiased estimates of S and G2 from one step, or None: they need two micro-batches of which rows count.

    With g_m the gradient of micro-batch m, of weight n_m, summed over its rows, and n = sum n_m:
    E |g_m|^2 = n_m^2 G2 + n_m S and E |sum g_m|^2 = n^2 G2 + n S; sum over m, subtract, and solve for G2, then for S.
    For B rows in equal parts of b, whose mean gradients are G_m, and G all together, that is
    S = (mean |G_m|^2 - |G|^2) / (1/b - 1/B) and G2 = (B |G|^2 - b mean |G_m|^2) / (B - b), as in the paper.

    Args:
        squares: the sum of |g_m|^2.
        square_weights: the sum of n_m^2.
        weight: n.
        norm: |sum g_m| / n.
        rows: of the step. S is of a row of average weight, whatever the unit of weights: tokens, say.
    """
    apart = weight * weight - square_weights
    if not apart > 0:
        return None
    whole = norm * weight
    square = (whole * whole - squares) / apart
    variance = (squares - square_weights * square) / weight * (rows / weight)
    return (variance, square) if math.isfinite(variance) and math.isfinite(square) else None


def averaged(averages: Pair, pair: Pair) -> Pair:
    """The averages after one more step."""
    (variance, square), (more_variance, more_square) = averages, pair
    return DECAY * variance + (1 - DECAY) * more_variance, DECAY * square + (1 - DECAY) * more_square


def averages_of(pairs: Iterable[Pair]) -> Pair:
    """The averages after some steps."""
    averages = NOTHING
    for pair in pairs:
        averages = averaged(averages, pair)
    return averages


def scale(averages: Pair) -> float | None:
    """The noise scale, in rows; None if it is not known, as while noise hides the gradient and G2 is not positive."""
    variance, square = averages
    if square <= 0 or variance < 0 or not math.isfinite(variance / square):
        return None
    return variance / square
