"""Points of curves: fewer of them without losing a peak, smoothed ones, and the axes that they are drawn over."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpiml.report.columns import Numbers
from mpiml.report.runs import Run

POINTS = 2000  # of a curve; a figure is some 500 pixels wide
SMOOTH = 40  # points from which on a curve is smoothed
WINDOWS = 25  # that a smoothed curve has room for beside each other
WIDE = 20.0  # largest by least value from which on an axis is logarithmic

UNITS = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))


class Curve(NamedTuple):
    """Places and values of a curve."""

    x: Numbers
    y: Numbers


def known(x: Numbers, y: Numbers) -> Curve:
    """The points whose place and value are known."""
    good = np.isfinite(x) & np.isfinite(y)
    return Curve(x[good], y[good])


def thinned(curve: Curve, most: int = POINTS) -> Curve:
    """At most about so many points of a curve: the first, the last, and of each of equal runs of points the least and
    the largest value. So each peak stays."""
    count = len(curve.y)
    if count <= most:
        return curve
    edges = np.linspace(0, count, most // 2, dtype=np.int64)
    kept = {0, count - 1}
    for first, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        part = curve.y[first:end]
        kept |= {first + int(part.argmin()), first + int(part.argmax())}
    places = np.array(sorted(kept))
    return Curve(curve.x[places], curve.y[places])


def smoothed(curve: Curve) -> tuple[Curve, int]:
    """The mean of each value and its neighbours, and how many values that is; of few points nothing, and 0."""
    count = len(curve.y)
    if count < SMOOTH:
        return Curve(curve.x[:0], curve.y[:0]), 0
    half = max(count // WINDOWS // 2, 2)
    sums = np.concatenate([[0.0], np.cumsum(curve.y)])
    places = np.arange(count)
    reach = np.minimum(half, np.minimum(places, count - 1 - places))  # at the ends fewer, as many on either side
    mean = (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)
    return Curve(curve.x, mean), 2 * half + 1


def means(values: Numbers, most: int) -> Numbers:
    """Means of (rows, ...) over at most so many equal runs of rows."""
    return _reduced(np.add, values, most) / _lengths(len(values), most).reshape(-1, *([1] * (values.ndim - 1)))


def least(values: Numbers, most: int) -> Numbers:
    """The least of each of at most so many equal runs of rows."""
    return _reduced(np.minimum, values, most)


def largest(values: Numbers, most: int) -> Numbers:
    """The largest of each of at most so many equal runs of rows."""
    return _reduced(np.maximum, values, most)


def _reduced(function: np.ufunc, values: Numbers, most: int) -> Numbers:
    reduced: Numbers = function.reduceat(values, _starts(len(values), most), axis=0)
    return reduced


def _starts(count: int, most: int) -> NDArray[np.int64]:
    parts = min(count, most)
    return np.arange(parts) * count // max(parts, 1)


def _lengths(count: int, most: int) -> Numbers:
    return np.diff([*_starts(count, most).tolist(), count]).astype(np.float64)


def is_wide(curves: list[Curve]) -> bool:
    """Whether curves are best read on a logarithmic axis: all values are above 0, and far apart."""
    values = np.concatenate([curve.y for curve in curves]) if curves else np.empty(0)
    return bool(values.size and values.min() > 0 and values.max() / values.min() > WIDE)


class Axis(NamedTuple):
    """What curves of runs are drawn over: the name in names of figures and in their titles, the label below, and how
    much of what a run counts makes one."""

    name: str
    title: str
    label: str
    unit: float = 1.0

    def of_steps(self, run: Run) -> Numbers:
        """The places of the lines of steps; of unknown ones NaN."""
        return self.at(run, run.metrics.steps["step"])

    def at(self, run: Run, steps: Numbers) -> Numbers:
        """The places of some steps, which rise."""
        if self.name == "step":
            return steps
        if self.name == "epoch":
            return steps / (run.steps_per_epoch or math.nan)
        lines = run.metrics.steps["step"]
        seconds: Numbers = np.interp(steps, [0.0, *lines], [0.0, *run.seconds]) / self.unit
        return seconds


STEP = Axis("step", "step", "step")


def axes_of(runs: list[Run]) -> list[Axis]:
    """Steps, epochs where any run tells them, and time in seconds, minutes or hours."""
    longest = max((float(run.seconds[-1]) for run in runs if len(run.seconds)), default=0.0)
    word, unit = next((word, unit) for word, unit in UNITS if longest > 3 * unit or unit == 1)
    epochs = [Axis("epoch", "epoch", "epochs")] if any(run.steps_per_epoch for run in runs) else []
    time = [Axis("time", "time", f"{word} of training", unit)] if longest else []
    return [STEP, *epochs, *time]
