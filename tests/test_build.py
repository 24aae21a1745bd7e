"""What is trained: models, losses and metrics by name, one's own among them, and labels that fit them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpiml.build import build_loss, build_metric, build_model, objective
from mpiml.config import Config
from mpiml.design import resolve
from mpiml.errors import ConfigError
from mpiml.imports import is_name, named
from mpiml.nn.layers import (
    BatchNorm2d,
    CausalSelfAttention,
    Conv2d,
    Dropout,
    Embedding,
    GroupNorm,
    Layer,
    Linear,
    Residual,
)
from mpiml.nn.losses import R2, Accuracy, mean_squared_error, softmax_cross_entropy

MINE = """
import numpy as np
from mpiml.nn.layers import Linear, Tanh

def model(shape, outputs):
    return [Linear(*shape, 6), Tanh(), Linear(6, outputs)]

def broken(shape, outputs):
    return [Linear(99, outputs)]

def nothing(shape, outputs):
    return None

def empty(shape, outputs):
    return []

def absolute(y, labels):
    error = y - labels.reshape(y.shape)
    return float(np.abs(error).sum()), float(len(y)), np.sign(error).astype(float)

class Largest:
    name, columns = "largest", 1
    def __init__(self, outputs):
        self.outputs = outputs
    def sums(self, y, labels):
        return np.array([y.max()])
    def value(self, totals):
        return totals[0]

class Places:
    best = Largest
    def __init__(self, outputs):
        pass
"""


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_of_a_test.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)


def layers(final: tuple[int, ...] | None = (3,), shape: tuple[int, ...] = (64,), **settings: object) -> list[Layer]:
    return build_model(Config(**settings), shape, 3, 5, final, None)  # type: ignore[arg-type]


def kinds(layers: list[Layer], kind: type[Layer]) -> list[Layer]:
    return [layer for layer in layers if isinstance(layer, kind)]


def test_settings_reach_the_model() -> None:
    perceptron = layers(hidden=(7, 8), dropout=0.1)
    assert [layer.outputs for layer in kinds(perceptron, Linear)] == [7, 8, 3]
    assert len(kinds(perceptron, Dropout)) == 2
    images = layers(model="cnn", channels=5, dropout=0.1)
    assert [layer.outputs for layer in kinds(images, Conv2d)] == [5, 10]
    assert len(kinds(images, Dropout)) == 1
    residual = layers(model="resnet", channels=8, blocks=3, dropout=0.1)
    assert [layer.outputs for layer in kinds(residual, Conv2d)] == [8, 16, 32]
    assert len(kinds(residual, Residual)) == 9
    assert len(kinds(residual, Dropout)) == 1
    assert kinds(residual, GroupNorm)
    assert not kinds(residual, BatchNorm2d)
    assert kinds(layers(model="resnet", norm="batch"), BatchNorm2d)
    tokens = layers((64, 3), model="gpt", blocks=3, width=12, heads=6, dropout=0.1)
    assert (tokens[0].tokens, tokens[0].features) == (5, 12) if isinstance(tokens[0], Embedding) else False
    assert len(kinds(tokens, Residual)) == 6
    _, attention, dropout = tokens[2].inner()
    assert isinstance(attention, CausalSelfAttention)
    assert attention.heads == 6
    assert isinstance(dropout, Dropout)


def test_a_model_of_ones_own() -> None:
    own = layers(model="mine_of_a_test:model")
    assert [layer.outputs for layer in kinds(own, Linear)] == [6, 3]
    assert [layer.path for layer in own] == ["layers.0", "layers.1", "layers.2"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "mine_of_a_test:broken"}, ["does not fit the data", "99", "(64,)"]),
        ({"model": "mine_of_a_test:nothing"}, ["list of layers", "NoneType"]),
        ({"model": "mine_of_a_test:empty"}, ["no layers"]),
        ({"model": "mine_of_a_test:modle"}, ["--model mine_of_a_test:modle", "modle"]),
        (
            {"model": "no_such_module_here:model"},
            ["--model no_such_module_here:model", "no module no_such_module_here"],
        ),
        ({"model": "gpt"}, ["(64, 3)", "(3,)"]),
        ({"model": "gpt", "heads": 3}, ["3 heads", "128 features"]),
        ({"model": "cnn", "shape": (65,)}, ["(65,)", "(height, width, channels)"]),
    ],
)
def test_models_that_do_not_work(settings: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        layers(**settings)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_given_model_stands_in_place_of_the_named_one() -> None:
    given = [Linear(64, 3)]
    assert build_model(Config(model="gpt"), (64,), 3, 5, (3,), given) == given
    assert len(build_model(Config(model="gpt"), (64,), 3, 5, (3,), lambda shape, outputs: given)) == 1
    with pytest.raises(ConfigError, match="no layers"):
        build_model(Config(), (64,), 3, 5, (3,), [])


def test_any_shape_will_do_where_loss_and_metric_are_ones_own() -> None:
    assert len(layers(None, model="mine_of_a_test:model")) == 3


def test_losses_by_name() -> None:
    assert build_loss(Config(loss="cross_entropy")) is softmax_cross_entropy
    assert build_loss(Config(loss="mse")) is mean_squared_error
    total, weight, dy = build_loss(Config(loss="mine_of_a_test:absolute"))(
        np.array([[1.0], [5.0]]), np.array([3.0, 4.0])
    )
    assert (total, weight, dy.tolist()) == (3, 2, [[-1], [1]])


def test_metrics_by_name() -> None:
    assert isinstance(build_metric(Config(metric="accuracy"), 4), Accuracy)
    r2 = build_metric(Config(metric="r2"), 4)
    assert isinstance(r2, R2)
    assert r2.outputs == 4
    assert build_metric(Config(metric="mine_of_a_test:Largest"), 4).outputs == 4
    assert build_metric(Config(metric="mine_of_a_test:Places.best"), 4).name == "largest"
    with pytest.raises(ConfigError, match="--metric mine_of_a_test:Places: Places has no name"):
        build_metric(Config(metric="mine_of_a_test:Places"), 4)


def test_the_objective_is_a_row_of_the_step_record() -> None:
    score = objective(build_loss(Config(loss="mine_of_a_test:absolute")), build_metric(Config(metric="r2"), 1))
    y, labels = np.array([[1.0], [5.0]], np.float32), np.array([3.0, 4.0], np.float32)
    assert score(y, labels, False)[0] == [3, 2]
    row, dy = score(y, labels, True)
    assert row == [3, 2, 2, 7, 25, 5]
    assert dy.dtype == np.float32  # whatever the loss makes of it
    with pytest.raises(ValueError, match=r"\(1,\).*\(2, 1\)"):
        objective(lambda y, labels: (0.0, 1.0, np.zeros(1)), Accuracy())(np.zeros((2, 1)), np.zeros(2), True)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("a:b", True),
        ("a.b_1:c.d", True),
        ("a", False),
        ("a:", False),
        (":a", False),
        ("a b:c", False),
        ("a:b:c", False),
    ],
)
def test_names(text: str, good: bool) -> None:
    assert is_name(text) is good


def test_what_a_name_stands_for() -> None:
    assert named("math:pi", "--loss") == np.pi


@pytest.mark.parametrize(
    ("settings", "classification", "loss", "metric"),
    [
        ({}, True, "cross_entropy", "accuracy"),
        ({}, False, "mse", "r2"),
        ({"loss": "a:b"}, True, "a:b", "accuracy"),
        ({"metric": "a:b"}, False, "mse", "a:b"),
        ({"loss": "mse", "metric": "r2"}, False, "mse", "r2"),
    ],
)
def test_loss_and_metric_follow_the_labels(settings: dict, classification: bool, loss: str, metric: str) -> None:
    config = resolve(Config(**settings), 50, classification, 1)
    assert (config.loss, config.metric) == (loss, metric)


@pytest.mark.parametrize(
    ("settings", "classification", "words"),
    [
        ({"loss": "mse"}, True, ["--loss mse", "are integers"]),
        ({"metric": "r2"}, True, ["--metric r2", "are integers"]),
        ({"metric": "accuracy"}, False, ["--metric accuracy", "not integers"]),
    ],
)
def test_loss_and_metric_must_fit_the_labels(settings: dict, classification: bool, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(Config(**settings), 50, classification, 1)
    assert all(word in str(error.value) for word in words)
