"""The lines of a metrics file as columns of numbers: a long run has a million of them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpiml.clock import SHARES
from mpiml.run.metrics import content_of, each
from mpiml.run.result import EVALUATION, LINE_KINDS

Numbers = NDArray[np.float64]
HUGE = 1e200  # larger numbers are not drawn
OF_A_STEP = ("epoch", "loss", "learning_rate", "gradient_norm", "noise_scale", "samples_per_second")
MORE = ("score", "sent", "distance", "lowest", "highest")  # bytes; of workers: how far apart, their losses
LEAST, MOST = ([f"{activity}, {which}" for activity in SHARES] for which in ("least", "most"))  # seconds of any rank
COLUMNS = ("step", *OF_A_STEP, *MORE, *LEAST, *MOST)
OWN = frozenset({*LINE_KINDS, "workers"})  # fields of a line that are no score


class Slow(NamedTuple):
    """A line that names the slowest rank."""

    step: int
    rank: int
    host: str
    activity: str
    times: float


@dataclass
class Metrics:
    """What a metrics file holds.

    Attributes:
        steps, evaluations: columns by their names; NaN where a line has nothing.
        metric: the name of the score; empty if no line has one.
        slow: lines that name the slowest rank.
        problems: a message for each damaged line.
    """

    steps: dict[str, Numbers]
    evaluations: dict[str, Numbers]
    metric: str = ""
    slow: list[Slow] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def epochs(self) -> tuple[Numbers, Numbers]:
        """Step and epoch of all lines."""
        both = self.steps, self.evaluations
        step, epoch = (np.concatenate([lines[name] for lines in both]) for name in ("step", "epoch"))
        return step, epoch


def read_metrics(path: Path) -> Metrics:
    """The content of a metrics file, however far it is written; nothing if there is none.

    Raises OutputError if it cannot be read.
    """
    steps, evaluations, slow, problems, metric = array("d"), array("d"), [], [], ""
    for _, entry, problem in each(path, content_of(path)):
        if entry is None:
            problems += [problem] if problem else []
            continue
        scored = entry.get("evaluation")
        metric = metric or next((name for name in scored or entry if name not in (EVALUATION if scored else OWN)), "")
        step = _number(entry["step"])
        if scored is not None:
            values = (entry.get("epoch"), scored.get("loss"), scored.get(metric))
            evaluations.extend((step, *map(_number, values)))
        else:
            steps.extend((step, *_of_step(entry, metric)))
            slow += _slow(entry)
    return Metrics(
        _columns(steps, COLUMNS), _columns(evaluations, ("step", "epoch", "loss", "score")), metric, slow, problems
    )


def _of_step(entry: Mapping[str, Any], metric: str) -> list[float]:
    """The numbers of a step's line, in the order of COLUMNS, but for the first."""
    seconds, workers = _table(entry.get("seconds")), _table(entry.get("workers"))
    bounds = [_table(seconds.get(name)) for name in (*SHARES, "bytes_sent")]
    losses = _table(workers.get("loss"))
    values = [entry.get(name) for name in OF_A_STEP]
    values += [entry.get(metric), bounds[-1].get("max"), workers.get("distance"), losses.get("min"), losses.get("max")]
    values += [one.get(which) for which in ("min", "max") for one in bounds[:-1]]
    return list(map(_number, values))


def _slow(entry: Mapping[str, Any]) -> list[Slow]:
    named = _table(_table(entry.get("seconds")).get("slowest"))
    if not isinstance(named.get("rank"), int):
        return []
    host, activity = str(named.get("host", "")), str(named.get("activity", ""))
    return [Slow(entry["step"], named["rank"], host, activity, _number(named.get("times_median")))]


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float:
    """A value as a number to draw; NaN if it is none."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < HUGE
    return float(value) if known else math.nan


def _columns(numbers: array[float], names: tuple[str, ...]) -> dict[str, Numbers]:
    """Columns of rows of numbers, in the order of their first column."""
    rows = np.frombuffer(numbers, np.float64).reshape(-1, len(names)) if numbers else np.empty((0, len(names)))
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    return dict(zip(names, np.ascontiguousarray(rows.T), strict=True))
