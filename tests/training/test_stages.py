"""How a model's stages are laid out, and what is said of them when a run starts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpiml.config import Config
from mpiml.nn import base as nn
from mpiml.nn.layers import Linear, Tanh
from mpiml.nn.parameters import Parameter, constant
from mpiml.training.stages import StageDesign, cut, remarks


class Scale(nn.Layer):
    """Computes the gradient of its parameter at once."""

    def __init__(self) -> None:
        self.factor = Parameter((1,), constant(1.0))

    def __call__(self, x: Any, at: nn.At) -> Any:
        def backward(dy: Any, grads: Any) -> Any:
            grads[self.factor][...] = np.sum(dy * x)
            return dy * self.factor.value

        return x * self.factor.value, backward


def stages(config: Config, *layers: nn.Layer) -> list[StageDesign]:
    nn.name(layers)
    return cut(config, layers, (4,))


def test_stages_that_do_whole_backward_passes_are_named() -> None:
    config = Config(schedule="zb-h1", pipe=3, cuts=(1, 2))
    made = stages(config, Linear(4, 4), Scale(), Tanh())
    assert [stage.splits for stage in made] == [True, False, True]
    assert remarks(config, made) == [
        "--schedule zb-h1: stage 1 does W right after I, because layers.1, Scale, computes all its gradients at once"
    ]


@pytest.mark.parametrize("config", [Config(schedule="1f1b", pipe=2), Config(schedule="zb-h1")])
def test_nothing_is_said_where_nothing_is_split(config: Config) -> None:
    assert remarks(config, stages(config, Linear(4, 4), Scale())) == []


@pytest.mark.parametrize(
    ("optimizer", "weight_decay", "decays"),
    [("momentum", None, False), ("adam", 0.1, True), ("adamw", None, True), ("lamb", 0.0, False)],
)
def test_a_layout_knows_whether_weights_decay(optimizer: str, weight_decay: float | None, decays: bool) -> None:
    (made,) = stages(Config(optimizer=optimizer, weight_decay=weight_decay), Linear(4, 4))
    assert made.layout.decays == decays


def test_inner_layers_decide_too() -> None:
    assert [layer.path for layer in nn.unsplit([nested()])] == ["layers.0.layers.1"]


def nested() -> nn.Layer:
    from mpiml.nn.layers import Residual

    layers = [Residual(Linear(4, 4), Scale())]
    nn.name(layers)
    return layers[0]
