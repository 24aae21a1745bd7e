"""metrics.jsonl as it is read back; no MPI."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mpiml import documents
from mpiml.errors import OutputError
from mpiml.run.directory import write_atomically
from mpiml.run.result import LINE_KINDS


def content_of(metrics: Path) -> bytes:
    """The whole file, however long it is; nothing if there is none. Raises OutputError if it cannot be read."""
    try:
        return documents.read(metrics, math.inf)
    except OutputError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return b""
        raise


def lines(metrics: Path, content: bytes) -> tuple[list[tuple[bytes, dict[str, Any]]], list[str]]:
    """The lines of a metrics file, each as it stands and what it says, and what is wrong with others.

    A last line without an end is left out without a word: a job that was killed while it wrote leaves one.
    """
    raw = content.split(b"\n")
    good, problems = [], []
    for number, line in enumerate(raw, 1):
        origin = f"{metrics}, line {number},"
        try:
            entry = documents.check_fields(documents.from_json(line, origin), LINE_KINDS, origin, ("step",))
            good.append((line + b"\n", entry))
        except OutputError as error:
            if number < len(raw):
                problems.append(str(error))
    return good, problems


def entries(metrics: Path) -> list[dict[str, Any]]:
    """What the lines of a metrics file say, if there is one; damaged ones are left out."""
    return [entry for _, entry in lines(metrics, content_of(metrics))[0]]


def missing(entries: list[dict[str, Any]], step: int, log_every: int, eval_every: int) -> list[int]:
    """The steps whose lines are missing at the end of a metrics file, though they were written before the checkpoint of
    `step`.

    Whether it had the evaluation of `step` itself is not known. In an earlier job lines may have been further apart.
    """
    lost: set[int] = set()
    for every, evaluations, last in ((log_every, False, step), (eval_every, True, step - 1)):
        there = [entry["step"] for entry in entries if entry["step"] <= last and ("evaluation" in entry) == evaluations]
        *_, before, newest = 0, 0, *there
        if every and last - newest >= max(every, newest - before):
            lost.update(range((newest // every + 1) * every, last + 1, every))
    return sorted(lost)


def cut(metrics: Path, step: int, last: int, eval_every: int, log_every: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Remove from a metrics file what a run that goes on after `step` will write again, and damaged lines.

    Lines that were written at `step` only because the run ended there go too if it is now to end at a later `last`
    step: a run that was so long from the start has none. The file is replaced at once, or not at all.

    Returns what the lines that stay say, and what a person should know of damaged ones.
    """

    def stays(entry: dict[str, Any]) -> bool:
        if entry["step"] != step:
            return bool(entry["step"] < step)
        every = eval_every if "evaluation" in entry else log_every
        return step == last or (every > 0 and step % every == 0)

    content = content_of(metrics)
    there, problems = lines(metrics, content)
    kept = [(line, entry) for line, entry in there if stays(entry)]
    if (left := b"".join(line for line, _ in kept)) != content:
        write_atomically(metrics, left)
    more = f" and so are {len(problems) - 1} more lines" if len(problems) > 1 else ""
    notes = [f"warning: {problems[0]}{more}; the rest is kept"] if problems else []
    return [entry for _, entry in kept], notes


def last_known(entries: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """The last loss and the last score in a metrics file, under the names of result.json."""
    known: dict[str, Any] = {}
    for entry in entries:
        if "evaluation" in entry:
            scored = entry["evaluation"]
            known |= {metric: scored.get(metric), "test_loss": scored.get("loss")}
        else:
            known["loss"] = entry.get("loss")
    return known
