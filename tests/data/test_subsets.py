"""Rows that are held out: the same choice everywhere, for every format, and both halves are what the file holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpiml.data.dataset import Dataset, Split, open_dataset
from mpiml.data.formats import Options
from mpiml.data.inspection import inspect
from mpiml.data.prefetch import in_memory, steps_ahead
from mpiml.data.shards import Shards
from mpiml.data.sources import ArraySource
from mpiml.data.subsets import draw
from mpiml.errors import ConfigError, DataError
from tests.data.samples import ARRAYS, FORMATS, OPTIONS, TRAIN, values


def without_tests(name: str, path: Path) -> Dataset:
    """The training rows of a format, as a data set that has no others."""
    if name == "npz":
        np.savez(path / "d.npz", **{key: ARRAYS[key] for key in ("x_train", "y_train")})
        return open_dataset(str(path / "d.npz"))
    return Dataset(open_dataset(str(FORMATS[name](path)), OPTIONS).train)


def held(split: Split, column: str) -> np.ndarray:
    return np.asarray(getattr(split, column).rows(np.arange(len(split))))


@pytest.mark.parametrize("name", FORMATS)
def test_both_halves_hold_their_rows_of_every_format(tmp_path: Path, name: str) -> None:
    data = without_tests(name, tmp_path)
    assert (len(data.train), len(data.test)) == (TRAIN, 0)
    parts = data.with_tests(0.3, seed=1, said=False, evaluated=True)
    train, test = draw(TRAIN, 0.3, 1)
    assert len(test) == 7
    assert sorted([*train, *test]) == list(range(TRAIN))
    for split in (parts.train, parts.test):
        for column in "xy":
            getattr(split, column).hold(np.arange(len(split)))
    for split, rows in ((parts.train, train), (parts.test, test)):
        for column in "xy":
            np.testing.assert_array_equal(held(split, column), values(name, f"{column}_train")[rows])
    assert parts.fingerprint == data.fingerprint
    assert list(parts.notes) == ["no test rows: 7 of 23 rows, chosen by --seed, are held out (see --held-out)"]


def test_idx_files_may_lack_those_to_test_on(tmp_path: Path) -> None:
    FORMATS["plain_idx"](tmp_path)
    for file in tmp_path.glob("t10k*"):
        if "labels" in file.name:
            file.unlink()
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte: No such file"):
        open_dataset(str(tmp_path))
    alone = open_dataset(str(tmp_path), Options(tests_only=True))
    np.testing.assert_array_equal(held(alone.test, "x"), ARRAYS["x_test"])
    assert not alone.test.labelled
    next(tmp_path.glob("t10k*")).unlink()
    assert len(open_dataset(str(tmp_path)).test) == 0


def test_the_choice_is_one_of_the_seed() -> None:
    first, again, other = draw(1000, 0.1, 0), draw(1000, 0.1, 0), draw(1000, 0.1, 1)
    np.testing.assert_array_equal(first[1], again[1])
    assert set(first[1]) != set(other[1])
    assert all((np.diff(rows) > 0).all() for rows in (*first, *other))
    assert 0.3 < np.mean(first[1] < 500) < 0.7  # from everywhere, not the last ones


DATA = Dataset(Split(ArraySource(np.eye(10)), ArraySource(np.arange(10)), ArraySource(np.linspace(0, 1, 10))))


def test_weights_are_those_of_the_rows() -> None:
    parts = DATA.with_tests(0.3, 0, said=True, evaluated=True)
    for split in (parts.train, parts.test):
        np.testing.assert_allclose(held(split, "w"), held(split, "y") / 9)
    assert len(DATA.test) == 0  # the data set itself stays as it is


@pytest.mark.parametrize(
    ("fraction", "rows", "words"),
    [
        (0.04, 10, "--held-out 0.04: of 10 rows none would be taken; a fraction from 0.1 to 0.9 works"),
        (0.96, 10, "--held-out 0.96: of 10 rows none would be left to train on; a fraction from 0.1 to 0.9 works"),
        (0.5, 1, "--held-out 0.5: of 1 rows none would be taken; it takes two rows"),
    ],
)
def test_a_fraction_leaves_rows_on_both_sides(fraction: float, rows: int, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        draw(rows, fraction, 0)
    assert str(error.value) == words


def test_without_test_rows_there_is_no_evaluation() -> None:
    assert DATA.with_tests(0, 0, said=True, evaluated=False) is DATA
    with pytest.raises(ConfigError, match="--held-out 0: there are no test rows to evaluate on; add --eval-every 0"):
        DATA.with_tests(0, 0, said=True, evaluated=True)


def test_a_fraction_is_not_used_where_there_are_test_rows() -> None:
    data = Dataset(DATA.train, DATA.train)
    assert data.with_tests(0.1, 0, said=False, evaluated=True) is data
    noted = data.with_tests(0.2, 0, said=True, evaluated=True)
    assert (noted.test, list(noted.notes)) == (data.test, ["--held-out 0.2 is not used: there are test rows, 10"])
    assert list(data.notes) == []


def test_rows_to_validate_on_take_the_place_of_the_test_rows() -> None:
    data = Dataset(DATA.train, DATA.train.subset(np.arange(3)))
    parts = data.with_validation(0.3, 5)
    train, taken = draw(10, 0.3, 5, "validation")
    assert (len(taken), sorted([*train, *taken])) == (3, list(range(10)))
    for split, rows in ((parts.train, train), (parts.test, taken)):
        np.testing.assert_array_equal(held(split, "y"), rows)
        np.testing.assert_array_equal(held(split, "x"), np.eye(10)[rows])
        np.testing.assert_allclose(held(split, "w"), rows / 9)
    assert list(parts.notes) == ["validation: 3 of 10 training rows, chosen by --seed; the 3 test rows are not read"]
    assert parts.fingerprint == data.fingerprint
    assert data.with_validation(0, 5) is data


def test_rows_are_held_out_before_others_are_taken_to_validate_on() -> None:
    parts = DATA.with_tests(0.4, 0, said=True, evaluated=True).with_validation(0.5, 0)
    assert not set(held(parts.test, "y")) & set(draw(10, 0.4, 0)[1])
    assert len(parts.train) == len(parts.test) == 3
    assert set(draw(10, 0.4, 0)[1]) != set(draw(10, 0.4, 0, "validation")[1])
    (note,) = DATA.with_validation(0.5, 0).notes
    assert note == "validation: 5 of 10 training rows, chosen by --seed; there are no test rows"


def test_a_fraction_to_validate_on_leaves_rows_on_both_sides() -> None:
    for fraction, words in ((0.04, "none would be taken"), (0.96, "none would be left to train on")):
        with pytest.raises(ConfigError) as error:
            DATA.with_validation(fraction, 0)
        assert str(error.value) == f"--validation {fraction}: of 10 rows {words}; a fraction from 0.1 to 0.9 works"


def test_text_keeps_its_last_part_or_all_of_it(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(bytes(range(100)))
    data = open_dataset(str(tmp_path / "t.txt"), Options(context=4, held_out=0.2))
    assert (len(data.train), len(data.test)) == (19, 4)
    assert data.with_tests(0.2, 0, said=True, evaluated=True) is data
    assert held(data.test, "x")[0, 0] == 80
    whole = open_dataset(str(tmp_path / "t.txt"), Options(context=4, held_out=0))
    assert (len(whole.train), len(whole.test)) == (24, 0)


def test_a_row_is_named_by_its_number_in_the_file() -> None:
    x = np.zeros((20, 2))
    x[13] = np.nan
    parts = Dataset(Split(ArraySource(x), ArraySource(np.zeros(20)))).with_tests(0.5, 0, said=False, evaluated=True)
    findings = [inspect(split.x, np.arange(10)).first_bad for split in (parts.train, parts.test)]
    assert sorted(findings, key=str) == [13, None]


@pytest.mark.parametrize("name", ["npz", "compressed_npz", "csv"])
def test_reading_ahead_is_tried_on_rows_that_are_held(tmp_path: Path, name: str) -> None:
    train = without_tests(name, tmp_path).with_tests(0.3, 0, said=False, evaluated=True).train
    shards = Shards(train, 2, 4, 0, 1, 2, "float32")
    train.x.hold(shards.rows())
    train.y.hold(shards.rows())
    assert in_memory(train) is (name != "npz")
    assert steps_ahead(shards) in (0, 2)
    assert steps_ahead(shards, asked=5) == 5


def test_a_streamed_input_with_a_mapped_label(tmp_path: Path) -> None:
    """Not all in memory, so that reading is tried, and only rows that are held can be read."""
    streamed, mapped = (open_dataset(str(FORMATS[name](tmp_path))).train for name in ("compressed_npz", "npy"))
    train = Dataset(Split(streamed.x, mapped.y)).with_tests(0.3, 0, said=False, evaluated=True).train
    shards = Shards(train, 2, 4, 0, 1, 2, "float32")
    train.x.hold(shards.rows())
    assert steps_ahead(shards) in (0, 2)
