"""Losses against finite differences, metrics against values worked out by hand, and both computed in parts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mpiml.nn.losses import (
    R2,
    Accuracy,
    BinaryAccuracy,
    ExactMatch,
    Loss,
    binary_cross_entropy,
    mean_squared_error,
    sigmoid,
    softmax,
    softmax_cross_entropy,
)


def classes(rows: int = 6) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.standard_normal((rows, 4)) * 2, random.integers(0, 4, rows)


def values(rows: int = 6) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    return random.standard_normal((rows, 3)), random.standard_normal((rows, 3))


def tokens(rows: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """As many labels that count as rows, so that all cases weigh alike."""
    random = np.random.default_rng(2)
    y, labels = random.standard_normal((rows, 3, 4)), np.full((rows, 3), -1)
    labels[np.arange(rows), random.integers(0, 3, rows)] = random.integers(0, 4, rows)
    return y, labels


def fields(rows: int = 6) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    return random.standard_normal((rows, 2, 3)), random.standard_normal((rows, 2, 3))


def probabilities(rows: int = 6) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(4)
    return random.standard_normal((rows, 3)) * 3, random.random((rows, 3)).round(1)


def logits(rows: int = 6) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(5)
    return random.standard_normal((rows, 1)), random.integers(0, 2, rows)


CASES = {
    "cross entropy": (softmax_cross_entropy, classes),
    "masked tokens": (softmax_cross_entropy, tokens),
    "squared error": (mean_squared_error, values),
    "squared error of fields": (mean_squared_error, fields),
    "binary": (binary_cross_entropy, probabilities),
    "one logit": (binary_cross_entropy, logits),
}
every_loss = pytest.mark.parametrize(("loss", "data"), CASES.values(), ids=CASES.keys())


@every_loss
def test_gradient_is_the_slope(loss: Loss, data) -> None:
    y, labels = data()
    _, _, dy = loss(y, labels)
    slopes = np.empty(y.shape)
    for index in np.ndindex(y.shape):
        up, down = y.copy(), y.copy()
        up[index] += 1e-5
        down[index] -= 1e-5
        slopes[index] = (loss(up, labels)[0] - loss(down, labels)[0]) / 2e-5
    np.testing.assert_allclose(dy, slopes, rtol=1e-6, atol=1e-8)


@every_loss
def test_parts_sum_to_the_whole(loss: Loss, data) -> None:
    y, labels = data()
    total, weight, dy = loss(y, labels)
    parts = [loss(y[a:b], labels[a:b]) for a, b in ((0, 2), (2, 2), (2, 6))]
    assert total == pytest.approx(sum(part[0] for part in parts), rel=1e-14)
    assert weight == 6 == sum(part[1] for part in parts)
    np.testing.assert_array_equal(dy, np.concatenate([part[2] for part in parts]))


@every_loss
def test_a_weight_counts_as_so_many_rows(loss: Loss, data) -> None:
    y, labels = data()
    times = np.array([0, 1, 2, 0, 3, 1])
    total, weight, dy = loss(y, labels, times.astype(y.dtype))
    repeated = loss(np.repeat(y, times, axis=0), np.repeat(labels, times, axis=0))
    assert total == pytest.approx(repeated[0], rel=1e-12)
    assert weight == repeated[1] == 7
    np.testing.assert_allclose(dy, loss(y, labels)[2] * times.reshape(-1, *[1] * (y.ndim - 1)), rtol=1e-12)


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:divide by zero")
def test_a_row_of_weight_0_may_have_any_output() -> None:
    total, weight, dy = softmax_cross_entropy(
        np.array([[np.inf, 0.0], [0.0, 0.0]]), np.array([1, 0]), np.array([0.0, 2.0])
    )
    assert (total, weight, dy.tolist()) == (pytest.approx(2 * math.log(2)), 2, [[0, 0], [-1, 1]])


@every_loss
def test_arguments_are_not_written(loss: Loss, data) -> None:
    y, labels = data()
    y.flags.writeable = labels.flags.writeable = False
    loss(y, labels)


@every_loss
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradient_has_the_kind_of_the_output(loss: Loss, data, dtype: str) -> None:
    y, labels = data()
    assert loss(y.astype(dtype), labels)[2].dtype == dtype


@every_loss
@pytest.mark.filterwarnings("error")
def test_no_rows_cost_nothing(loss: Loss, data) -> None:
    y, labels = data(0)
    total, weight, dy = loss(y, labels)
    assert (total, weight, dy.shape) == (0, 0, y.shape)


def test_cross_entropy_by_hand() -> None:
    y = np.log(np.array([[1.0, 3.0], [1.0, 1.0]]))
    total, weight, dy = softmax_cross_entropy(y, np.array([1, 0]))
    assert total == pytest.approx(math.log(4 / 3) + math.log(2))
    assert weight == 2
    np.testing.assert_allclose(dy, [[0.25, -0.25], [-0.5, 0.5]])


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_label_of_minus_one_weighs_nothing_whatever_the_output_is() -> None:
    y = np.array([[[0.0, 0.0], [np.nan, 1.0]], [[np.inf, 0.0], [0.0, np.log(3)]]])
    total, weight, dy = softmax_cross_entropy(y, np.array([[0, -1], [-1, 1]]))
    assert total == pytest.approx(math.log(2) + math.log(4 / 3))
    assert weight == 2
    np.testing.assert_allclose(dy, [[[-0.5, 0.5], [0, 0]], [[0, 0], [0.25, -0.25]]])


def test_cross_entropy_in_blocks_is_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = softmax_cross_entropy(*tokens())
    monkeypatch.setattr("mpiml.nn.tiling.tiles.__defaults__", (100,))
    total, weight, dy = softmax_cross_entropy(*tokens())
    assert (total, weight) == whole[:2]
    np.testing.assert_array_equal(dy, whole[2])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.filterwarnings("error")
def test_large_outputs_stay_finite(dtype: str) -> None:
    y = np.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], dtype)
    total, _, dy = softmax_cross_entropy(y, np.array([1, 0]))
    assert total == pytest.approx(2e4 + math.log(3), rel=1e-6)
    np.testing.assert_allclose(dy, [[1, -1, 0], [-2 / 3, 1 / 3, 1 / 3]], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.filterwarnings("error")
def test_binary_cross_entropy_by_hand_also_of_large_outputs(dtype: str) -> None:
    y = np.array([[0.0, math.log(3)], [1e4, -1e4]], dtype)
    total, weight, dy = binary_cross_entropy(y, np.array([[1, 0], [1, 1]]))
    assert total == pytest.approx((math.log(2) + math.log(4)) / 2 + 1e4 / 2, rel=1e-6)
    assert weight == 2
    np.testing.assert_allclose(dy, [[-0.25, 0.375], [0, -0.5]], rtol=1e-6)


@pytest.mark.filterwarnings("error")
def test_probabilities_of_large_outputs() -> None:
    np.testing.assert_allclose(sigmoid(np.array([-1e4, 0, math.log(3), 1e4])), [0, 0.5, 0.75, 1])
    np.testing.assert_allclose(softmax(np.array([[1e4, 0], [0, math.log(3)]])), [[1, 0], [0.25, 0.75]])


def test_squared_error_by_hand() -> None:
    total, weight, dy = mean_squared_error(np.array([[1.0, 2.0], [0.0, 4.0]]), np.array([[0.0, 2.0], [2.0, 1.0]]))
    assert total == pytest.approx(1 / 2 + (4 + 9) / 2)  # a mean over the outputs of a row, a sum over rows
    assert weight == 2
    np.testing.assert_allclose(dy, [[1, 0], [-2, 3]])


def test_squared_error_takes_one_number_a_row() -> None:
    total, _, dy = mean_squared_error(np.array([[1.0], [5.0]]), np.array([0.0, 2.0]))
    assert total == 1 + 9
    np.testing.assert_array_equal(dy, [[2], [6]])


def test_accuracy_by_hand_and_in_parts() -> None:
    y = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    labels, metric = np.array([1, 1, 1, 0]), Accuracy()
    assert metric.value(metric.sums(y, labels)) == 0.75
    parts = [metric.sums(y[a:b], labels[a:b]) for a, b in ((0, 1), (1, 1), (1, 4))]
    assert all(len(part) == metric.columns for part in parts)
    assert metric.value(sum(parts)) == 0.75


def test_accuracy_counts_tokens_that_are_not_masked() -> None:
    y = np.array([[[0.1, 0.9], [0.8, 0.2]], [[0.3, 0.7], [0.6, 0.4]]])
    metric = Accuracy()
    np.testing.assert_array_equal(metric.sums(y, np.array([[1, -1], [0, 0]])), [2, 3])


def test_r2_by_hand() -> None:
    # Truth 1, 2, 3, 4 has spread 5; errors 0, 1, 0, 1 leave 2 of it.
    metric = R2(1)
    sums = metric.sums(np.array([[1.0], [3.0], [3.0], [3.0]]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert metric.value(sums) == pytest.approx(1 - 2 / 5)


def test_r2_is_the_mean_over_outputs_and_adds_up() -> None:
    y, labels = values(20)
    residual, spread = np.sum((y - labels) ** 2, axis=0), np.sum((labels - labels.mean(axis=0)) ** 2, axis=0)
    metric = R2(3)
    parts = [metric.sums(y[a:b], labels[a:b]) for a, b in ((0, 7), (7, 7), (7, 20))]
    assert all(len(part) == metric.columns for part in parts)
    assert metric.value(sum(parts)) == pytest.approx(np.mean(1 - residual / spread))


def test_r2_of_all_values_together_is_around_their_common_mean() -> None:
    y, labels = fields(20)
    labels = labels + np.arange(6).reshape(2, 3)  # means that differ
    metric = R2(1)
    parts = [metric.sums(y[a:b], labels[a:b]) for a, b in ((0, 7), (7, 20))]
    assert metric.columns == len(parts[0]) == 4
    expected = 1 - np.sum((y - labels) ** 2) / np.sum((labels - labels.mean()) ** 2)
    assert metric.value(sum(parts)) == pytest.approx(expected)


def test_labels_of_0_and_1_by_hand() -> None:
    y, labels = np.array([[0.1, -0.1], [0.0, -3.0], [-1.0, 2.0]]), np.array([[1, 0.4], [0.5, 1], [0, 0.6]])
    each, rows = BinaryAccuracy(), ExactMatch()
    np.testing.assert_array_equal(each.sums(y, labels), [5, 6])
    np.testing.assert_array_equal(rows.sums(y, labels), [2, 3])
    np.testing.assert_array_equal(each.sums(y[:, :1], labels[:, 0]), [3, 3])
    assert (each.name, rows.name, rows.value([2, 3])) == ("accuracy", "exact_match", 2 / 3)


@pytest.mark.parametrize(("guess", "score"), [(0.1, 1.0), (0.2, 0.0)])
@pytest.mark.filterwarnings("error")
def test_r2_of_a_constant(guess: float, score: float) -> None:
    # 0.1 has no exact binary form, so that sums of squares differ from the square of the sum in the last bits.
    metric = R2(1)
    assert metric.value(metric.sums(np.full((7, 1), guess), np.full(7, 0.1))) == score


@pytest.mark.parametrize("metric", [Accuracy(), R2(2), ExactMatch()], ids=lambda metric: metric.name)
@pytest.mark.filterwarnings("error")
def test_a_score_of_no_rows_is_no_number(metric) -> None:
    assert math.isnan(metric.value([0.0] * metric.columns))
