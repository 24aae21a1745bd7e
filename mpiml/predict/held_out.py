"""The law of epochs over batches, compared with batches that it was not fitted to; no MPI."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpiml.command import table
from mpiml.errors import ConfigError
from mpiml.scaling.epochs import Reached, mean_of
from mpiml.scaling.laws import Interval
from mpiml.scaling.points import read_study
from mpiml.scaling.trained import law_of, missed, training_runs


@dataclass(frozen=True)
class HeldOut:
    """The mean of a batch's training runs, and the epochs that the law fitted to other batches predicts for a run."""

    study: str
    batch: int
    runs: int
    reached: Reached
    predicted: Interval

    @property
    def error(self) -> float:
        """Of the prediction, relative to the middle between the run's two evaluations."""
        return self.predicted.value / self.reached.epochs - 1

    @property
    def inside(self) -> bool:
        """Whether the mean run may have reached the target within the interval."""
        return self.predicted.low <= self.reached.by and self.reached.after <= self.predicted.high


def held_out(directory: Path, fitted: Collection[int] | None = None) -> list[HeldOut]:
    """The batches of a study whose runs all reached the target, each predicted without its own runs.

    Args:
        fitted: the batches to fit to, so that all others are held out; None to hold out each batch in turn, which gives
            nothing with fewer than three.

    Raises ConfigError if the study cannot be fitted to these batches, or has no others.
    """
    study = read_study(directory)
    runs = training_runs(study, directory)
    batches = {run.point.batch for run in runs if run.reached} - missed(runs)
    if fitted is not None:
        _check(directory, sorted(batches), fitted)
    elif len(batches) < 3:
        return []
    compared = []
    for batch in sorted(batches.difference(fitted or ())):
        law = law_of(runs, study["target"], batches - {batch} if fitted is None else fitted)
        own = [run.reached for run in runs if run.reached and run.point.batch == batch]
        mean = mean_of(own)
        compared.append(HeldOut(str(directory), batch, len(own), mean, law.at(mean.batch)))
    return compared


def _check(directory: Path, batches: list[int], fitted: Collection[int]) -> None:
    flag, have = f"--fit {','.join(map(str, fitted))}", ", ".join(map(str, batches)) or "none"
    if unknown := sorted(set(fitted) - set(batches)):
        raise ConfigError(
            f"{flag}: {directory} has no batch of {unknown[0]} that always reached the target; it has {have}"
        )
    if len(fitted) < 2:
        raise ConfigError(f"{flag}: the law has two parameters; give two of {have} or more")
    if len(fitted) == len(batches):
        raise ConfigError(f"{flag}: these are all batches of {directory}; leave out some to compare with")


def median_error(compared: Sequence[HeldOut]) -> float:
    return statistics.median(abs(one.error) for one in compared)


def describe(compared: Sequence[HeldOut], fitted: Collection[int] | None, goal: float) -> list[str]:
    """A table of the batches, and a line with the errors; predictions are good up to a median of `goal`."""
    rows = [["study", "batch", "runs", "trained epochs", "predicted epochs (95 %)", "error"]]
    for one in compared:
        cells = [one.study, str(one.batch), str(one.runs), one.reached.text, one.predicted.text()]
        rows.append([*cells, f"{one.error:+.0%}"])
    error, worst = median_error(compared), max(abs(one.error) for one in compared)
    verdict = "good" if error <= goal else f"off by more than {goal:.0%}"
    known = [one for one in compared if math.isfinite(one.predicted.low)]
    bounds = f"{sum(one.inside for one in known)} of {len(known)} within the interval" if known else "no intervals"
    how = "each batch by the others" if fitted is None else f"fitted to batches of {', '.join(map(str, fitted))}"
    return [
        *table(rows, "lrrrrr"),
        f"batches predicted: {len(compared)}, {how}: "
        f"median error {error:.0%}, largest {worst:.0%}; {bounds}; {verdict}",
    ]
