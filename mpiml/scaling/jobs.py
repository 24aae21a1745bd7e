"""The MPI jobs of a study, one after the other: repeats of points that are timed, and training runs; no MPI."""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpiml.config import Config
from mpiml.errors import ConfigError, OutputError
from mpiml.run.directory import METRICS
from mpiml.run.metrics import content_of, lines
from mpiml.run.result import EVALUATION, read_result
from mpiml.scaling.points import POINTS, TRAINING, Point, measured, runs

LOOKS = 50  # evaluations of a training run, at least: steps to a target are known to one part in so many


@dataclass(frozen=True)
class Task(ABC):
    """A job on the ranks of a point.

    Attributes:
        repeat: of the jobs of so many ranks, the one that this belongs to.
        path: where it leaves what it found.
        words: what python is to run.
    """

    point: Point
    repeat: int
    path: Path
    words: Sequence[str]

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether it needs not be run again."""

    @abstractmethod
    def told(self) -> str:
        """What it found, in a few words."""


class Timing(Task):
    """A repeat of a point, by mpiml.scaling.timing."""

    @property
    def done(self) -> bool:
        return measured(self.path) is not None

    def told(self) -> str:
        found = measured(self.path)
        assert found, "it is done"
        middle = statistics.median(found["step_seconds"])
        return f"{middle * 1e3:.2f} ms a step, {found['rows'] / middle:,.0f} samples/s"


class Training(Task):
    """A training run to the last epoch, by mpiml.train."""

    @property
    def done(self) -> bool:
        return read_result(self.path).get("status") == "done"

    def told(self) -> str:
        metric, scores = evaluations(self.path)
        step, score = max(scores, key=lambda scored: scored[1])
        return f"trained, test {metric} at best {score:.4f}, after {step} steps"


def tasks(
    directory: Path,
    points: Sequence[Point],
    repeats: int,
    timed: tuple[int, int],
    config: Config,
    settings: Sequence[str],
    rows: int,
    epochs: int | None,
) -> list[Task]:
    """All jobs of a study: what is timed in the order of points.runs, then what is trained.

    Args:
        timed: steps that do not count, and steps that do.
        config, settings: of mpiml.train, parsed and as they were given.
        rows: that there are to train on.
        epochs: of training runs; None for no such runs.

    Raises ConfigError if training runs are asked for and evaluations are not.
    """
    found: list[Task] = []
    for point, repeat in runs(points, repeats):
        path = directory / POINTS / f"{point.name}_{repeat}.json"
        words = ["-m", "mpiml.scaling.timing", str(path), *map(str, timed), *settings, *point.settings()]
        found.append(Timing(point, repeat, path, words))
    if not epochs:
        return found
    if not config.eval_every:
        raise ConfigError("--target needs evaluations: leave out --eval-every 0")
    for point in trained(points):
        path = directory / TRAINING / training(point, epochs)
        if "eval_every" in (config.given or ()):  # after as many rows, whatever the batch
            every = max(1, config.eval_every * config.batch // point.batch)
        else:
            every = max(1, epochs * -(-rows // point.batch) // LOOKS)
        run = [f"--epochs={epochs}", f"--eval-every={every}", "--save-every=0", "--quiet", "--resume", f"--out={path}"]
        found.append(Training(point, 0, path, ["-m", "mpiml.train", *settings, *point.settings(), *run]))
    return found


def trained(points: Sequence[Point]) -> list[Point]:
    """The points to train on: the largest of those that end with the same weights, bit for bit, because batch and
    micro-batches are the same."""
    asked = sorted(point for point in points if not point.extra)
    return list({(point.batch, point.microbatches): point for point in asked}.values())


def training(point: Point, epochs: int) -> str:
    """The directory of the training run that speaks for a point."""
    return f"batch-{point.batch}_microbatches-{point.microbatches}_epochs-{epochs}"


def evaluations(run: Path) -> tuple[str, list[tuple[int, float]]]:
    """The metric's name, and (step, test score) of every evaluation of a run."""
    path = run / METRICS
    entries, problems = lines(path, content_of(path))
    found = [(line["step"], line["evaluation"]) for _, line in entries if "evaluation" in line]
    if problems or not found:
        raise OutputError(problems[0] if problems else f"{path} has no evaluation")
    (metric,) = found[0][1].keys() - EVALUATION
    return metric, [
        (step, -math.inf if evaluation[metric] is None else evaluation[metric]) for step, evaluation in found
    ]
