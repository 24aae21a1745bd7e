"""A metrics file that is read back: which lines are damaged, and which are lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpiml.errors import OutputError
from mpiml.run.metrics import content_of, lines, missing

LINES = [b'{"step": 1, "loss": 2.0}\n', b'{"step": 1, "evaluation": {"loss": 1.5, "score": null}}\n']


def test_lines_are_what_they_say_and_as_they_stand(tmp_path: Path) -> None:
    good, problems = lines(tmp_path / "m", b"".join(LINES))
    assert [content for content, _ in good] == LINES
    assert [entry for _, entry in good] == [json.loads(content) for content in LINES]
    assert problems == []


def test_damaged_lines_are_named_and_an_unfinished_last_one_is_not(tmp_path: Path) -> None:
    good, problems = lines(tmp_path / "m", b"garbage\n" + LINES[0] + b'{"loss": 1}\n' + b'{"step": 2, "lo')
    assert [content for content, _ in good] == LINES[:1]
    assert [text.partition(" is damaged")[0] for text in problems] == [f"{tmp_path}/m, line {n}," for n in (1, 3)]


def test_a_file_that_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "m"
    assert content_of(path) == b""  # there is none
    path.write_bytes(b"".join(LINES))
    assert content_of(path) == b"".join(LINES)
    path.unlink()
    path.mkdir()
    with pytest.raises(OutputError, match="is not a regular file"):
        content_of(path)


def line(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1.0}


def score(step: int) -> dict[str, Any]:
    return {"step": step, "evaluation": {"loss": 1.0}}


def every(apart: int, last: int, of: Any = line, first: int = 0) -> list[dict[str, Any]]:
    return [of(step) for step in range(first + apart, last + 1, apart)]


@pytest.mark.parametrize(
    ("there", "step", "lost"),
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
def test_lines_that_are_lost_before_a_checkpoint(there: Any, step: int, lost: list[int]) -> None:
    assert missing(there, step, 10, 30) == lost


def test_evaluations_are_not_missed_where_there_are_none() -> None:
    assert missing(every(10, 90), 95, 10, 0) == []
