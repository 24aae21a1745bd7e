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
    """result.json: what the last job of a run has done. Beside these fields is the score of the last evaluation, under
    the metric's name."""

    status: Required[str]  # running, done, stopped or failed
    exit_code: int | None  # of the job; None while it is running
    reason: str | None  # why it stopped or failed
    rank: int | None  # the one that failed, if it was one
    traceback: str
    step: int  # the last one
    saved: int  # the step of the newest checkpoint
    ranks: int  # of the job, as the next two
    pipe: int
    microbatches: int | None
    loss: float | None  # of the last step
    test_loss: float | None  # of the last evaluation; with rows to validate on, there is the next in its place
    validation_loss: float | None
    best_step: int  # of the best evaluation, by what --best names
    best_score: float  # what that is
    best_checkpoint: str | None  # path from the run directory; None if it is not kept
    weights_sha256: str  # after the last step
    noise_scale: float | None  # with --noise-scale, as next
    samples_per_second: float | None
    seconds: float  # that the job took


class Line(TypedDict, total=False):
    """A line of metrics.jsonl, of a step, with its score under the metric's name, or of an evaluation."""

    step: Required[int]
    epoch: int
    loss: float | None
    learning_rate: float
    gradient_norm: float | None
    noise_scale: float | None  # in rows, by the lines so far; the next two are of this step alone
    gradient_variance: float | None
    gradient_square: float | None
    samples_per_second: float
    seconds: dict[str, Any]  # since the last line: the least and most of any rank in each activity; the slowest rank
    evaluation: dict[str, float | None]  # its loss, score and rows
    time: float  # when it was written, in seconds since 1970; lines of old runs have none


EVALUATION = frozenset({"loss", "rows"})  # the fields of an evaluation, beside the score
EVALUATED = frozenset({"run", "step", "data", "rows"})  # and of what mpiml.evaluate prints
RESULT_KINDS, LINE_KINDS = get_type_hints(Result), get_type_hints(Line)
FIELDS = frozenset({*RESULT_KINDS, *LINE_KINDS, *EVALUATION, *EVALUATED})


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
