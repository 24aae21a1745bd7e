"""Outputs beside labels: where classes are counted, which shapes fit, and the same scores wherever the classes are."""

from __future__ import annotations

import numpy as np
import pytest

from mpiml.nn.losses import Accuracy, softmax_cross_entropy
from mpiml.nn.outputs import Outputs

# shape of a row of outputs, of labels; whether PyTorch makes the outputs; labels beside them, axis of the classes
CLASSES = [
    ((3,), (), False, (), 0),
    ((3,), (), True, (), 0),
    ((3,), (1,), False, (), 0),  # a column
    ((1, 3), (1,), False, (1,), 1),
    ((8, 3), (8,), False, (8,), 1),
    ((3, 8), (8,), True, (8,), 0),
    ((3, 3), (3,), True, (3,), 1),  # both fit: one label axis
    ((3, 3, 3), (3, 3), True, (3, 3), 0),  # both fit: two
    ((3, 3, 3), (3, 3), False, (3, 3), 2),
    ((3, 5, 4), (5, 4), True, (5, 4), 0),
    ((5, 4, 3), (5, 4), True, (5, 4), 2),
    ((5, 4, 3), (5, 4), False, (5, 4), 2),
    ((3, 5, 4), (1, 5, 4), True, (5, 4), 0),
    ((5, 4, 3), (5, 4, 1), False, (5, 4), 2),
    ((3, 1, 5, 4), (1, 5, 4), True, (1, 5, 4), 0),
    ((3, 4, 4, 4), (4, 4, 4), True, (4, 4, 4), 0),
]


@pytest.mark.parametrize(("shape", "labels", "torch", "goals", "axis"), CLASSES)
def test_where_classes_are(shape: tuple, labels: tuple, torch: bool, goals: tuple, axis: int) -> None:
    assert Outputs.of(shape, labels, 3, torch) == Outputs(goals, axis)


@pytest.mark.parametrize(
    ("shape", "labels"),
    [((1,), ()), ((), ()), ((3,), (3,)), ((3, 1), (3,)), ((1, 5, 4), (5, 4)), ((20,), (5, 4)), ((2, 5, 4), (2, 5, 4))],
)
def test_values_have_an_output_each(shape: tuple, labels: tuple) -> None:
    assert Outputs.of(shape, labels) == Outputs(labels, None)


@pytest.mark.parametrize(
    ("shape", "labels", "classes", "torch", "needed"),
    [
        ((4,), (), 3, False, "(3,)"),
        ((3, 8), (8,), 3, False, "(8, 3)"),
        ((3, 5), (8,), 3, True, "(8, 3) or (3, 8)"),
        ((3, 5), (8, 1), 3, True, "(3, 8, 1) or (8, 1, 3) or (8, 3) or (3, 8)"),
        ((2,), (3,), None, False, "(3,)"),
        ((4, 5), (5, 4), None, False, "(5, 4) or (20,)"),
        ((2,), (), None, False, "() or (1,)"),
    ],
)
def test_an_error_names_all_that_would_fit(
    shape: tuple, labels: tuple, classes: int | None, torch: bool, needed: str
) -> None:
    with pytest.raises(ValueError) as error:
        Outputs.of(shape, labels, classes, torch)
    assert str(error.value) == needed


def test_scores_are_the_same_wherever_the_classes_are() -> None:
    random = np.random.default_rng(0)
    last, labels = random.standard_normal((6, 5, 4, 3)), random.integers(-1, 3, (6, 1, 5, 4))
    first, weights = np.ascontiguousarray(np.moveaxis(last, -1, 1)), random.random(6)
    outputs = Outputs.of((3, 5, 4), (1, 5, 4), 3, True)
    total, weight, dy = outputs.loss(softmax_cross_entropy)(first, labels, weights)
    expected = softmax_cross_entropy(last, labels[:, 0], weights)
    assert (total, weight) == expected[:2]
    np.testing.assert_array_equal(dy, np.moveaxis(expected[2], -1, 1))
    metric = outputs.metric(Accuracy())
    assert (metric.name, metric.columns, metric.value([1.0, 2.0])) == ("accuracy", 2, 0.5)
    np.testing.assert_array_equal(metric.sums(first, labels), Accuracy().sums(last, labels[:, 0]))
