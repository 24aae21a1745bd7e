"""The law of epochs over batches, compared with training runs that it was not fitted to; no MPI."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpiml.command import plural, table
from mpiml.errors import ConfigError
from mpiml.scaling.epochs import Reached
from mpiml.scaling.laws import Interval
from mpiml.scaling.points import Point, read_study
from mpiml.scaling.trained import law_of, missed, training_runs


@dataclass(frozen=True)
class HeldOut:
    """A training run, and the epochs that the law fitted to other batches predicts for it."""

    study: str
    point: Point
    reached: Reached
    predicted: Interval

    @property
    def error(self) -> float:
        """Of the prediction, relative to the middle between the run's two evaluations."""
        return self.predicted.value / self.reached.epochs - 1

    @property
    def inside(self) -> bool:
        """Whether the run may have reached the target within the interval."""
        return self.predicted.low <= self.reached.by and self.reached.after <= self.predicted.high


def held_out(directory: Path, fitted: Collection[int] | None = None) -> list[HeldOut]:
    """The runs of a study's batches that always reached the target, each predicted without its batch.

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
    for run in runs:
        chosen = batches - {run.point.batch} if fitted is None else fitted
        if run.reached and run.point.batch in batches.difference(chosen):
            law = law_of(runs, study["target"], chosen)
            compared.append(HeldOut(str(directory), run.point, run.reached, law.at(run.reached.batch)))
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


def describe(compared: Sequence[HeldOut], fitted: Collection[int] | None) -> list[str]:
    """A table of the runs, and a line with the errors."""
    rows = [["study", "batch", "M", "trained epochs", "predicted epochs (95 %)", "error"]]
    for one in compared:
        epochs = f"{one.reached.after:.3g} to {one.reached.by:.3g}"
        cells = [one.study, str(one.point.batch), str(one.point.microbatches), epochs, one.predicted.text()]
        rows.append([*cells, f"{one.error:+.0%}"])
    errors = [abs(one.error) for one in compared]
    known = [one for one in compared if math.isfinite(one.predicted.low)]
    bounds = f"{sum(one.inside for one in known)} of {len(known)} within the interval" if known else "no intervals"
    how = "each batch by the others" if fitted is None else f"fitted to batches of {', '.join(map(str, fitted))}"
    return [
        *table(rows, "lrrrrr"),
        f"{plural(len(compared), 'run')} predicted, {how}: median error {statistics.median(errors):.0%}, "
        f"largest {max(errors):.0%}; {bounds}",
    ]
