"""The MPI jobs of a study: repeats of points, which are timed, and training runs to a target; no MPI."""

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
from mpiml.scaling.points import POINTS, TRAINING, Point, read_repeat, shuffled, unmeasured

EVALUATIONS = 50  # of a training run, at least: so the steps to a target are known to a fiftieth of the run


@dataclass(frozen=True)
class StudyJob(ABC):
    """A job on the ranks of a point.

    Attributes:
        repeat: which of the study's repeats it belongs to.
        path: the file, or the run directory, that it writes.
        arguments: of the Python that each rank runs.
    """

    point: Point
    repeat: int
    path: Path
    arguments: Sequence[str]

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether its result is there, so that it need not run again."""

    @abstractmethod
    def summary(self) -> str:
        """Its result in a few words."""


class TimedRepeat(StudyJob):
    """A repeat of a point, by mpiml.scaling.timing."""

    @property
    def done(self) -> bool:
        return read_repeat(self.path) is not None

    def summary(self) -> str:
        result = read_repeat(self.path)
        assert result, "it is done"
        median = statistics.median(result["step_seconds"])
        return f"{median * 1e3:.2f} ms a step, {result['rows'] / median:,.0f} samples/s"


class TrainingRun(StudyJob):
    """A training run to the last epoch, by mpiml.train."""

    @property
    def done(self) -> bool:
        return read_result(self.path).get("status") == "done"

    def summary(self) -> str:
        metric, scores = evaluations(self.path)
        step, score = max(scores, key=lambda scored: scored[1])
        return f"trained, {metric} at best {score:.4f}, after {step} steps"


def jobs_of(
    directory: Path,
    points: Sequence[Point],
    repeats: int,
    timed: tuple[int, int],
    config: Config,
    settings: Sequence[str],
    rows: int,
    epochs: int | None,
    trainings: int = 1,
) -> list[StudyJob]:
    """All jobs of a study: the timed repeats in the order of points.shuffled, then the training runs.

    Args:
        timed: steps to warm up, and steps to time.
        config, settings: of mpiml.train, parsed and as they were given.
        rows: rows of the training set.
        epochs: of training runs; None for no such runs.
        trainings: runs for each batch and number of micro-batches; the first has the seed of `config`, the next one
            more, and so on.

    Raises ConfigError if there are to be training runs without evaluations.
    """
    jobs: list[StudyJob] = []
    for point, repeat in shuffled([point for point in points if point.timed], repeats):
        path = directory / POINTS / f"{point.name}_{repeat}.json"
        arguments = ["-m", "mpiml.scaling.timing", str(path), *map(str, timed), *unmeasured(settings), *point.flags()]
        jobs.append(TimedRepeat(point, repeat, path, arguments))
    if not epochs:
        return jobs
    if not config.eval_every:
        raise ConfigError("--target needs evaluations: leave out --eval-every 0")
    for point in points_to_train(points):
        if "eval_every" in (config.given or ()):  # after as many rows, whatever the batch
            every = max(1, config.eval_every * config.batch // point.batch)
        else:
            every = max(1, epochs * -(-rows // point.batch) // EVALUATIONS)
        suited = settings if point.microbatches > 1 else unmeasured(settings)
        flags = f"--epochs={epochs} --eval-every={every} --save-every=0 --quiet --resume".split()
        for offset in range(trainings):
            path = run_directory(directory, point, epochs, offset)
            own = [*point.flags(), f"--seed={config.seed + offset}", f"--out={path}"]
            jobs.append(TrainingRun(point, 0, path, ["-m", "mpiml.train", *suited, *flags, *own]))
    return jobs


def points_to_train(points: Sequence[Point]) -> list[Point]:
    """For each batch and number of micro-batches the largest point: all points that share both end with the same
    weights, bit for bit."""
    asked = sorted(point for point in points if not point.extra)
    return list({(point.batch, point.microbatches): point for point in asked}.values())


def run_directory(directory: Path, point: Point, epochs: int, offset: int = 0) -> Path:
    """The run directory, in a study's, of the training run that shares a point's batch and micro-batches; `offset` is
    added to the seed."""
    name = f"batch-{point.batch}_microbatches-{point.microbatches}_epochs-{epochs}"
    return directory / TRAINING / (f"{name}_seed-{offset}" if offset else name)


def evaluations(run: Path) -> tuple[str, list[tuple[int, float]]]:
    """The metric's name, and (step, score) of every evaluation of a run."""
    path = run / METRICS
    entries, problems = lines(path, content_of(path))
    scored = [(line["step"], line["evaluation"]) for _, line in entries if "evaluation" in line]
    if problems or not scored:
        raise OutputError(problems[0] if problems else f"{path} has no evaluation")
    metric, *others = {name for _, scores in scored for name in scores.keys() - EVALUATION} or {""}
    if others or scored[0][0] < 1 or not all(metric in scores for _, scores in scored):
        raise OutputError(f"{path} is damaged: its evaluations are not of one metric, after steps from 1 on")
    return metric, [(step, -math.inf if scores[metric] is None else scores[metric]) for step, scores in scored]
