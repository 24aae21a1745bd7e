"""The accounts of workers in a round: what each has done of it, all together, and in a checkpoint within it; no MPI."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpiml.errors import ConfigError, OutputError
from mpiml.parallel import exact
from mpiml.run import verified
from mpiml.run.checkpoint import check_kinds
from mpiml.training.calendar import Calendar

# Arrays of a checkpoint within a round: of each worker its last step, the weight of its rows and its lines; the steps
# that are logged; and the round's first and last step.
NAMES = "round.steps", "round.weights", "round.lines", "round.logged", "round.ends"
STEPS, WEIGHTS, LINES, LOGGED, ENDS = NAMES
LOSS, WEIGHT, RATE, NORM, METRIC = range(5)  # columns of a line; the metric has as many as it needs
UNKNOWN = -1.0  # norm

Arrays = Mapping[str, NDArray[Any]]


class Reported(NamedTuple):
    """Which steps of a round have lines: those that are `logged`, and the last, `steps` all together."""

    logged: Sequence[int]
    steps: Sequence[int]

    @classmethod
    def of(cls, round_: range, logged: Sequence[int], left: Arrays | None) -> Reported:
        """By the settings, or as in a round that was `left`, but for its last step: that may have been logged as the
        end of the run, which has been extended."""
        before = left[LOGGED].tolist() if left else logged
        kept = [step for step in before if step != round_[-1] or step in logged]
        return cls(kept, sorted({*kept, round_[-1]}))


@dataclass
class Account:
    """What a worker has done of a round.

    Attributes:
        done: its last step.
        weight: of its rows so far.
        lines: (steps that are reported, columns) sums of loss and weight, learning rate, norm, and the metric's sums.
    """

    done: int
    weight: float
    lines: NDArray[np.float64]

    @classmethod
    def before(cls, first: int, reported: Reported, columns: int) -> Account:
        """Before the first step of a round; `columns` of the metric."""
        return cls(first - 1, 0.0, np.zeros((len(reported.steps), METRIC + columns)))

    def go_on(self, left: Arrays, worker: int) -> None:
        """Be where a worker was when its round was left."""
        self.done, self.weight = int(left[STEPS][worker]), float(left[WEIGHTS][worker])
        self.lines[...] = left[LINES][worker]


class Summary(NamedTuple):
    """A step of all workers: sums over them; learning rate; mean norm of the gradient, if it was computed; and the
    least and the largest mean loss of a worker."""

    loss: float
    weight: float
    metric: list[float]
    rate: float
    norm: float | None
    least: float
    largest: float


def summary(lines: NDArray[np.float64]) -> Summary:
    """Of the lines of all workers for one step; those without rows count for nothing."""
    loss, weight, *metric = exact.sums(lines[:, [LOSS, WEIGHT, *range(METRIC, lines.shape[1])]])
    counted = lines[lines[:, WEIGHT] > 0]
    means = (counted[:, LOSS] / counted[:, WEIGHT]).tolist() or [0.0]
    norms = counted[:, NORM].tolist() or [0.0]
    norm = math.fsum(norms) / len(norms) if UNKNOWN not in norms else None
    return Summary(loss, weight, metric, float(lines[0, RATE]), norm, min(means), max(means))


def arrays_of(workers: Sequence[Account], logged: Sequence[int], steps: range) -> dict[str, NDArray[Any]]:
    """What a checkpoint has besides vectors within a round of these steps."""
    return {
        STEPS: np.array([worker.done for worker in workers]),
        WEIGHTS: np.array([worker.weight for worker in workers]),
        LINES: np.array([worker.lines for worker in workers]),
        LOGGED: np.array(logged, np.int64),
        ENDS: np.array([steps[0], steps[-1]]),
    }


def check_left(left: Arrays, step: int, calendar: Calendar, columns: int, origin: str) -> None:
    """Raise ConfigError or OutputError unless a round can go on with these arrays of a checkpoint of a step.

    `columns`: of the metric.
    """
    kinds, workers = verified.kinds_of(left), calendar.config.workers or 0
    saved, logged = (left[name].size if name in left else 0 for name in (STEPS, LOGGED))
    if workers and saved not in (0, workers):
        raise ConfigError(
            f"--workers {workers}: {origin} was saved within a round of {saved} workers, which as many must finish; "
            f"go on with --workers {saved}, and change it once a step that is saved is the end of a round"
        )
    numbers = {STEPS: ("int64", (workers,)), LOGGED: ("int64", (logged,)), ENDS: ("int64", (2,))}
    check_kinds(origin, kinds, numbers | {WEIGHTS: ("float64", (workers,))})
    first, last = left[ENDS].tolist()
    reported = len({*left[LOGGED].tolist(), last})
    check_kinds(origin, kinds, {LINES: ("float64", (workers, reported, METRIC + columns))})
    if last > calendar.steps:
        raise ConfigError(
            f"--steps {calendar.steps}: {origin} was saved within the round of steps {first} to {last}, which workers "
            f"must finish; at least {last} would work"
        )
    steps = calendar.round_of(step)
    within = all(first - 1 <= number <= last for number in left[STEPS].tolist())
    within = within and all(first <= number <= last for number in left[LOGGED].tolist())
    if not (calendar.apart(step) and (first, last) == (steps[0], steps[-1]) and within):
        raise OutputError(f"{origin} was saved within another round than steps {steps[0]} to {steps[-1]}")
