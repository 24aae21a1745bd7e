"""metrics.jsonl read back, and cut where a run resumes; no MPI."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from mpiml import documents
from mpiml.errors import OutputError
from mpiml.run.directory import write_atomically
from mpiml.run.result import LINE_KINDS

LARGE = ("seconds", "workers")  # fields that take most of the memory of a line, and that no run goes on with


def content_of(metrics: Path) -> bytes:
    """The whole file, however long; empty if there is none. Raises OutputError if it cannot be read."""
    try:
        return documents.read(metrics, math.inf)
    except OutputError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return b""
        raise


def each(metrics: Path, content: bytes) -> Iterator[tuple[bytes, dict[str, Any] | None, str | None]]:
    """The lines of a metrics file one by one, as bytes: with what a good one holds, a run.result.Line, or with a
    message about another.

    A last line without an end gets no message: a job that was killed while it wrote leaves one.
    """
    number, first = 0, 0
    while first < len(content):
        number, end = number + 1, content.find(b"\n", first)
        line, origin = content[first:] if end < 0 else content[first:end], f"{metrics}, line {number},"
        first = len(content) if end < 0 else end + 1
        try:
            yield line, documents.check_fields(documents.from_json(line, origin), LINE_KINDS, origin, ("step",)), None
        except OutputError as error:
            if end >= 0:
                yield line, None, str(error)


def lines(
    metrics: Path, content: bytes, without: Collection[str] = ()
) -> tuple[list[tuple[bytes, dict[str, Any]]], list[str]]:
    """The good lines of a metrics file, each as bytes and as a run.result.Line but for some fields, and a message for
    each other line; see `each`."""
    good, problems = [], []
    for line, entry, problem in each(metrics, content):
        if entry is not None:
            good.append((line + b"\n", {name: value for name, value in entry.items() if name not in without}))
        if problem is not None:
            problems.append(problem)
    return good, problems


def missing(entries: list[dict[str, Any]], step: int, log_every: int, eval_every: int) -> list[int]:
    """The steps whose lines are missing at the end of a metrics file, though they were written before the checkpoint of
    `step`.

    The evaluation of `step` follows the checkpoint and does not count. Earlier jobs may have written fewer lines.
    """
    lost: set[int] = set()
    for every, evaluations, last in ((log_every, False, step), (eval_every, True, step - 1)):
        steps = [entry["step"] for entry in entries if entry["step"] <= last and ("evaluation" in entry) == evaluations]
        *_, before, newest = 0, 0, *steps
        if every and last - newest >= max(every, newest - before):
            lost.update(range((newest // every + 1) * every, last + 1, every))
    return sorted(lost)


def cut_after(
    metrics: Path, step: int, logged: bool, scored: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Remove from a metrics file damaged lines and those that a run resumed after `step` will write again.

    The line of `step` and its evaluation are removed, too, unless it is to be `logged` and `scored`: they may have been
    written only because the run ended there, and a longer one has none. The file is replaced atomically.

    Returns the entries of all good lines, of those that stay, and warnings about damaged ones; all without the fields
    in LARGE.
    """

    def stays(entry: dict[str, Any]) -> bool:
        if entry["step"] != step:
            return bool(entry["step"] < step)
        return scored if "evaluation" in entry else logged

    content = content_of(metrics)
    good, problems = lines(metrics, content, LARGE)
    kept = [(line, entry) for line, entry in good if stays(entry)]
    if (left := b"".join(line for line, _ in kept)) != content:
        write_atomically(metrics, left)
    more = f" and so are {len(problems) - 1} more lines" if len(problems) > 1 else ""
    notes = [f"warning: {problems[0]}{more}; the rest is kept"] if problems else []
    return [entry for _, entry in good], [entry for _, entry in kept], notes


def last_known(entries: list[dict[str, Any]], metric: str, rows: str = "test") -> dict[str, Any]:
    """The last loss of a step, and loss and score of an evaluation, in a metrics file, as fields of result.json; `rows`
    are what was evaluated, test or validation."""
    known: dict[str, Any] = {}
    for entry in entries:
        if "evaluation" in entry:
            evaluation = entry["evaluation"]
            known |= {metric: evaluation.get(metric), f"{rows}_loss": evaluation.get("loss")}
        else:
            known["loss"] = entry.get("loss")
            known |= {name: entry[name] for name in ("noise_scale",) if name in entry}
    return known


def scores(entries: list[dict[str, Any]], name: str) -> list[tuple[int, float | None]]:
    """(step, score of that name) of every evaluation in a metrics file."""
    return [(entry["step"], entry["evaluation"].get(name)) for entry in entries if "evaluation" in entry]


def gradient_noise(entries: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(variance, square) of the gradient in every line of a metrics file that has them."""
    pairs = [(entry.get("gradient_variance"), entry.get("gradient_square")) for entry in entries]
    return [(variance, square) for variance, square in pairs if variance is not None and square is not None]
