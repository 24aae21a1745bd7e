"""Small files and texts of ours: whatever they hold, they are read, or refused in one line that names them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from mpiml import documents
from mpiml.errors import OutputError


def refusal(action: Any, *arguments: Any) -> str:
    with pytest.raises(OutputError) as error:
        action(*arguments)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
    return str(error.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "not a regular file"),
        (os.mkfifo, "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.symlink_to(path), "Too many levels"),
        (lambda path: path.write_bytes(bytes(1001)), "more than 1,000 bytes"),
    ],
    ids=["missing", "directory", "pipe", "device", "loop", "large"],
)
def test_what_is_no_small_file_is_not_read(tmp_path: Path, make: Any, words: str) -> None:
    make(tmp_path / "it")
    message = refusal(documents.read, tmp_path / "it", 1000)
    assert message.startswith(f"{tmp_path / 'it'}: ")
    assert words in message


def test_a_file_is_read_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(b"content")
    (tmp_path / "link").symlink_to("it")
    assert documents.read(tmp_path / "link") == b"content"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, "[" * 33 + "]" * 33, "9" * 5000, '"\\ud800"', '{"\\udfff": 1}', b"\xff\xfe", b"\0" * 99],
    ids=["empty", "cut", "endless", "deep", "digits", "surrogate", "key", "binary", "zeros"],
)
def test_what_is_no_json_is_one_line(text: str | bytes) -> None:
    for content in (text, text.encode() if isinstance(text, str) else text):
        assert refusal(documents.from_json, content, "r.json").startswith("r.json is damaged: ")


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 100_000, "a = " + "[" * 33 + "]" * 33, "a = 9" + "9" * 5000, "]", "\0"]
)
def test_what_is_no_toml_is_one_line(text: str) -> None:
    assert refusal(documents.from_toml, text, "c.toml").startswith("c.toml is damaged: ")


def test_numbers_that_json_does_not_have_become_null() -> None:
    value = {"a": [1.5, math.nan, (math.inf, "x")], "b": {"c": -math.inf, "d": True, "e": None}}

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    written = documents.to_json(value)
    assert json.loads(written, parse_constant=refuse) == {
        "a": [1.5, None, [None, "x"]],
        "b": {"c": None, "d": True, "e": None},
    }


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (int, [0, -5, 2**63 - 1], [True, 1.0, "1", None, 2**63, -(2**63) - 1]),
        (bool, [True, False], [0, 1, "true", None]),
        (float, [1.5, 2], [True, "1.5", None]),
        (str, ["", "x"], [1, None, ["x"]]),
        (int | None, [None, -1], [True, "x"]),
        (tuple[int, ...], [[], [1, 2]], [1, "ab", [True], [1.5], {"1": 1}]),
        (list[list[str]], [[], [["a"], []]], [["a"], "abc", 5, [[1]]]),
        (dict[str, str], [{}, {"a": "b"}], [[], {"a": 1}, "a"]),
        (Any, [None, 1, []], []),
    ],
)
def test_types_of_values(kind: Any, good: list[Any], bad: list[Any]) -> None:
    assert [value for value in good if not documents.fits(value, kind)] == []
    assert [value for value in bad if documents.fits(value, kind)] == []


def test_fields_that_are_missing_or_of_another_type_are_named() -> None:
    kinds = {"step": int, "reason": str | None}
    assert documents.check_fields({"step": 1, "more": [], "reason": None}, kinds, "r.json", ["step"])["step"] == 1
    assert "r.json is damaged: it has no step" in refusal(documents.check_fields, {}, kinds, "r.json", ["step"])
    message = refusal(documents.check_fields, {"step": "9" * 10_000}, kinds, "r.json", ["step"])
    assert "step is '999" in message
    assert "must be of type int" in message
    assert "not [1]" in refusal(documents.check_fields, [1], kinds, "r.json")
