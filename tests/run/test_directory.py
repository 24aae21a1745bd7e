"""What a run directory's small files say, also where somebody has damaged them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from mpiml.errors import OutputError
from mpiml.run import environment
from mpiml.run.directory import read_result, update_result, write_result

GOOD = {"status": "running", "exit_code": None, "reason": None, "rank": None, "step": 0, "accuracy": 0.5}


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "[" * 100_000, "\0" * 50, '{"step": 5}', '{"status": null}', '{"status": "done", "step": "9"}',
     '{"status": "done", "step": null}', '{"status": "done", "exit_code": "0"}', '{"status": "failed", "reason": 5}'],
)  # fmt: skip
def test_a_damaged_result_is_one_line_and_is_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(OutputError) as error:
        read_result(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'result.json'} is damaged: ")
    assert str(error.value).endswith("if you remove it, --resume goes on from the checkpoints")
    assert "\n" not in str(error.value)
    update_result(tmp_path, GOOD)  # the reason of a failure must not be lost for it
    assert read_result(tmp_path) == GOOD


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["pipe", "directory"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, make: Any) -> None:
    for name in ("result.json", "environment.json"):
        make(tmp_path / name)
    with pytest.raises(OutputError, match=r"result.json: is not a regular file"):
        read_result(tmp_path)
    with pytest.raises(OutputError, match=r"environment.json: is not a regular file"):
        environment.data(tmp_path)


def test_no_result_is_none(tmp_path: Path) -> None:
    assert read_result(tmp_path) == {}


def test_a_result_is_json_whatever_a_metric_is(tmp_path: Path) -> None:
    write_result(tmp_path, GOOD)
    assert update_result(tmp_path, {"accuracy": math.nan, "step": 3}) == GOOD | {"accuracy": None, "step": 3}
    text = (tmp_path / "result.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == GOOD | {"accuracy": None, "step": 3}


@pytest.mark.parametrize("text", ["[]", '{"data": 5}', '{"data": "abc"}', '{"data": [["a", 1]]}', "[" * 100_000, "{"])
def test_a_damaged_environment_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "environment.json").write_text(text)
    with pytest.raises(OutputError, match=r"environment.json is damaged: .*; if you remove it"):
        environment.data(tmp_path)
    assert environment.host(tmp_path, 0) == "unknown"  # a name in a message: no reason to end a run


def test_the_environment_of_a_run(tmp_path: Path) -> None:
    assert environment.data(tmp_path) is None
    (tmp_path / "environment.json").write_text('{"data": [["a", "b"]], "ranks": [{"host": "n1"}, {"host": "n2"}]}')
    assert environment.data(tmp_path) == [["a", "b"]]
    assert [environment.host(tmp_path, rank) for rank in range(3)] == ["n1", "n2", "unknown"]
