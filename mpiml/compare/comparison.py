"""The comparison of two runs, checkpoints or metrics files, and its verdict."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mpiml.compare import lines, sides, weights
from mpiml.compare.causes import Causes, explain
from mpiml.compare.sides import LINES, Side
from mpiml.compare.weights import Weights
from mpiml.errors import OutputError

EQUAL, DIFFERENT, ERROR = 0, 1, 2  # exit codes


@dataclass
class Comparison:
    """What has been compared.

    Attributes:
        lines: None if no lines are of equal steps.
        problems: what could not be compared because it is damaged.
        notes: what else was not compared, and why; what could not be read of settings and environment.
    """

    a: Side
    b: Side
    lines: lines.Compared | None
    weights: Weights
    causes: Causes
    problems: list[str]
    notes: list[str]

    @property
    def different(self) -> bool:
        """Whether anything that has been compared differs."""
        return self.weights.different or (self.lines is not None and self.lines.differs is not None)

    @property
    def exit_code(self) -> int:
        """EQUAL, DIFFERENT, or ERROR if what could be read is equal, but not all could be."""
        return DIFFERENT if self.different else ERROR if self.problems else EQUAL


def compare(first: Path, second: Path, quick: bool = False) -> Comparison:
    """Compare what is at two paths; `quick`: equal checkpoints are not read to verify them.

    Raises OutputError if one cannot be read, or if they have nothing in common.
    """
    a, b = sides.opened("A", first), sides.opened("B", second)
    problems, notes, logged = list[str](), [*a.notes, *b.notes], None
    if a.metrics and b.metrics:
        one, other = lines.read(a.metrics), lines.read(b.metrics)
        problems += [text for text in (one.problem, other.problem) if text]
        logged = lines.compare(one, other)
        if not logged.steps + logged.evaluations:
            logged = None
            notes.append(lines.nothing_in_common(one, other))
    kept = weights.compare(a, b, quick)
    problems += kept.problems
    if not (kept.known or kept.problems) and LINES not in (a.kind, b.kind):
        notes.append(weights.nothing_in_common(a, b))
    if not (logged or kept.known):
        why = [*problems, *notes] or [f"{side.path} has {_kinds(side)}" for side in (a, b)]
        raise OutputError(f"nothing to compare: {'; '.join(why)}")
    return Comparison(a, b, logged, kept, explain(a, b), problems, notes)


def _kinds(side: Side) -> str:
    kinds = [*(["metrics"] if side.metrics else []), *(["checkpoints"] if side.checkpoints else [])]
    return " and ".join(kinds) or "neither metrics nor checkpoints"
