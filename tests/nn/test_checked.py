"""A loss and a metric of the user's own: one that does not fit is refused in words that say what is needed."""

from __future__ import annotations

import numpy as np
import pytest

from mpiml.config import Config
from mpiml.errors import ConfigError
from mpiml.nn.checked import OwnLoss, Sample
from mpiml.training.model import build_loss, build_metric
from mpiml.training.task import Task

Y = np.zeros((2, 3))
SAMPLE = Sample(Y, Y)
TASK = Task((5,), (3,), False, 3, 0)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("five", ["--loss tests.usercode:five: must be a function, but is int", "called with (y, labels)"]),
        ("alone", ["--loss tests.usercode:alone(y): too many positional arguments", "called with (y, labels)"]),
        ("one_number", ["--loss tests.usercode:one_number", "returns 1.0", "(sum of weight x loss, sum of weights,"]),
        ("negative", ["--loss tests.usercode:negative", "-1 as sum of weights", "finite and not negative"]),
        ("endless", ["--loss tests.usercode:endless", "inf as sum of weights"]),
        ("no_weight", ["--loss tests.usercode:no_weight", "as sum of weights None; a number is needed"]),
        ("no_total", ["--loss tests.usercode:no_total", "as sum of losses ndarray of shape (2, 3)"]),
        ("of_one_row", ["--loss tests.usercode:of_one_row", "gradient of shape (1, 3) for outputs of shape (2, 3)"]),
    ],
)
def test_losses_that_are_none(loss: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        build_loss(Config(loss=f"tests.usercode:{loss}"), SAMPLE)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("five", ["--metric tests.usercode:five: must be a function, but is int", "called with (outputs)"]),
        ("absolute", ["absolute(y, labels): missing a required argument: 'labels'", "called with (outputs)"]),
        ("known", ["--metric tests.usercode:known", "called 'test_loss'", "result.json"]),
        ("nameless", ["--metric tests.usercode:nameless", "called ''"]),
        ("uncounted", ["--metric tests.usercode:uncounted", "columns is 2.0"]),
        ("fewer", ["--metric tests.usercode:fewer", "sums returns 2 values, but columns is 3"]),
        ("more", ["--metric tests.usercode:more", "sums returns 2 values, but columns is 1"]),
        ("of_labels", ["--metric tests.usercode:of_labels: sums(y)", "called with (y, labels)"]),
        ("of_nothing", ["--metric tests.usercode:of_nothing: value()", "called with (totals)"]),
        ("word", ["--metric tests.usercode:word", "value returns 'word'; a number is needed"]),
        ("vector", ["--metric tests.usercode:vector", "value returns ndarray of shape (2,)"]),
    ],
)
def test_metrics_that_are_none(metric: str, words: list[str]) -> None:
    def used() -> None:
        made = build_metric(Config(metric=f"tests.usercode:{metric}"), TASK, SAMPLE)
        made.value(made.sums(Y, Y))

    with pytest.raises(ConfigError) as error:
        used()
    assert all(word in str(error.value) for word in words), str(error.value)


def test_what_a_users_function_raises_stays_what_it_is() -> None:
    loss = build_loss(Config(loss="tests.usercode:absolute"), SAMPLE)
    with pytest.raises(AttributeError):
        loss(Y, None)  # type: ignore[arg-type]


def test_a_loss_that_rows_of_zeros_break_is_left_to_the_rows_to_come() -> None:
    loss = OwnLoss("tests.usercode:picky", Sample(Y, Y))
    assert loss(Y + 1, Y + 1)[0] == 0
    with pytest.raises(ZeroDivisionError):
        loss(Y, Y)


def test_a_trial_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    OwnLoss("tests.usercode:dividing", SAMPLE)
    assert not recwarn.list


def test_weights_are_a_third_argument() -> None:
    weights = np.array([1.0, 3.0])
    loss = OwnLoss("tests.usercode:weighted", Sample(Y, Y, weights))
    assert loss(Y + 1, Y, weights)[:2] == (12, 4)
    assert OwnLoss("tests.usercode:weighted", SAMPLE)(Y + 1, Y)[:2] == (6, 2)  # rows without weights weigh 1
    with pytest.raises(ConfigError, match=r"^--loss tests.usercode:absolute: rows have weights, .* third argument"):
        OwnLoss("tests.usercode:absolute", Sample(Y, Y, weights))
    with pytest.raises(ConfigError, match="rows have weights, but it takes none"):
        OwnLoss("tests.usercode:to_the_power", Sample(Y, Y, weights))  # whose third argument is another one


def test_generators_that_a_loss_and_a_metric_draw_from_are_known() -> None:
    assert OwnLoss("tests.usercode:absolute", SAMPLE).draws == frozenset()
    state = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    assert OwnLoss("tests.usercode:drawing", SAMPLE).draws == {"NumPy"}
    assert build_metric(Config(metric="tests.usercode:Drawing"), TASK, SAMPLE).draws == {"Python"}  # type: ignore[attr-defined]
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # type: ignore[index]
