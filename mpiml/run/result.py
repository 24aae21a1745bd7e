"""The fields of result.json and metrics.jsonl, and how result.json is read and written; no MPI."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Required, TypedDict, get_type_hints

from mpiml.documents import finite
from mpiml.errors import OutputError
from mpiml.run.directory import RESULT, read_fields, write_atomically


class Result(TypedDict, total=False):
    """result.json: what the last job of a run has done. The last test score stands beside the fields, under the
    metric's name.

    Attributes:
        status: running, done, stopped or failed.
        exit_code: of the job; None while it is running.
        reason: why it stopped or failed.
        rank: the rank that failed, if it was one.
        step: the last one; `saved` is that of the newest checkpoint.
        ranks, pipe, microbatches: the job's layout.
        loss: of the last step, the mean over its rows; `test_loss` is that of the last evaluation.
        weights_sha256: digest of the weights after the last step.
        seconds: how long the job took.
    """

    status: Required[str]
    exit_code: int | None
    reason: str | None
    rank: int | None
    traceback: str
    step: int
    saved: int
    ranks: int
    pipe: int
    microbatches: int | None
    loss: float | None
    test_loss: float | None
    weights_sha256: str
    samples_per_second: float | None
    seconds: float


class Line(TypedDict, total=False):
    """A line of metrics.jsonl: of a step, with the score on its rows under the metric's name, or of an evaluation.

    Attributes:
        loss: the mean over the step's rows.
        gradient_norm: before clipping; None if it is not finite.
        seconds: for each of clock.SHARES the least and the most of any rank since the last line, and the slowest rank.
        evaluation: an `Evaluation`, with the score under the metric's name.
    """

    step: Required[int]
    epoch: int
    loss: float | None
    learning_rate: float
    gradient_norm: float | None
    samples_per_second: float
    seconds: dict[str, Any]
    evaluation: dict[str, float | None]


class Evaluation(TypedDict):
    """The fields of an evaluation in metrics.jsonl: the mean loss, and how many test rows there are."""

    loss: float
    rows: int


class Evaluated(TypedDict):
    """The fields of what mpiml.evaluate prints, beside the score."""

    run: str
    step: int
    data: str
    rows: int
    test_loss: float


RESULT_KINDS, LINE_KINDS = get_type_hints(Result), get_type_hints(Line)
FIELDS = frozenset().union(*(get_type_hints(kind) for kind in (Result, Line, Evaluation, Evaluated)))


def read_result(run: Path) -> dict[str, Any]:
    """The content of result.json in a run directory; empty if there is none. Raises OutputError if it is damaged."""
    return read_fields(run / RESULT, RESULT_KINDS, ("status",))


def write_result(run: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Replace result.json in a run directory. If a full disk has no room for a second file, the first is overwritten.

    Returns what is written: the result, with None in place of numbers that are not finite.
    """
    written: dict[str, Any] = finite(result)
    try:
        write_atomically(run / RESULT, _text(written))
    except OutputError:
        if not _overwritten(run / RESULT, written):
            raise
    return written


def update_result(run: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Change fields of result.json in a run directory, and return all of them; a damaged file is replaced."""
    try:
        before = read_result(run)
    except OutputError:
        before = {}
    return write_result(run, {**before, **fields})


def _text(result: Mapping[str, Any]) -> str:
    return json.dumps(result, indent=2, allow_nan=False) + "\n"


def _overwritten(path: Path, result: Mapping[str, Any]) -> bool:
    """Write a result into the disk blocks that the file already has, without the traceback if it is too long for them.

    Returns whether that succeeded.
    """
    short = {key: value for key, value in result.items() if key != "traceback"}
    try:
        with open(path, "r+b") as file:
            room = os.fstat(file.fileno()).st_blocks * 512
            content = next((text for text in map(str.encode, (_text(result), _text(short))) if len(text) <= room), b"")
            file.write(content)
            if content:
                file.truncate()
            return bool(content)
    except OSError:
        return False
