"""The first line that differs of two metrics files, as runs leave them and as they should not be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.compare import lines
from mpiml.compare.lines import Compared, Numbers


def entry(step: int, loss: float | None = 0.5, **others: Any) -> dict[str, Any]:
    times = {"samples_per_second": 3.5, "seconds": {"compute": {"min": 1, "max": 2}}}
    return {"step": step, "epoch": 1, "loss": loss, "accuracy": 0.25, "gradient_norm": 2.0} | times | others


def evaluation(step: int, loss: float = 0.75) -> dict[str, Any]:
    return {"step": step, "epoch": 1, "evaluation": {"loss": loss, "accuracy": 0.5, "rows": 360}}


class Files:
    """Two metrics files of a directory."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, name: str, entries: list[dict[str, Any]], end: str = "") -> lines.Logged:
        path = self.path / name
        path.write_text("".join(json.dumps(line) + "\n" for line in entries) + end)
        return lines.read(path)

    def compare(self, a: list[dict[str, Any]], b: list[dict[str, Any]]) -> Compared:
        return lines.compare(self.write("a", a), self.write("b", b))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_times_do_not_count(files: Files) -> None:
    other = entry(1) | {"samples_per_second": 9.0, "seconds": {"compute": {"min": 5, "max": 6}, "slowest": {"rank": 1}}}
    assert files.compare([entry(1)], [other]) == Compared(1, 0, (0, 0), None, [], 1)


def test_the_first_line_that_differs_with_all_its_fields(files: Files) -> None:
    more = float(np.nextafter(0.5, 1))
    a = [entry(1), entry(2), evaluation(2), entry(3)]
    made = files.compare(a, [entry(1), entry(2, more, gradient_norm=4.0), evaluation(2, 9.0), entry(3)])
    assert (made.steps, made.evaluations, made.differs, made.equal_until) == (3, 1, (2, False), 1)
    assert made.fields == [
        Numbers("loss", 0.5, more, 1, (more - 0.5) / more),
        Numbers("gradient_norm", 2.0, 4.0, 2**52, 0.5),
    ]


def test_an_evaluation_comes_after_the_step(files: Files) -> None:
    a, b = [evaluation(2), entry(2)], [evaluation(2, 0.25), entry(2, 0.25)]
    assert files.compare(a, b).differs == (2, False)
    made = files.compare(a, [entry(2), evaluation(2, 0.25)])
    assert (made.differs, [field.name for field in made.fields]) == ((2, True), ["evaluation.loss"])


def test_lines_that_one_alone_has(files: Files) -> None:
    made = files.compare([entry(step) for step in (1, 2, 3, 4)], [entry(2), entry(4), entry(5)])
    assert (made.steps, made.alone, made.differs) == (2, (2, 1), None)


def test_nothing_in_common(files: Files) -> None:
    a, b = files.write("a", [entry(step) for step in range(1, 9)]), files.write("b", [entry(10)])
    assert lines.compare(a, b).steps == 0
    assert lines.nothing_in_common(a, b).endswith("/b: 8 steps, 1, 2, ... 8, step 10")
    assert "no steps at all" in lines.nothing_in_common(a, files.write("c", []))


@pytest.mark.parametrize(
    ("a", "b", "ulp"),
    [(0.0, -0.0, 0), (None, 0.5, None), (1, 2, None), (-5e-324, 5e-324, 2), (1, 1.0000000000000002, 1)],
)
def test_odd_numbers_differ(files: Files, a: Any, b: Any, ulp: int | None) -> None:
    (numbers,) = files.compare([entry(1, accuracy=a)], [entry(1, accuracy=b)]).fields
    assert (numbers.name, numbers.a, numbers.b, numbers.ulp) == ("accuracy", a, b, ulp)


def test_a_whole_number_equals_itself_as_a_float(files: Files) -> None:
    assert not files.compare([entry(1, accuracy=1)], [entry(1, accuracy=1.0)]).differs


def test_fields_of_workers_are_compared(files: Files) -> None:
    a, b = ({"workers": {"loss": {"min": 1.0, "max": x}, "distance": 0.5}} for x in (2.0, 3.0))
    assert [field.name for field in files.compare([entry(1, **a)], [entry(1, **b)]).fields] == ["workers.loss.max"]


def test_the_noise_scale_depends_on_the_lines_before(files: Files) -> None:
    a = [entry(1, noise_scale=1.0), entry(2, noise_scale=2.0)]
    b = [entry(1, noise_scale=1.0), entry(2, noise_scale=3.0)]
    assert files.compare(a, b).differs == (2, False)
    assert files.compare(a[1:], b).differs is None
    assert files.compare([*a, entry(9)], b).differs == (2, False)


def test_fields_that_one_alone_has_do_not_count(files: Files) -> None:
    assert files.compare([entry(1, gradient_square=5.0)], [entry(1)]).differs is None


def test_a_last_line_that_is_cut_is_no_problem(files: Files) -> None:
    logged = files.write("a", [entry(1)], '{"step": 2, "lo')
    assert (list(logged.lines), logged.problem) == ([(1, False)], "")


def test_a_damaged_line_is_said(files: Files) -> None:
    logged = files.write("a", [entry(1)], '{"step": 2, "lo\n' + json.dumps(entry(3)) + "\n")
    assert list(logged.lines) == [(1, False), (3, False)]
    assert "/a, line 2, is damaged" in logged.problem
    logged = files.write("a", [entry(1)], "{\n" * 1000)
    assert logged.problem.endswith(" and so are 999 more lines")


def test_numbers_of_any_size_are_read(files: Files) -> None:
    huge = {"accuracy": 10**400, "more": [1, {"a": 2}], "text": "x", "flag": True}
    assert not files.compare([entry(1, **huge)], [entry(1, accuracy=10**401)]).differs
