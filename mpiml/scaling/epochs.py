"""The law of the epochs that training to a target takes, over the rows of a step, fitted to training runs; no MPI.

E(B) = E0 (1 + B / B_noise): a batch of B_noise rows takes twice the epochs of small batches, and with larger ones the
steps hardly become fewer. McCandlish, Kaplan, Amodei et al., "An empirical model of large-batch training", 2018,
arXiv 1812.06162.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mpiml.random import generator
from mpiml.scaling.laws import LEVEL, Array, Fit, Interval, least_squares

DRAWS = 10_000
ROUGH = 0.10  # root mean square of the relative distances, up to which the law describes the runs roughly
ROUNDING = 1e-9  # of one term of the law: the other is 0 if it is less, by the rounding of the fit
BATCHES = "--batches N,N trains with more"


class Reached(NamedTuple):
    """A run that reached the target: rows of a step, and the epochs between which it did.

    `after` is the last evaluation before, and `by` the first that reached it.
    """

    batch: float
    after: float
    by: float

    @property
    def epochs(self) -> float:
        """The middle of the two."""
        return (self.after + self.by) / 2

    @property
    def text(self) -> str:
        """The two."""
        return f"{self.after:.3g} to {self.by:.3g}"


def mean_of(runs: Sequence[Reached]) -> Reached:
    """The mean of runs with one batch."""
    return Reached(*map(statistics.mean, zip(*runs, strict=True)))


@dataclass(frozen=True)
class EpochsLaw:
    """E(B) = constant + slope B, fitted.

    Attributes:
        fit: with E0 and B_noise, in rows.
        rms: root mean square of the relative distances of the curve from the runs.
        draws: constants, slopes and relative scatters of runs, that the runs allow, as rows; none without intervals.
        smallest, largest: batches of the fit.
    """

    fit: Fit
    rms: float = math.nan
    constant: float = math.nan
    slope: float = math.nan
    draws: Array | None = None
    smallest: float = 0
    largest: float = 0

    def __bool__(self) -> bool:
        """Whether there is a curve."""
        return bool(self.fit.parameters)

    def at(self, batch: float) -> Interval:
        """The epochs of another run with steps of `batch` rows."""
        value = self.constant + self.slope * batch
        if self.draws is None:
            return Interval(value, -math.inf, math.inf)
        constant, slope, scatter = self.draws
        other = 1 + scatter * generator(0, "another run").standard_normal(DRAWS)
        return _interval(value, np.maximum((constant + slope * batch) * other, 0))


def fit_epochs(runs: Sequence[Reached], target: float) -> EpochsLaw:
    """Fit the law to runs by least squares of relative distances; runs with the same batch count as their mean.

    Intervals are of linear regression, with the scatter of the runs about the law not known beforehand (Gelman et al.,
    "Bayesian data analysis", 3rd ed., 2013, section 14.2), so with few batches they are wide. Each draw takes one run
    of each batch, and a moment between its two evaluations at random; so intervals err on the wide side.
    """
    law = f"epochs to {target:g}"
    batches = sorted({run.batch for run in runs})
    if len(batches) < 2:
        return EpochsLaw(Fit(law, {}, math.nan, f"undecided: needs 2 batches that reach it; {BATCHES}"))
    alike = [[run for run in runs if run.batch == batch] for batch in batches]
    means = {batch: mean_of(some).epochs for batch, some in zip(batches, alike, strict=True)}
    constant, slope = least_squares(means, lambda batch: [1.0, batch])
    constant = constant if constant > ROUNDING * slope * batches[0] else 0.0
    slope = slope if slope * batches[-1] > ROUNDING * constant else 0.0
    draws = _draws(alike, means) if len(batches) > 2 else None
    distances = [(constant + slope * batch) / epochs - 1 for batch, epochs in means.items()]
    rms, worst = float(np.sqrt(np.mean(np.square(distances)))), max(map(abs, distances))
    parameters = _parameters(constant, slope, draws)
    fit = Fit(law, parameters, worst, _verdict(len(batches), parameters, rms, worst))
    return EpochsLaw(fit, rms, constant, slope, draws, batches[0], batches[-1])


def _draws(alike: Sequence[Sequence[Reached]], means: dict[float, float]) -> Array:
    random = generator(0, "epochs")
    drawn = []
    for some in alike:
        _, after, by = np.array(some)[random.integers(0, len(some), DRAWS)].T
        drawn.append(after + (by - after) * random.random(DRAWS))
    scale = np.array(list(means.values()))
    unit = max(means)  # so that the two columns are of one size
    terms = np.stack([1 / scale, np.array(list(means)) / unit / scale], 1)
    relative = np.stack(drawn, 1) / scale
    solved = relative @ np.linalg.pinv(terms).T
    squares = ((solved @ terms.T - relative) ** 2).sum(1)
    scatter = np.sqrt(squares / random.chisquare(len(means) - 2, DRAWS))
    root = np.linalg.cholesky(np.linalg.inv(terms.T @ terms))
    constant, slope = (solved + scatter[:, None] * (random.standard_normal((DRAWS, 2)) @ root.T)).T
    return np.stack([constant, slope / unit, scatter])


def _parameters(constant: float, slope: float, draws: Array | None) -> dict[str, Interval]:
    """E0 and B_noise; without growth B_noise is infinite."""
    values = {"E0": constant, "B_noise": constant / slope if slope else math.inf}
    if draws is None:
        return {name: Interval(value, -math.inf, math.inf) for name, value in values.items()}
    first, slopes = np.maximum(draws[0], 0), np.maximum(draws[1], 0)
    noise = np.divide(first, slopes, out=np.full(DRAWS, math.inf), where=slopes > 0)
    return {"E0": _interval(values["E0"], first), "B_noise": _interval(values["B_noise"], noise)}


def _interval(value: float, draws: Array) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], method="nearest")  # of the draws, some may be infinite
    return Interval(value, float(low), float(high))


def _verdict(batches: int, parameters: dict[str, Interval], rms: float, worst: float) -> str:
    first, noise = parameters["E0"], parameters["B_noise"]
    if math.isinf(noise.value):
        return "undecided: epochs do not grow with the batch; train with larger ones"
    if not first.value:
        return "undecided: epochs grow as fast as the batch or faster; train with smaller ones"
    if batches < 3:
        return f"undecided: 2 batches fit any such law, and give no interval; {BATCHES}"
    off = f"{rms:.1%} off (root mean square), {worst:.0%} at worst"
    if rms > ROUGH:
        return f"not supported: {off}"
    return (
        f"undecided: {off}, but B_noise has no upper bound; {BATCHES}"
        if math.isinf(noise.high)
        else f"supported: {off}"
    )
