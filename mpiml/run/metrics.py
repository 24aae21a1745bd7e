"""metrics.jsonl as it is read back; no MPI."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mpiml import documents
from mpiml.errors import OutputError

ENTRY = {"step": int, "evaluation": dict[str, float | None], "loss": float | None}  # what a line may hold, and more


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
            entry = documents.check_fields(documents.from_json(line, origin), ENTRY, origin, ("step",))
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
