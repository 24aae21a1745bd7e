"""metrics.jsonl as it is read back; no MPI."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mpiml import documents
from mpiml.errors import OutputError

ENTRY = {"step": int, "evaluation": dict[str, float | None], "loss": float | None}  # what a line may hold, and more


def content_of(metrics: Path) -> bytes:
    """The whole file, however long it is. Raises OutputError if it cannot be read."""
    return documents.read(metrics, math.inf)


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
