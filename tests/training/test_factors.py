"""--rates: what patterns select, what is refused, and that values move as they should."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpiml.config import Config
from mpiml.errors import ConfigError
from mpiml.nn import base as nn
from mpiml.nn.layers import BatchNorm2d, Conv2d, Flatten, Layer, Linear, ReLU, Residual
from mpiml.nn.parameters import Gradients, Layout
from mpiml.training import factors
from mpiml.training.model import model_for
from mpiml.training.resolve import resolve
from mpiml.training.stages import cut
from mpiml.training.task import Task


def convolutions() -> list[Layer]:
    return [Conv2d(2, 4, 3), BatchNorm2d(4), ReLU(), Residual(Conv2d(4, 4, 3)), Flatten(), Linear(36, 3)]


def layers_with(*rates: str, model: Any = None) -> list[Layer]:
    return model_for(Config(rates=rates), Task((3, 3, 2), (), True, 3, 0), model or convolutions())


def rates_of(*rates: str) -> dict[str, float]:
    return {p.name.removeprefix("layers."): p.rate for p in nn.parameters(layers_with(*rates)) if p.rate != 1}


def test_the_last_pattern_that_selects_a_parameter_counts() -> None:
    assert rates_of() == {}
    assert rates_of("layers.0=0", "layers.5=10") == {"0.weight": 0, "0.bias": 0, "5.weight": 10, "5.bias": 10}
    assert rates_of("*.bias=0.5", "layers.1.*=1") == {"0.bias": 0.5, "3.layers.0.bias": 0.5, "5.bias": 0.5}
    head = {"0.weight", "0.bias", "1.gain", "1.bias", "3.layers.0.weight", "3.layers.0.bias"}
    assert rates_of("*=0", "layers.5=1") == dict.fromkeys(head, 0)
    assert rates_of("layers.0=0", "layers.0.weight = 2e-1") == {"0.weight": 0.2, "0.bias": 0}


def test_layers_that_are_used_again_begin_anew() -> None:
    made = convolutions()
    assert not layers_with("layers.0=0", model=made)[0].weight.optimised  # type: ignore[attr-defined]
    assert all(parameter.rate == 1 for parameter in nn.parameters(layers_with(model=made)))


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ("layers.0", "layers.0: must be PATTERN=X, such as layers.1=0"),
        ("=1", "=1: must be PATTERN=X"),
        ("layers.0=", "layers.0=: the factor must be a finite number, at least 0"),
        ("layers.0=-1", "layers.0=-1: the factor must be"),
        ("layers.0=nan", "layers.0=nan: the factor must be"),
        ("layers.0=inf", "layers.0=inf: the factor must be"),
        ("layers.5=x", "layers.5=x: the factor must be"),
        ("layer.3=0", "layer.3=0: selects no parameter; close to it are layers.0, layers.1, layers.5"),
        ("layers.0.wieght=2", "layers.0.wieght=2: selects no parameter; close to it are .*layers.0.weight"),
        ("gian=2", "gian=2: selects no parameter; close to it are gain$"),
        ("x*y=2", "selects no parameter; there are layers.0, layers.1, layers.3, layers.5$"),
        (
            "*.running_*=0",
            r"selects running averages alone \(layers.1.running_mean, layers.1.running_variance\), which",
        ),
        ("*=0", r"\*=0: no parameter is left to train$"),
    ],
)
def test_bad_rates_are_refused_in_a_line(rates: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^--rates .*{words}") as error:
        layers_with(rates)
    assert "\n" not in str(error.value)


def test_they_are_looked_at_before_the_data_are() -> None:
    with pytest.raises(ConfigError, match=r"^--rates layers.0: must be PATTERN=X"):
        resolve(Config(rates=("layers.0",)), 10, True, 1)


def test_a_module_that_is_used_again_begins_anew() -> None:
    """In a program that trains the same object twice, each time another part."""
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(18, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    for part in (1, 3):
        layers = layers_with("*=0", f"layers.{part}=1", model=module)
        trained = [parameter.name for parameter in nn.parameters(layers) if parameter.optimised]
        assert trained == [f"layers.{part}.weight", f"layers.{part}.bias"]
        layout = Layout(nn.parameters(layers), "float32")
        layout.bind(layout.zeros() + np.float32(0.01))
        y, backward = nn.forward(layers, np.ones((2, 3, 3, 2), np.float32), nn.At(training=True))
        backward(np.ones_like(y), grads := Gradients(layout, layout.zeros(gradients=True)))
        assert grads.vector.any()


def test_notes_say_which_part_has_another_rate() -> None:
    assert factors.notes(layers_with()) == []
    assert factors.notes(layers_with("layers.0=0", "layers.5=10")) == [
        "not trained, by --rates: 2 of 8 parameters, 76 of 343 values",
        "learning rate times 10, by --rates: 2 of 8 parameters, 111 of 343 values",
    ]


def stages_of(*rates: str, cuts: tuple[int, ...]) -> list[tuple[bool, int, list[bool]]]:
    config = Config(rates=rates, pipe=len(cuts) + 1, cuts=cuts)
    designs = cut(config, model_for(config, Task((3, 3, 2), (), True, 3, 0), convolutions()), (3, 3, 2))
    return [(one.learned, one.layout.updated, [layer.needs_dx for layer in one.layers]) for one in designs]


def test_what_is_frozen_at_the_beginning_needs_no_gradient() -> None:
    """But running averages do, by which they are told that a backward pass has come."""
    first, second, last = stages_of("layers.0=0", "layers.1=0", "layers.3=0", cuts=(1, 3))
    assert first == (False, 0, [False])
    assert second == (False, 2 * 16, [False, False])
    assert last == (True, 16 + 112, [False, False, False])
    assert stages_of("layers.0=0", cuts=(2,))[1] == (True, 16 + 144 + 16 + 112, [True] * 4)


def test_many_factors_are_one_line() -> None:
    rates = ("layers.0.weight=0.2", "layers.0.bias=0.3", "layers.1.gain=0.4", "layers.1.bias=0.5", "layers.3=0")
    four = factors.notes(layers_with(*rates))
    assert len(four) == 5
    assert four[0].startswith("not trained, by --rates: 2 of 8 parameters, ")
    assert four[1].startswith("learning rate times 0.2, by --rates: 1 of 8 parameters, ")
    none, some = factors.notes(layers_with(*rates, "layers.5=0.6"))
    assert none == four[0]
    assert some.startswith("learning rate times 0.2 to 0.6, by --rates: 6 of 8 parameters, ")
