"""What is trained: models, losses and metrics by name, one's own among them, and labels that fit them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpiml.config import Config
from mpiml.errors import ConfigError
from mpiml.nn.base import At
from mpiml.nn.checked import OwnLoss, Sample
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
    name,
)
from mpiml.nn.losses import (
    R2,
    Accuracy,
    BinaryAccuracy,
    ExactMatch,
    binary_cross_entropy,
    mean_squared_error,
    softmax_cross_entropy,
)
from mpiml.nn.parameters import Parameter
from mpiml.training.model import (
    build_loss,
    build_metric,
    build_scoring,
    described,
    model_for,
    objective,
    outputs_for,
)
from mpiml.training.resolve import resolve
from mpiml.training.task import Task

DIGITS = Task((64,), (), True, 3, 5)


def layers(labels: tuple[int, ...] = (), shape: tuple[int, ...] = (64,), **settings: object) -> list[Layer]:
    return model_for(Config(**settings), Task(shape, labels, True, 3, 5), None)  # type: ignore[arg-type]


def kinds(layers: list[Layer], kind: type[Layer]) -> list[Layer]:
    return [layer for layer in layers if isinstance(layer, kind)]


def test_settings_reach_the_model() -> None:
    perceptron = layers(hidden=(7, 8), dropout=0.1)
    assert [layer.outputs for layer in kinds(perceptron, Linear)] == [7, 8, 3]
    assert len(kinds(perceptron, Dropout)) == 2
    images = layers(model="cnn", channels=5, dropout=0.1)
    assert [layer.outputs for layer in kinds(images, Conv2d)] == [5, 10]
    assert len(kinds(images, Dropout)) == 1
    assert [type(layer) for layer in layers(model="cnn", norm="batch")].count(BatchNorm2d) == 2
    residual = layers(model="resnet", channels=8, blocks=3, dropout=0.1)
    assert [layer.outputs for layer in kinds(residual, Conv2d)] == [8, 16, 32]
    assert len(kinds(residual, Residual)) == 9
    assert len(kinds(residual, Dropout)) == 1
    assert kinds(residual, GroupNorm)
    assert not kinds(residual, BatchNorm2d)
    assert kinds(layers(model="resnet", norm="batch"), BatchNorm2d)
    tokens = layers((64,), model="gpt", blocks=3, width=12, heads=6, dropout=0.1)
    assert (tokens[0].tokens, tokens[0].features) == (5, 12) if isinstance(tokens[0], Embedding) else False
    assert len(kinds(tokens, Residual)) == 6
    _, attention, dropout = tokens[2].inner()
    assert isinstance(attention, CausalSelfAttention)
    assert attention.heads == 6
    assert isinstance(dropout, Dropout)


def test_a_model_of_ones_own() -> None:
    own = layers(model="tests.usercode:model")
    assert [layer.outputs for layer in kinds(own, Linear)] == [6, 3]
    assert [layer.path for layer in own] == ["layers.0", "layers.1", "layers.2"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "tests.usercode:broken"}, ["does not fit the data", "99", "(64,)"]),
        ({"model": "tests.usercode:nothing"}, ["list of layers", "NoneType"]),
        ({"model": "tests.usercode:empty"}, ["no layers"]),
        ({"model": "tests.usercode:five"}, ["list of layers", "int"]),
        (
            {"model": "tests.usercode:alone"},
            ["--model tests.usercode:alone(y): too many positional arguments", "called with (shape, outputs)"],
        ),
        ({"model": "tests.usercode:modle"}, ["--model tests.usercode:modle", "modle"]),
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
    assert model_for(Config(model="gpt"), DIGITS, given) == given
    assert len(model_for(Config(model="gpt"), DIGITS, lambda shape, outputs: given)) == 1
    with pytest.raises(ConfigError, match="no layers"):
        model_for(Config(), DIGITS, [])


def test_any_shape_will_do_where_loss_and_metric_are_ones_own() -> None:
    own = {"model": "tests.usercode:model", "loss": "my:loss", "metric": "my:metric"}
    assert len(layers((64,), **own)) == 3
    with pytest.raises(
        ConfigError, match=r"rows of shape \(3,\), but the labels need \(64, 3\); for labels of 0 and 1"
    ):
        layers((64,), **own | {"metric": "accuracy"})
    with pytest.raises(
        ConfigError, match=r"need \(3, 3\); for labels of 0 and 1, each by itself, --loss bce; for values"
    ):
        layers((3,), **own | {"metric": "accuracy"})


def test_labels_that_may_be_one_hot_are_said_to_be() -> None:
    with pytest.raises(ConfigError, match=r"for values, --loss mse; one-hot labels: store y.argmax\(1\)$"):
        outputs_for(Config(), Task((9,), (3,), True, 2, 0), [Linear(9, 2)], (2,))


@pytest.mark.parametrize(
    ("task", "shape", "words"),
    [
        (Task((6,), (), True, 2, 0), (1,), r"need \(2,\); for one output a row, --loss bce if labels are 0 and 1"),
        (Task((6,), (4,), True, 2, 0), (4,), "each by itself, --loss bce; .*; one-hot labels: store"),
        (Task((6,), (), False, 1, 0), (2,), "labels are values, one output each: if they are classes, make them int"),
    ],
)
def test_outputs_that_do_not_fit_are_refused_with_what_may_help(task: Task, shape: tuple, words: str) -> None:
    config = Config(loss="my:loss", metric="accuracy")
    with pytest.raises(ConfigError, match=f"{words}.*; with a --metric of your own, too, outputs may have any shape"):
        model_for(config, task, [Linear(6, *shape)])


def test_token_ids_are_as_many_as_the_data_say() -> None:
    assert Task((9,), (9,), True, 7, 5).vocabulary == 7  # for a label of each token may be the next input
    assert Task((9,), (), True, 7, 5).vocabulary == 5
    assert Task((9,), (), True, 7, 0).vocabulary == 0
    assert Task((9,), (9,), False, 9, 5).vocabulary == 5
    assert Task((9, 9), (9, 9), True, 7, 5).vocabulary == 5  # images with masks


VALUES = Task((4,), (4,), False, 4, 0)
SAMPLE = Sample(np.zeros((2, 1)), np.zeros(2))


def test_losses_by_name() -> None:
    assert build_loss(Config(loss="cross_entropy"), SAMPLE) is softmax_cross_entropy
    assert build_loss(Config(loss="mse"), SAMPLE) is mean_squared_error
    assert build_loss(Config(loss="bce"), SAMPLE) is binary_cross_entropy
    total, weight, dy = build_loss(Config(loss="tests.usercode:absolute"), SAMPLE)(
        np.array([[1.0], [5.0]]), np.array([3.0, 4.0])
    )
    assert (total, weight, dy.tolist()) == (3, 2, [[-1], [1]])


def test_metrics_by_name() -> None:
    def metric(name: str, task: Task = VALUES) -> Any:
        return build_metric(Config(metric=name), task, SAMPLE)

    assert isinstance(metric("accuracy", DIGITS), Accuracy)
    assert type(metric("accuracy")) is BinaryAccuracy
    assert isinstance(metric("exact_match"), ExactMatch)
    assert metric("r2").outputs == 4
    assert metric("r2", Task((4,), (2, 2), False, 4, 0)).outputs == 1  # of fields, all values together
    assert metric("tests.usercode:Largest").metric.outputs == 4
    own = metric("tests.usercode:Places.best")
    assert (own.name, own.columns, own.sums(np.ones((2, 4)), np.ones(2)), own.value([3])) == ("largest", 1, [1], 3)
    with pytest.raises(ConfigError, match=r"--metric tests.usercode:Places: Places has no name"):
        metric("tests.usercode:Places")


def test_the_objective_is_a_row_of_the_step_record() -> None:
    loss = build_loss(Config(loss="tests.usercode:absolute"), SAMPLE)
    score = objective(loss, R2(1))
    y, labels = np.array([[1.0], [5.0]], np.float32), np.array([3.0, 4.0], np.float32)
    assert score(y, labels, None, False, At(True))[0] == [3, 2]
    row, dy = score(y, labels, None, True, At(True))
    assert row == [3, 2, 2, 7, 25, 5]
    assert dy.dtype == np.float32  # whatever the loss makes of it


def test_what_a_loss_and_a_metric_draw_is_a_function_of_step_and_micro_batch() -> None:
    loss, y, labels = OwnLoss("tests.usercode:drawing", SAMPLE), np.zeros((2, 1)), np.zeros(2)
    score = objective(loss, build_metric(Config(metric="tests.usercode:Drawing"), VALUES, SAMPLE))
    rows = [score(y, labels, None, True, At(True, 5, step, m))[0] for step, m in ((1, 0), (1, 1), (2, 0), (1, 0))]
    assert rows[0] == rows[3]
    assert len({row[0] for row in rows}) == len({row[2] for row in rows}) == 3
    assert score(y, labels, None, True, At(True, 6, 1, 0))[0][0] != rows[0][0]


def test_outputs_and_labels_meet_in_what_scores_them() -> None:
    layers: list[Layer] = [Linear(5, 3)]
    name(layers)
    for loss, metric in (("cross_entropy", "accuracy"), ("tests.usercode:counting", "accuracy")):
        config = Config(loss=loss, metric=metric, dtype="float64")
        scoring = build_scoring(config, Task((5,), (1,), True, 3, 0), layers)
        y, labels = np.eye(3)[[0, 2]], np.array([[0], [1]])
        assert scoring.metric.value(scoring.metric.sums(y, labels)) == 0.5
        assert scoring.loss(y, labels)[1] == 2
    values = build_scoring(Config(loss="mse", metric="r2"), Task((5,), (3, 1), False, 3, 0), layers)
    assert values.loss is mean_squared_error
    assert values.metric.columns == 4


@pytest.mark.parametrize(
    ("settings", "classification", "loss", "metric"),
    [
        ({}, True, "cross_entropy", "accuracy"),
        ({}, False, "mse", "r2"),
        ({"loss": "a:b"}, True, "a:b", "accuracy"),
        ({"metric": "a:b"}, False, "mse", "a:b"),
        ({"loss": "mse", "metric": "r2"}, False, "mse", "r2"),
        ({"loss": "mse"}, True, "mse", "r2"),
        ({"metric": "r2"}, True, "mse", "r2"),
        ({"loss": "bce"}, True, "bce", "accuracy"),
        ({"loss": "bce"}, False, "bce", "accuracy"),
        ({"loss": "bce", "metric": "exact_match"}, True, "bce", "exact_match"),
        ({"metric": "exact_match"}, False, "bce", "exact_match"),
        ({"loss": "a:b", "metric": "exact_match"}, True, "a:b", "exact_match"),
        ({"loss": "a:b", "metric": "accuracy"}, False, "a:b", "accuracy"),
        ({"loss": "a:b", "metric": "r2"}, True, "a:b", "r2"),
        ({"loss": "a:b"}, False, "a:b", "r2"),
    ],
)
def test_loss_and_metric_follow_the_labels(settings: dict, classification: bool, loss: str, metric: str) -> None:
    config = resolve(Config(**settings), 50, classification, 1)
    assert (config.loss, config.metric) == (loss, metric)


@pytest.mark.parametrize(
    ("settings", "classification", "words"),
    [
        ({"loss": "cross_entropy"}, False, ["--loss cross_entropy", "not integers"]),
        ({"loss": "cross_entropy", "metric": "r2"}, True, ["--metric r2: --loss cross_entropy needs accuracy"]),
        ({"metric": "accuracy"}, False, ["--metric accuracy: --loss mse needs r2"]),
        ({"loss": "mse", "metric": "accuracy"}, True, ["--metric accuracy: --loss mse needs r2"]),
        ({"loss": "bce", "metric": "r2"}, True, ["--metric r2: --loss bce needs accuracy or exact_match"]),
        ({"loss": "bce", "ignore": 255}, True, ["--ignore 255: the labels are values"]),
        ({"loss": "mse", "classes": 3}, True, ["--classes 3: the labels are values"]),
        ({"classes": 3}, False, ["--classes 3: the labels are values"]),
    ],
)
def test_loss_and_metric_must_fit_the_labels(settings: dict, classification: bool, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(Config(**settings), 50, classification, 1)
    assert all(word in str(error.value) for word in words)


def test_what_ranks_compare_of_a_model_names_what_differs() -> None:
    def text(*layers: Layer, seed: int = 0) -> dict[str, str]:
        name(layers)
        return described(layers, seed)

    class Own(Layer):
        def __init__(self, values: np.ndarray):
            self.weight = Parameter(values.shape, lambda rng, count: values.reshape(-1)[:count])
            self.drawn = Parameter((3,), lambda rng, count: rng.random(count))

    def model(rate: float = 0.1, gain: float = 2.0, first: float = 0.0, seed: int = 0) -> dict[str, str]:
        values = np.arange(first, first + 6).reshape(3, 2)
        return text(Linear(4, 3, gain), Dropout(rate), Residual(Own(values)), seed=seed)

    assert model() == model()
    for settings, name_ in (
        ({"rate": 0.2}, "the model, layers.1"),
        ({"gain": 1.0}, "first values of the model, layers.0.weight"),
        ({"first": 1.0}, "first values of the model, layers.2.layers.0.weight"),
        ({"seed": 1}, "first values of the model, layers.2.layers.0.drawn"),
    ):
        other = model(**settings)
        assert [key for key, its in model().items() if its != other[key]] == [name_]
