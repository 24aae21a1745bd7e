"""A metrics file that is read back: what stays when a run goes on, which lines are lost, and which are damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mpiml.errors import OutputError
from mpiml.run.metrics import cut, last_known, missing
from mpiml.run.metrics import entries as read_entries

LINES = [
    b'{"step": 1, "loss": 2.0}\n',
    b'{"step": 2, "loss": 1.0}\n',
    b'{"step": 2, "evaluation": {"loss": 1.5, "score": null, "rows": 7}}\n',
    b'{"step": 3, "loss": 0.5}\n',
]


def cut_at_2(path: Path, content: bytes) -> tuple[list[int], list[str]]:
    path.write_bytes(content)
    entries, notes = cut(path, 2, 9, 2, 1)
    return [entry["step"] for entry in entries], notes


def test_whole_file_and_torn_end_are_cut_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for torn in (b"", b'{"step": 4, "lo', b"\0" * 4096, b'{"step": 3, "loss": 1.0}'):
        assert cut_at_2(path, b"".join(LINES) + torn) == ([1, 2, 2], [])
        assert path.read_bytes() == b"".join(LINES[:3])
    assert cut_at_2(path, LINES[0] + LINES[1].strip()) == ([1, 2], [])
    assert path.read_bytes() == LINES[0] + LINES[1]  # so that the next line begins a line


@pytest.mark.parametrize(
    "damaged",
    [b"garbage\xff\n", b"\n", b"[" * 100_000 + b"\n", b'{"step": true}\n', b'{"loss": 1}\n', b"\0" * 64 + b"\n",
     b'{"step": 2, "evaluation": null}\n', b'{"step": 2, "evaluation": {"loss": "x"}}\n', b'{"step": 2, "loss": []}\n'],
)  # fmt: skip
def test_a_damaged_line_within_is_reported_and_left_out(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    steps, (note,) = cut_at_2(path, LINES[0] + damaged + b"".join(LINES[1:]))
    assert steps == [1, 2, 2]
    assert note.startswith(f"warning: {path}, line 2, is damaged: ")
    assert note.endswith("; the rest is kept")
    assert "\n" not in note
    assert path.read_bytes() == b"".join(LINES[:3])
    _, (note,) = cut_at_2(path, damaged * 3 + b"".join(LINES))
    assert "line 1, is damaged" in note
    assert "and so are 2 more lines" in note


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["pipe", "directory"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, make: object) -> None:
    make(tmp_path / "metrics.jsonl")  # type: ignore[operator]
    with pytest.raises(OutputError, match=r"metrics.jsonl: is not a regular file"):
        cut(tmp_path / "metrics.jsonl", 2, 9, 2, 1)


def test_the_last_known_values_may_be_missing(tmp_path: Path) -> None:
    entries, _ = cut(tmp_path / "none", 2, 9, 2, 1)
    assert (entries, last_known(entries, "score")) == ([], {})
    (tmp_path / "m").write_bytes(b"".join(LINES))
    entries, _ = cut(tmp_path / "m", 9, 9, 2, 1)
    assert last_known(entries, "score") == {"loss": 0.5, "score": None, "test_loss": 1.5}
    assert last_known([{"step": 1}], "score") == {"loss": None}


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
    assert missing(entries, step, 10, 30) == lost


def test_evaluations_are_not_missed_where_there_are_none() -> None:
    assert missing(every(10, 90), 95, 10, 0) == []


def test_what_is_cut_and_what_stays(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert cut(metrics, 0, 9, 4, 2) == ([], [])
    assert not metrics.exists()
    entries = [line(2), line(4), score(4), line(6), score(8)]
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    metrics.write_text(text + '{"step": 9, "lo')
    assert read_entries(metrics) == entries
    assert cut(metrics, 4, 9, 4, 2) == (entries[:3], [])
    assert [json.loads(row) for row in metrics.read_text().splitlines()] == entries[:3]
    before = metrics.stat().st_ino
    cut(metrics, 4, 9, 4, 2)
    assert metrics.stat().st_ino == before
    assert cut(metrics, 4, 9, 3, 2) == (entries[:2], [])
