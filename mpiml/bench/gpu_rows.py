"""The rows of the check on a GPU: what was looked at, what came out, and whether that is what it should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mpiml.bench.rows import Ratio

SPEED = 0.90  # of plain PyTorch's, which a run on one GPU must reach
COPY = 0.90  # of the rate of a copy by PyTorch between page-locked memory and the device


@dataclass(frozen=True)
class Check:
    """A row.

    Attributes:
        part: of the check, as --only has it.
        value: what came out, in words.
        mark: what should come out; empty where the row only tells.
        reached: whether it did; None without a mark.
        correctness: whether the check fails if this row does: it is about bits, not about speed.
        figures: numbers for programs.
    """

    part: str
    text: str
    value: str
    mark: str = ""
    reached: bool | None = None
    correctness: bool = False
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        return "" if self.reached is None else "reached" if self.reached else "MISSED"


def same(part: str, text: str, difference: str) -> Check:
    """A row of two runs that should be the same; `difference` between them, empty if there is none."""
    return Check(part, text, difference or "the same", "the same bits", not difference, correctness=True)


def failed(part: str, text: str, reason: str) -> Check:
    """A row that could not be had. That counts as a failure, for whatever ends a job here may end a user's."""
    return Check(part, text, reason, "a result", False, correctness=True)


def speed(part: str, text: str, ratio: Ratio, more: str, at_least: float | None, **figures: float) -> Check:
    """A row of a ratio with its spread, and `more` in words."""
    value = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}){more}"
    figures = {"median": ratio.median, "low": ratio.low, "high": ratio.high} | figures
    if at_least is None:
        return Check(part, text, value, figures=figures)
    return Check(part, text, value, f"at least {at_least:.2f}", ratio.median >= at_least, figures=figures)


def table(checks: Sequence[Check]) -> str:
    """The rows as Markdown."""
    lines = ["| what | result | mark |", "|---|---|---|"]
    part = ""
    for check in checks:
        if check.part != part:
            part = check.part
            lines.append(f"| **{part}** | | |")
        lines.append(f"| {check.text} | {check.value} | {f'{check.mark} {check.verdict}'.strip()} |")
    return "\n".join(lines) + "\n"
