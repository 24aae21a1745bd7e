"""Which rows are read before the first step, and what is known of them without reading."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.config import Config
from mpiml.data.dataset import Dataset, Split
from mpiml.data.sources import ArraySource, Source
from mpiml.errors import ConfigError, DataError
from mpiml.train import train
from mpiml.training.look import FIRST
from mpiml.training.task import Seen

ROWS, TESTS, BATCH, STEPS = 1000, 60, 8, 3
SORTED = "the labels seem to be sorted"


class Counted(ArraySource):
    """Counts the rows that are asked for."""

    def __init__(self, array: Any, name: str):
        super().__init__(array, name)
        self.count = 0

    def rows(self, indices: Any) -> Any:
        self.count += len(indices)
        return super().rows(indices)


def made(bad: Any = None, check: Any = None) -> Dataset:
    """A data set with sorted labels; `bad` changes its training inputs and labels."""
    random = np.random.default_rng(0)
    x, y = random.random((ROWS, 4)) + 3, np.arange(ROWS) * 4 // ROWS
    if bad:
        bad(x, y)
    test = Split(Counted(random.random((TESTS, 4)), "x_test"), Counted(np.arange(TESTS) % 4, "y_test"))
    return Dataset(Split(Counted(x, "x_train"), Counted(y, "y_train")), test, check=check)


def trained(out: Path, data: Dataset | None = None, steps: int = STEPS, **settings: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {"batch": BATCH, "microbatches": 4, "hidden": (5,), "eval_every": 0, "normalize": True}
    asked |= {"out": str(out), "steps": steps} | settings
    return train(Config(**asked), MPI.COMM_SELF, data=data or made())


def read(data: Dataset) -> tuple[int, int]:
    """How many rows of training inputs, and of test labels, have been read."""
    assert isinstance(data.train.x, Counted)
    assert isinstance(data.test.y, Counted)
    return data.train.x.count, data.test.y.count


def test_the_jobs_of_a_run_look_at_its_data_once(tmp_path: Path, capsys: Any) -> None:
    whole = trained(tmp_path / "whole", steps=2 * STEPS, quiet=True)
    first, later, again = made(), made(), made()
    trained(tmp_path / "run", first)
    assert read(first)[0] > 2 * ROWS  # to look at them, and for their mean
    assert SORTED in capsys.readouterr().out
    done = trained(tmp_path / "run", later, steps=2 * STEPS, resume=True)
    assert read(later)[0] <= (STEPS + 1) * BATCH
    assert read(later)[1] == 0
    assert SORTED in capsys.readouterr().out
    assert done["weights_sha256"] == whole["weights_sha256"]
    trained(tmp_path / "run", again, steps=3 * STEPS, resume=True, look="all")
    assert ROWS < read(again)[0] < 2 * ROWS  # the mean is the checkpoint's all the same
    assert read(again)[1] == TESTS


@pytest.mark.parametrize(("look", "checks"), [("once", [1, 0]), ("all", [1, 1]), ("first", [0, 0])])
def test_checksums_are_verified_by_jobs_that_look(tmp_path: Path, look: str, checks: list[int]) -> None:
    for job, expected in enumerate(checks):
        calls: list[int] = []
        data = made(check=lambda calls=calls: calls.append(1))
        trained(tmp_path, data, steps=job + 1, resume=True, look=look, classes=4)
        assert len(calls) == expected


LOOK = {"outputs": 4, "tokens": 0, "notes": [], "ignore": None, "bounds": []}


def one_class(x: Any, y: Any) -> None:
    y[:] = 2


def test_a_single_class_is_a_warning(tmp_path: Path, capsys: Any) -> None:
    trained(tmp_path / "run", made(one_class))
    assert "warning: y_train: all labels are 2, so that there is nothing to learn" in capsys.readouterr().out
    trained(tmp_path / "two", made())
    assert "nothing to learn" not in capsys.readouterr().out


@pytest.mark.parametrize("look", [None, {"outputs": 4}, LOOK | {"ignore": 7}, LOOK | {"bounds": [0, 1]}])
def test_what_is_not_known_for_certain_is_looked_at(tmp_path: Path, look: Any) -> None:
    trained(tmp_path)
    path, data = tmp_path / "environment.json", made()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"look": look}))
    trained(tmp_path, data, steps=2 * STEPS, resume=True)
    assert read(data) > (ROWS, TESTS - 1)


def test_what_a_run_directory_may_hold_of_a_look() -> None:
    good = {"outputs": 4, "tokens": 0, "notes": ["a note"], "ignore": None, "bounds": []}
    assert Seen.of_json(good) == Seen(4, 0, ["a note"])
    assert Seen.of_json(good | {"ignore": -1}) == Seen(4, 0, ["a note"], -1)
    for bad in (
        {"outputs": 0},
        {"tokens": -1},
        {"notes": [3]},
        {"notes": None},
        {"bounds": ["x"]},
        {"outputs": 4.5},
        {"more": 1},
    ):
        assert Seen.of_json(good | bad) is None


class Own(Source):
    """Rows of which a fingerprint knows the number alone."""

    def __init__(self, source: ArraySource):
        self.source, self.name, self.shape, self.dtype = source, source.name, source.shape, source.dtype

    def __len__(self) -> int:
        return len(self.source)

    def rows(self, indices: Any) -> Any:
        return self.source.rows(indices)


def test_rows_of_ones_own_source_are_checked_in_every_job(tmp_path: Path) -> None:
    def own(bad: Any = None) -> Dataset:
        data = made(bad)
        return dataclasses.replace(data, train=dataclasses.replace(data.train, y=Own(data.train.y)))  # type: ignore[arg-type]

    whole = trained(tmp_path / "whole", own(), steps=2 * STEPS)
    trained(tmp_path / "cut", own())
    with pytest.raises(DataError, match="y_train: label 7 is not one of the 4 classes 0 to 3, in row "):
        trained(tmp_path / "cut", own(bad_label), steps=2 * STEPS, resume=True)
    done = trained(tmp_path / "cut", again := own(), steps=2 * STEPS, resume=True)
    assert done["weights_sha256"] == whole["weights_sha256"]
    assert read(again)[0] <= FIRST + (STEPS + 1) * BATCH


def test_other_data_are_refused_before_they_are_read(tmp_path: Path) -> None:
    trained(tmp_path)
    other = made(lambda x, y: np.add(x, 1, x))
    with pytest.raises(DataError, match=r"holds other data than the run in .* was trained on: x_train has"):
        trained(tmp_path, other, resume=True, steps=9)
    assert read(other) == (0, 0)


def test_rows_that_nobody_has_looked_at_give_the_same_bits(tmp_path: Path) -> None:
    looked = trained(tmp_path / "once", normalize=False)
    data = made()
    done = trained(tmp_path / "first", data, normalize=False, look="first", classes=4)
    assert done["weights_sha256"] == looked["weights_sha256"]
    assert read(data)[0] <= FIRST + (STEPS + 1) * BATCH
    more, whole = made(), made()
    trained(tmp_path / "first", more, normalize=False, steps=2 * STEPS, resume=True)
    assert read(more)[0] <= FIRST + (STEPS + 1) * BATCH  # as it was asked for in the job before
    trained(tmp_path / "first", whole, normalize=False, steps=3 * STEPS, resume=True, look="all")
    assert read(whole)[0] > ROWS


def bad_input(x: Any, y: Any) -> None:
    x[FIRST + 1 :, 2] = np.nan


def bad_label(x: Any, y: Any) -> None:
    y[FIRST + 1 :] = 7


@pytest.mark.parametrize(
    ("bad", "message"),
    [(bad_input, r"x_train: \d+ rows hold values that are not finite"), (bad_label, "y_train: label 7 is not one of")],
)
def test_rows_that_nobody_has_looked_at_are_checked_when_they_are_used(tmp_path: Path, bad: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        trained(tmp_path / "a", made(bad), normalize=False, look="first", classes=4)
    assert json.loads((tmp_path / "a" / "result.json").read_text())["reason"].startswith(message[:7])
    with pytest.raises(DataError, match=message):  # before there is a run
        trained(tmp_path / "b", made(lambda x, y: bad(x[-FIRST:], y[-FIRST:]) or bad(x, y)), classes=4)
    assert not (tmp_path / "b").exists()


def test_the_first_rows_are_looked_at_before_there_is_a_run(tmp_path: Path) -> None:
    def at_once(x: Any, y: Any) -> None:
        x[FIRST - 1] = np.inf

    with pytest.raises(DataError, match=rf"x_train: 1 rows .*, the first is row {FIRST - 1}$"):
        trained(tmp_path / "run", made(at_once), normalize=False, look="first", classes=4)
    assert not (tmp_path / "run").exists()


def test_classes_must_be_said_where_nobody_looks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--look first: the number of classes is not known .* --classes"):
        trained(tmp_path / "run", look="first")
    assert not (tmp_path / "run").exists()
