"""A look at the data before a run: what would spoil it is found on whatever rank, and its row is named."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest

from mpiml.data.dataset import Dataset
from mpiml.data.inspection import SCAN, CheckedSource, Findings, inspect, problem, taken_for_values
from mpiml.data.sources import ArraySource
from mpiml.errors import DataError


def source(values: object) -> ArraySource:
    return ArraySource(np.asarray(values), "x")


def test_inspect_counts_rows_that_are_not_finite_and_names_the_first() -> None:
    values = np.zeros((9, 2, 2))
    values[2, 0, 0], values[4, 1, 1], values[4, 0, 1], values[7, 0, 1] = np.nan, np.inf, np.nan, -np.inf
    assert inspect(source(values), np.arange(0, 9)) == Findings(bad_rows=3, first_bad=2)
    assert inspect(source(values), np.arange(3, 7)) == Findings(bad_rows=1, first_bad=4)
    assert inspect(source(values), np.arange(5, 7)) == Findings()
    assert inspect(source(values), np.arange(4, 4)) == Findings()


def test_inspect_finds_the_range_of_integers() -> None:
    labels = source([5, -2, 7, 3])
    assert inspect(labels, np.arange(0, 4)) == Findings(lowest=(-2, 1), highest=(7, 2))
    assert inspect(source([[-1, 3], [4, -1]]), np.arange(2)) == Findings((-1, 0), (4, 1))
    assert inspect(labels, np.arange(3, 4)) == Findings(lowest=(3, 3), highest=(3, 3))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64"])
def test_what_is_ignored_is_counted_and_is_no_extreme(dtype: str) -> None:
    ignored = 255 if dtype == "uint8" else -1
    labels = source(np.array([[ignored, 3], [ignored, ignored], [4, ignored], [3, 4]]).astype(dtype))
    assert inspect(labels, np.arange(4), ignored) == Findings((3, 0), (4, 2), masked=4)
    assert inspect(labels, np.arange(1, 2), ignored) == Findings(masked=2)
    assert inspect(labels, np.arange(3, 4), ignored) == Findings((3, 3), (4, 3))
    assert inspect(labels, np.arange(4), 4) == Findings(*sorted([(3, 0), (ignored, 0)]), masked=2)


def test_inspect_looks_at_all_of_a_source_longer_than_its_scan() -> None:
    values = np.zeros((4, SCAN // 8 // 2 + 1))  # a row is more than half a scan, so that each is a scan of its own
    values[[1, 3], -1] = np.inf
    moves: list[int] = []
    assert inspect(source(values), np.arange(4), progress=lambda: moves.append(1)) == Findings(bad_rows=2, first_bad=1)
    assert len(moves) == 4
    assert inspect(source(values), np.arange(2, 4)) == Findings(bad_rows=1, first_bad=3)


def test_findings_join_in_any_order() -> None:
    parts = [
        Findings(),
        Findings(bad_rows=2, first_bad=40),
        Findings(bad_rows=1, first_bad=7),
        Findings((-1, 3), (9, 5), masked=3),
        Findings((-1, 2), (9, 6)),
    ]
    for order in itertools.permutations(parts):
        joined = Findings()
        for part in order:
            joined |= part
        assert joined == Findings(lowest=(-1, 2), highest=(9, 5), bad_rows=3, first_bad=7, masked=3)


def test_inspect_names_the_first_row_of_an_extreme() -> None:
    ids = np.zeros((6, 4), np.uint16)
    ids[2, 3], ids[4, 0] = 9, 9
    assert inspect(source(ids), np.arange(6)) == Findings(lowest=(0, 0), highest=(9, 2))
    assert inspect(source(ids), np.array([1, 3, 4])) == Findings(lowest=(0, 1), highest=(9, 4))


X = np.zeros((6, 3))
PROBLEMS = {
    "inputs may be any finite numbers": (X, np.zeros(6, int), None, "x", Findings((-9, 1), (99, 2)), None),
    "classes": (X, np.zeros(6, int), None, "y", Findings((0, 1), (5, 2)), None),
    "regression": (X, np.zeros(6), None, "y", Findings(), None),
    "not finite": (X, np.zeros(6), None, "y", Findings(bad_rows=2, first_bad=4), ("2 rows hold", 4)),
    "ignored": (X, np.zeros(6, int), None, "y", Findings((0, 3), (1, 0), masked=2), None),
    "below": (
        X,
        np.zeros(6, int),
        None,
        "y",
        Findings((-1, 3), (1, 0)),
        ("label -1 is below 0: number the classes from 0; if labels are values, train with --loss mse; if it means", 3),
    ),
    "no labels": (X, np.zeros(6, int), None, "y", Findings(masked=6), ("all labels are to be ignored", 0)),
    "below tokens": (
        np.zeros((6, 3), int),
        np.zeros((6, 3), int),
        None,
        "x",
        Findings((-1, 3)),
        ("token -1 is below", 3),
    ),
    "too many": (X, np.zeros(6, int), None, "y", Findings((0, 0), (6, 5)), ("label 6 makes more classes", 5)),
    "few rows of many labels": (X, np.zeros((6, 9), int), None, "y", Findings((0, 0), (53, 5)), None),
    "too many labels": (X, np.zeros((6, 9), int), None, "y", Findings((0, 0), (54, 5)), ("label 54 makes more", 5)),
    "weights": (X, np.zeros(6), None, "w", Findings((0.0, 0), (2.0, 5)), None),
    "no weight": (X, np.zeros(6), None, "w", Findings((0.0, 0), (0.0, 0)), ("all weights are 0", 0)),
    "declared": (X, np.zeros(6, int), 3, "y", Findings((0, 0), (3, 5)), ("label 3 is not one of the 3", 5)),
    "tokens": (np.zeros((6, 3), int), np.zeros((6, 3), int), None, "x", Findings((0, 0), (17, 5)), None),
    "token": (np.zeros((6, 3), int), np.zeros((6, 3), int), 9, "x", Findings((0, 0), (9, 5)), ("token 9 is", 5)),
}


@pytest.mark.parametrize("what", PROBLEMS)
def test_what_is_wrong_and_where(what: str) -> None:
    x, y, classes, column, findings, expected = PROBLEMS[what]
    data = Dataset.from_arrays(x, y, x, y)
    wrong = problem(data, column, findings, classes)
    if expected is None:
        assert wrong is None
    else:
        assert wrong is not None
        assert (wrong[0].startswith(expected[0]), wrong[1]) == (True, expected[1])


TOKENS = np.array([[0, 1], [2, -1], [-1, -1], [9, 0]])
IMAGES, LABELS = np.array([[7], [-7], [0], [1]]), np.array([0, 1, 2, 3])
VALUES = np.array([[0.0], [np.nan], [np.inf], [1.0]])
CHECKED: dict[str, tuple[np.ndarray, np.ndarray, str, list[int], str | None]] = {
    "good": (VALUES, LABELS, "x", [3, 0, 3], None),
    "not finite": (
        VALUES,
        LABELS,
        "x",
        [3, 2, 0, 1],
        "x: 2 rows hold values that are not finite.*, the first is row 2$",
    ),
    "none": (VALUES, LABELS, "x", [], None),
    "images": (IMAGES, LABELS, "x", [0, 1, 2, 3], None),
    "label": (IMAGES, LABELS, "y", [0, 3, 1], "y: label 3 is not one of the 3 classes 0 to 2, in row 3$"),
    "token": (TOKENS, TOKENS, "x", [0, 1], "x: token -1 is below 0, in row 1$"),
    "ignored": (TOKENS, TOKENS, "y", [2], None),  # it has no label at all
    "not a label": (TOKENS, TOKENS, "y", [2, 3], "y: label 9 is not one of the 3 classes 0 to 2, in row 3$"),
}


@pytest.mark.parametrize("what", CHECKED)
def test_rows_that_are_checked_as_they_are_read(what: str) -> None:
    x, y, column, rows, message = CHECKED[what]
    data = Dataset.from_arrays(x, y, x, y)
    plain = ArraySource(x if column == "x" else y, column)
    checked = CheckedSource(plain, data, column, 3, -1 if column == "y" and data.language_model else None)
    indices = np.array(rows, int)
    if message:
        with pytest.raises(DataError, match=message):
            checked.rows(indices)
    else:
        np.testing.assert_array_equal(checked.rows(indices), plain.rows(indices))


MASKS = Dataset.from_arrays(X, np.zeros((6, 99), np.uint8), X, np.zeros((6, 99), np.uint8))
ALONE = "label 255 is far above all others, up to 0: if 255 means no label, train with --ignore 255"
DOUBTFUL = {
    "signs": ([[-1, 1], [1, -1]], -1, None, ("all labels are -1 or 1: if both are classes", 0)),
    "two classes": ([[-1, 0], [1, -1]], -1, None, None),
    "one class": ([[0, 0], [0, 0]], -1, None, None),
    "void": ([[0, 20], [255, 1]], -1, None, ("label 255 is far above all others, up to 20: if 255 means no label", 1)),
    "declared": ([[0, 20], [255, 1]], -1, 256, None),
    "black and white": ([[0, 255], [255, 0]], -1, None, (f"{ALONE}; else if 0 and 255 are two classes, store y //", 0)),
    "a class like others": ([[0, 1], [255, 200]], -1, None, None),
}


@pytest.mark.parametrize("what", DOUBTFUL)
def test_labels_of_which_one_may_be_none(what: str) -> None:
    labels, ignore, classes, expected = DOUBTFUL[what]
    findings = [inspect(source(labels), np.array([row]), ignore) for row in range(2)]
    joined = findings[0] | findings[1]
    assert problem(MASKS, "y", joined, classes) is None  # somebody has said so
    wrong = problem(MASKS, "y", joined, classes, doubt=True)
    assert (wrong is None) == (expected is None)
    if wrong and expected:
        assert (wrong[0].startswith(expected[0]), wrong[1]) == (True, expected[1])


@pytest.mark.parametrize(
    ("values", "binary"), [([[0.0, 1.0], [1.0, 1.0]], True), ([[0.0, 1.0], [1.0, 0.5]], False), ([0.0, 2.0], False)]
)
def test_values_that_are_0_or_1(values: list, binary: bool) -> None:
    assert inspect(source(values), np.arange(2)).binary is binary
    parts = [inspect(source(values), np.arange(row, row + 1)) for row in range(2)]
    assert (parts[0] | parts[1]).binary is (parts[1] | parts[0]).binary is binary


def test_single_numbers_have_extremes() -> None:
    assert inspect(source([0.5, -1.5, 3.0]), np.arange(3)) == Findings((-1.5, 1), (3.0, 2))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0.0, 2.0, 1.0], "whole numbers, 0 to 2, but are taken for values; integers are classes"),
        ([1.0, 0.0, 1.0], "0 or 1, but are taken for values; see --loss bce, or store integers as classes"),
        ([[1.0, 0.0], [0.0, 1.0]], "0 or 1, .*; one-hot labels: store y.argmax"),
        ([-1.0, 1.0], "whole numbers, -1 to 1, but"),
        ([0.0, 2.0, 1.5], None),
        ([0.0, 250000.0], None),
        ([0.0, -2.0], None),
        ([[0.0, 2.0], [1.0, 0.0]], None),
    ],
)
def test_labels_that_look_like_classes_are_said_to_be_values(labels: Any, words: str | None) -> None:
    count = len(labels)
    note = taken_for_values(inspect(source(labels), np.arange(1)) | inspect(source(labels), np.arange(1, count)))
    assert re.search(words, note or "") if words else note is None
