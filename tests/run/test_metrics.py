"""A metrics file that is read back: what is damaged is said, but for a line that was never finished."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mpiml.errors import OutputError
from mpiml.run.log import cut, last_known

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
