"""What a metrics file holds when a run goes on, and which of its lines are lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpiml.errors import OutputError
from mpiml.run import log


def line(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1.0}


def score(step: int) -> dict[str, Any]:
    return {"step": step, "evaluation": {"loss": 1.0}}


def every(apart: int, last: int, of: Any = line, first: int = 0) -> list[dict[str, Any]]:
    return [of(step) for step in range(first + apart, last + 1, apart)]


@pytest.mark.parametrize(
    ("entries", "step", "lost"),
    [
        (every(10, 90) + every(30, 60, score), 95, [90]),  # an evaluation
        (every(10, 90) + every(30, 90, score), 95, []),
        (every(10, 90) + every(30, 60, score), 90, []),  # which comes after the save, so that it will be made again
        (every(10, 60) + every(30, 60, score), 89, [70, 80]),
        (every(10, 100) + every(30, 90, score), 60, []),  # those after the checkpoint do not count
        ([], 35, [10, 20, 30]),
        ([], 9, []),
        (every(50, 100) + every(30, 90, score), 119, []),  # another job logged less
        (every(1, 95) + every(30, 90, score), 99, []),  # and another more
    ],
)
def test_lines_that_are_lost_before_a_checkpoint(entries: Any, step: int, lost: list[int]) -> None:
    assert log.missing(entries, step, 10, 30) == lost


def test_evaluations_are_not_missed_where_there_are_none() -> None:
    assert log.missing(every(10, 90), 95, 10, 0) == []


def test_what_is_cut_and_what_stays(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert log.cut(metrics, 0, 9, 4, 2) == []
    assert not metrics.exists()
    entries = [line(2), line(4), score(4), line(6), score(8)]
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    metrics.write_text(text + '{"step": 9, "lo')
    assert log.entries(metrics) == entries
    assert log.cut(metrics, 4, 9, 4, 2) == entries[:3]
    assert [json.loads(row) for row in metrics.read_text().splitlines()] == entries[:3]
    before = metrics.stat().st_ino
    log.cut(metrics, 4, 9, 4, 2)
    assert metrics.stat().st_ino == before
    assert log.cut(metrics, 4, 9, 3, 2) == entries[:2]


def test_a_metrics_file_that_cannot_be_read_is_not_empty(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot read .*: Is a directory"):
        log.cut(tmp_path, 4, 9, 4, 2)
