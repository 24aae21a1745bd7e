"""Two metrics files: the first line of equal steps whose numbers differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpiml.command import plural
from mpiml.compare.ulp import distance
from mpiml.documents import fits
from mpiml.run import metrics

TIMES = ("seconds", "samples_per_second", "time")  # fields that differ between any two jobs
SO_FAR = "noise_scale"  # a field that depends on which lines there were before
Key = tuple[int, bool]  # the step of a line, and whether it is of an evaluation
Line = Mapping[str, Any]


class Numbers(NamedTuple):
    """A field that differs: both values, None where a line says null; the distance in ULP of float64, and the relative
    one; both None where there is none."""

    name: str
    a: float | None
    b: float | None
    ulp: int | None
    relative: float | None


@dataclass
class Logged:
    """The lines of a metrics file, by key; a text about those that cannot be read, empty if all can be."""

    path: Path
    lines: dict[Key, Line]
    problem: str


@dataclass
class Compared:
    """What two metrics files have in common.

    Attributes:
        steps, evaluations: lines that both have, up to the end.
        alone: lines that only A has, and that only B has.
        differs: the key of the first line of both that differs, and the fields that do; None if there is none.
        equal_until: the step of the last line of both before it.
    """

    steps: int
    evaluations: int
    alone: tuple[int, int]
    differs: Key | None = None
    fields: list[Numbers] = field(default_factory=list)
    equal_until: int | None = None


def read(path: Path) -> Logged:
    """A metrics file, which may still be written to. Raises OutputError if it cannot be read."""
    good, problems = metrics.lines(path, metrics.content_of(path), TIMES)
    lines = {(entry["step"], "evaluation" in entry): entry for _, entry in good}
    more = f" and so are {len(problems) - 1} more lines" if len(problems) > 1 else ""
    return Logged(path, dict(sorted(lines.items())), f"{problems[0]}{more}" if problems else "")


def compare(a: Logged, b: Logged) -> Compared:
    """The lines of equal steps: all numbers in them but times."""
    both = [key for key in a.lines if key in b.lines]
    evaluations = sum(evaluation for _, evaluation in both)
    alone = len(a.lines) - len(both), len(b.lines) - len(both)
    made = Compared(len(both) - evaluations, evaluations, alone)
    alone_at = min((key for key in a.lines.keys() ^ b.lines.keys() if not key[1]), default=None)
    for key in both:
        alike = alone_at is None or key < alone_at  # both have logged the same steps before
        made.fields = [numbers for numbers in _differing(a.lines[key], b.lines[key]) if alike or numbers.name != SO_FAR]
        if made.fields:
            made.differs = key
            break
        made.equal_until = key[0]
    return made


def nothing_in_common(a: Logged, b: Logged) -> str:
    """Why two files have no line of equal steps."""
    return f"no line of {a.path} has the step of one in {b.path}: {_steps(a)}, {_steps(b)}"


def _steps(logged: Logged) -> str:
    steps = sorted({step for step, _ in logged.lines})
    if len(steps) > 4:
        return f"{plural(len(steps), 'step')}, {steps[0]}, {steps[1]}, ... {steps[-1]}"
    return f"step {', '.join(map(str, steps))}" if steps else "no steps at all"


def _differing(a: Line, b: Line) -> Iterator[Numbers]:
    """The fields of both lines whose values are not equal."""
    one, other = dict(_numbers(a)), dict(_numbers(b))
    for name, value in one.items():
        if name in other and not _same(value, other[name]):
            yield _pair(name, value, other[name])


def _same(a: float | None, b: float | None) -> bool:
    """Whether two values have the same bits, as far as JSON says them: 0 has a sign."""
    return a == b and (a is None or b is None or math.copysign(1, a) == math.copysign(1, b))


def _numbers(line: Line, before: str = "") -> Iterator[tuple[str, float | None]]:
    """The numbers of a line, by name: those of an evaluation as "evaluation.loss"."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{before}{name}.")
        elif value is None or fits(value, float):
            yield before + name, value


def _pair(name: str, a: float | None, b: float | None) -> Numbers:
    if a is None or b is None:
        return Numbers(name, a, b, None, None)
    if isinstance(a, int) and isinstance(b, int):
        return Numbers(name, a, b, None, _relative(a, b))
    return Numbers(name, a, b, distance(np.float64(a), np.float64(b)), _relative(a, b))


def _relative(a: float, b: float) -> float | None:
    return abs(a - b) / most if (most := max(abs(a), abs(b))) else None
