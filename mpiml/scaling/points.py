"""The points of a scaling study: which grids are measured, with which batch and micro-batches; no MPI."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpiml import documents
from mpiml.errors import ConfigError, OutputError

STUDY = "study.json"  # of a study's directory: what it asks for
POINTS = "points"  # and the directory of what was measured, a file for each repeat
TRAINING = "training"  # that of training runs to a target
JOBS = "jobs"  # and that of SLURM jobs and their logs
ASKED = {"mode", "settings", "points"}  # what STUDY holds at least
FOUND = {"step_seconds", "shares", "rows", "nodes", "cores", "threads", "environment"}  # and a file in POINTS


@dataclass(frozen=True, order=True)
class Point:
    """A grid and what it trains on in a step: `batch` rows in all, in `microbatches` parts.

    `extra` points are there only to compare with: one rank at other numbers of micro-batches.
    """

    ranks: int
    stages: int
    batch: int
    microbatches: int
    extra: bool = False

    @property
    def name(self) -> str:
        """Of its files."""
        return f"ranks-{self.ranks:05d}_stages-{self.stages}_batch-{self.batch}_microbatches-{self.microbatches}"

    def settings(self) -> list[str]:
        """Flags of mpiml.train."""
        return [f"--pipe={self.stages}", f"--batch={self.batch}", f"--microbatches={self.microbatches}"]


def plan(mode: str, ranks: Sequence[int], pipes: Sequence[int], batch: int, microbatches: int | None) -> list[Point]:
    """All points of a study, in order.

    Args:
        mode: "strong": the same batch on any number of ranks, or "weak": the same rows for each rank.
        ranks, pipes: numbers of ranks, and of stages where they divide the ranks.
        batch: rows of a step; of each rank's part of one in weak scaling.
        microbatches: of a step; None for what mpiml.train would choose on the grid.

    Raises ConfigError if a number of ranks cannot be used.
    """
    points = []
    for count in ranks:
        fitting = [stages for stages in pipes if count % stages == 0] if count > 1 else [1]
        if not fitting:
            raise ConfigError(f"--ranks {count}: none of --pipes {_text(pipes)} divides it; add 1 to --pipes, say")
        points += [_point(mode, count, stages, batch, microbatches) for stages in fitting]
    if microbatches and microbatches < max(point.ranks // point.stages for point in points):
        raise ConfigError(f"--microbatches {microbatches}: fewer than the replicas of the largest point")
    seen = set(points)
    return points + [point for point in _bases(mode, points, batch) if not _measured(point, seen)]


def _point(mode: str, ranks: int, stages: int, batch: int, microbatches: int | None) -> Point:
    rows = batch * (ranks if mode == "weak" else 1)
    replicas = ranks // stages
    chosen = microbatches or (replicas if stages == 1 else min(2 * ranks, rows))
    if chosen > rows:
        raise ConfigError(f"--ranks {ranks}: a batch of {rows} rows cannot be cut into {chosen} micro-batches")
    return Point(ranks, stages, rows, chosen)


def _bases(mode: str, points: Sequence[Point], batch: int) -> Iterator[Point]:
    """One rank with each number of micro-batches that it could be compared at: its best is the honest base."""
    for microbatches in sorted({1, *(same_parts(mode, point) for point in points)}):
        yield Point(1, 1, batch, microbatches, extra=True)


def same_parts(mode: str, point: Point) -> int:
    """The micro-batches of one rank that are as large as this point's."""
    return max(point.microbatches // point.ranks, 1) if mode == "weak" else point.microbatches


def _measured(point: Point, seen: set[Point]) -> bool:
    return Point(point.ranks, point.stages, point.batch, point.microbatches) in seen


def runs(points: Sequence[Point], repeats: int) -> list[tuple[Point, int]]:
    """Every repeat of every point, in an order drawn once for all, so that a drifting machine does not look like
    scaling."""
    order = [(point, repeat) for point in points for repeat in range(repeats)]
    random.Random(0).shuffle(order)
    return order


def read(directory: Path) -> dict[str, Any]:
    """What a study asks for, with its points. Raises ConfigError if there is none, and OutputError for a file that is
    damaged."""
    path = directory / STUDY
    if not path.exists():
        raise ConfigError(f"{directory} holds no study: python -m mpiml.scaling run --out {directory} makes one")
    about = _object(path, ASKED)
    try:
        return {**about, "points": [Point(**point) for point in about["points"]]}  # type: ignore[dict-item, index]
    except TypeError:
        again = "without it, the command that made the study goes on with what is there"
        raise OutputError(f"{path} is damaged; {again}") from None


def measured(path: Path) -> dict[str, Any] | None:
    """What a repeat of a point found; None if there is nothing, or not the whole of it."""
    return _object(path, FOUND)


def _object(path: Path, keys: set[str]) -> dict[str, Any] | None:
    """What a JSON file holds, if it is an object that has these keys."""
    try:
        found = documents.from_json(documents.read(path), str(path))
    except OutputError:
        return None
    return found if isinstance(found, dict) and keys <= found.keys() else None


def _text(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
