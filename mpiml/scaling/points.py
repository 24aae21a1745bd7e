"""The points of a scaling study: the grids to measure, each with its batch and micro-batches; no MPI."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpiml import documents
from mpiml.errors import ConfigError, OutputError
from mpiml.training.sharing import usual

# What a study's directory holds:
STUDY = "study.json"  # its settings and points
POINTS = "points"  # a file for each repeat of a point
TRAINING = "training"  # a run directory for each training run to a target
JOBS = "jobs"  # SLURM scripts and their logs
STUDY_KEYS = {"mode", "settings", "points"}  # that STUDY has at least,
STUDY_KINDS = {
    "mode": str,
    "settings": list[str],
    "points": list[dict[str, int | bool]],
    "repeats": int,
    "trainings": int,
    "target": float | None,
    "max_epochs": int | None,
    "rows": int | None,
}
REPEAT_KEYS = {"step_seconds", "shares", "rows", "nodes", "cores", "threads", "environment"}  # and a file in POINTS


@dataclass(frozen=True, order=True)
class Point:
    """A grid, with the rows and the micro-batches of its step.

    `extra` points are only to compare with: one rank with other numbers of micro-batches. Those that are not `timed`
    only train to a target.
    """

    ranks: int
    stages: int
    batch: int
    microbatches: int
    extra: bool = False
    timed: bool = True

    @property
    def name(self) -> str:
        """The beginning of its files' names."""
        return f"ranks-{self.ranks:05d}_stages-{self.stages}_batch-{self.batch}_microbatches-{self.microbatches}"

    @property
    def grid(self) -> str:
        """Stages x replicas, as text."""
        return f"{self.stages} x {self.ranks // self.stages}"

    def flags(self) -> list[str]:
        """Its flags of mpiml.train."""
        return [f"--pipe={self.stages}", f"--batch={self.batch}", f"--microbatches={self.microbatches}"]


def points_of(
    mode: str,
    ranks: Sequence[int],
    pipes: Sequence[int],
    batch: int,
    microbatches: int | None,
    workers: int | None = None,
    leaf: int = 1,
) -> list[Point]:
    """All points of a study, in order.

    Args:
        mode: "strong": the same batch on any number of ranks, or "weak": the same rows for each rank.
        ranks, pipes: numbers of ranks, and of stages, each used where it divides the ranks.
        batch: rows of a step; in weak scaling, rows for each rank.
        microbatches: micro-batches of a step; None for the number that mpiml.train chooses on the grid.
        workers: how many there are, if their number is given; each needs equally many micro-batches.
        leaf: micro-batches of a leaf, of which each replica and worker has whole ones.

    Raises ConfigError if a number of ranks cannot be used.
    """
    points = []
    for count in ranks:
        fitting = [stages for stages in pipes if count % stages == 0] if count > 1 else [1]
        if not fitting:
            listed = ",".join(map(str, pipes))
            raise ConfigError(f"--ranks {count}: none of --pipes {listed} divides it; add 1 to --pipes")
        for stages in fitting:
            rows = batch * (count if mode == "weak" else 1)
            chosen = microbatches or usual(stages, count // stages, workers, leaf, rows)
            if chosen > rows:
                raise ConfigError(f"--ranks {count}: a batch of {rows} rows cannot be cut into {chosen} micro-batches")
            points.append(Point(count, stages, rows, chosen))
    if microbatches and microbatches // leaf < max(point.ranks // point.stages for point in points):
        of_leaf = f" --leaf {leaf}" if leaf > 1 else ""
        raise ConfigError(f"--microbatches {microbatches}{of_leaf}: fewer than the replicas of the largest point")
    unit = (workers or 1) * leaf
    alone = {unit, *(same_parts(mode, point) for point in points)}
    bases = (Point(1, 1, batch, count) for count in sorted(alone) if count % unit == 0)
    return points + [replace(point, extra=True) for point in bases if point not in points]


def batches_to_train(batches: Sequence[int], points: Sequence[Point]) -> list[Point]:
    """Points that only train, one for each batch: on the largest grid of a study's points, with its micro-batches.

    Raises ConfigError if a batch has fewer rows than that.
    """
    largest = max(point for point in points if not point.extra)
    for batch in batches:
        if batch < largest.microbatches:
            cut = f"a batch of {batch} rows cannot be cut into {largest.microbatches} micro-batches"
            raise ConfigError(f"--batches {batch}: {cut}, as on {largest.ranks} ranks")
    known = {(point.batch, point.microbatches) for point in points if not point.extra}
    chosen = (replace(largest, batch=batch, timed=False) for batch in batches)
    return [point for point in chosen if (point.batch, point.microbatches) not in known]


def same_parts(mode: str, point: Point) -> int:
    """How many micro-batches one rank needs for them to be as large as this point's."""
    return max(point.microbatches // point.ranks, 1) if mode == "weak" else point.microbatches


def shuffled(points: Sequence[Point], repeats: int) -> list[tuple[Point, int]]:
    """Every repeat of every point in a random order, the same each time: so a machine that becomes slower in the course
    of a study does not look like scaling."""
    order = [(point, repeat) for point in points for repeat in range(repeats)]
    random.Random(0).shuffle(order)
    return order


def unmeasured(settings: Sequence[str]) -> list[str]:
    """The settings of a study's jobs without --noise-scale: of no use to a job that is timed, and refused with a single
    micro-batch."""
    return [word for word in settings if word != "--noise-scale"]


def read_study(directory: Path) -> dict[str, Any]:
    """The content of a study's STUDY file, with `points` as Points. Raises ConfigError if there is none, OutputError if
    it is damaged."""
    path = directory / STUDY
    if not path.exists():
        raise ConfigError(f"{directory} holds no study: python -m mpiml.scaling run --out {directory} makes one")
    remedy = "delete it, and the command that made the study goes on with the points that are measured"
    content = _read(path, STUDY_KEYS)
    try:
        if content is None:
            raise OutputError(f"{path} is damaged")
        documents.check_fields(content, STUDY_KINDS, str(path))
        if content.get("rows") is not None and content["rows"] < 1:
            raise OutputError(f"{path} is damaged: rows is {content['rows']}, but a training set has at least 1")
        return {**content, "points": [Point(**point) for point in content["points"]]}
    except TypeError:
        raise OutputError(f"{path} is damaged: points have other fields; {remedy}") from None
    except OutputError as error:
        raise OutputError(f"{error}; {remedy}") from None


def read_repeat(path: Path) -> dict[str, Any] | None:
    """What was measured in a repeat of a point; None if the file is missing or damaged."""
    return _read(path, REPEAT_KEYS)


def _read(path: Path, keys: set[str]) -> dict[str, Any] | None:
    """The object that a JSON file holds; None if it cannot be read or lacks one of the keys."""
    try:
        content = documents.from_json(documents.read(path), str(path))
    except OutputError:
        return None
    return content if isinstance(content, dict) and keys <= content.keys() else None
