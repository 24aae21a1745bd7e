"""What data ask of a model, read back from a checkpoint."""

from __future__ import annotations

import json

import pytest

from mpiml.errors import OutputError
from mpiml.run.checkpoint import Checkpoint
from mpiml.training.task import Task
from tests.forging import loaded


def saved(task: str) -> Checkpoint:
    return loaded({}, task=task, origin="step-1.safetensors")


def test_a_task_is_read_back_and_old_ones_ignore_minus_one() -> None:
    words = Task((2,), (), True, 2, 0, words=("a,b", "c"), columns=("x", "y z"))
    two = (("image", (2, 3), "u"), ("numbers", (4,), "f"))
    for task in (
        words,
        *(Task((8, 8), (), True, 10, 17), Task((3,), (2,), True, 4, 0, 255), Task((), (9,), False, 1, 0)),
        *(
            Task((10,), (), True, 4, 0, inputs=two, bounds=(-1, 255, 0, 0)),
            Task((2,), (), True, 4, 0, inputs=(("", (), "f"), ("", (), "b"))),
        ),
    ):
        assert Task.of_checkpoint(saved(task.to_json())) == task
    old = '{"shape": [3], "labels": [], "classification": true, "outputs": 4, "tokens": 0}'
    assert Task.of_checkpoint(saved(old)) == Task((3,), (), True, 4, 0, -1)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("shape", [["touch", "PWNED"], "ab", 3, [4, -1], [0], [1] * 33, [True]]),
        ("labels", [[1.5], None, [0]]),
        ("classification", [1, "yes"]),
        ("outputs", [-1, "x", 1 << 63, True, 0]),
        ("tokens", [-1, None]),
        ("ignore", ["x", True]),
        ("words", ["ab", ["a"], [*"abcdefghi", "a"], [1] * 10]),
        ("columns", [["a"], [None] * 64]),
        ("extra", [1]),
        ("bounds", [[-1], [0, 3], ["x"], None]),
        ("inputs", ["x", [], [1], [["a", [64]]], [["a", [63], "f"]], [["a", [-64], "f"]], [["a", [64], "O"]]]),
        (
            "inputs",
            [[["a", [32], "f"], ["", [32], "f"]], [["a", ["64"], "f"]], [[1, [64], "f"]], [["", [1] * 33, "f"]]],
        ),
    ],
)
def test_a_task_that_cannot_be_is_one_line_that_names_the_file_and_the_field(field: str, values: list[object]) -> None:
    for value in values:
        text = json.dumps(json.loads(Task((8, 8), (), True, 10, 17).to_json()) | {field: value})
        with pytest.raises(OutputError) as error:
            Task.of_checkpoint(saved(text))
        assert str(error.value).startswith("step-1.safetensors: task ")
        assert field in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", '"x"', '{"outputs": 3}', "[" * 100_000, "null"])
def test_what_is_no_task(text: str) -> None:
    with pytest.raises(OutputError, match=r"^step-1.safetensors: task is damaged: "):
        Task.of_checkpoint(saved(text))
