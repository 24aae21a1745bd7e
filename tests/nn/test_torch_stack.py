"""Neighbouring modules that are called as one give the bits that they give one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpiml.nn import base as nn
from mpiml.nn.parameters import Gradients, Layout
from mpiml.nn.recompute import Recompute, grouped

torch = pytest.importorskip("torch")
from mpiml.nn.torch_modules import TorchLayer, as_layers  # noqa: E402
from mpiml.nn.torch_stack import TorchStack  # noqa: E402

AT = nn.At(training=True, seed=3, step=5, microbatch=2)


class Cut(torch.nn.Module):
    """Outputs that do not begin on a 64-byte boundary."""

    def forward(self, x: Any) -> Any:
        return x.flatten()[1 : 1 + x[:, 1:].numel()].view(len(x), -1)


def images() -> Any:
    """Gradients that repeat one number (mean), that are not in order (transpose), or of axes of length 1."""
    return torch.nn.Sequential(
        *(torch.nn.Conv2d(1, 6, 3, padding=1), torch.nn.BatchNorm2d(6), torch.nn.ReLU(inplace=True)),
        *(torch.nn.Dropout(0.3), torch.nn.Conv2d(6, 5, 1), torch.nn.AvgPool2d((3, 1)), torch.nn.Flatten()),
        *(
            torch.nn.Linear(45, 33),
            Cut(),
            torch.nn.Unflatten(1, (1, 32)),
            torch.nn.Linear(32, 7),
            torch.nn.Flatten(0, 1),
        ),
    )


class Last(torch.nn.Module):
    """Channels last: the gradient of its input is not in order."""

    def forward(self, x: Any) -> Any:
        return x.permute(0, 2, 3, 1)


def channels() -> Any:
    return torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), torch.nn.Conv2d(16, 16, 3), Last(), torch.nn.Linear(16, 4))


def first_frozen() -> Any:
    module = torch.nn.Sequential(torch.nn.Linear(9, 9), torch.nn.BatchNorm1d(9, affine=False), torch.nn.Linear(9, 4))
    module[0].requires_grad_(False)
    return module


def ids() -> Any:
    return torch.nn.Sequential(
        torch.nn.Embedding(5, 6), torch.nn.LayerNorm(6), torch.nn.Flatten(), torch.nn.Linear(24, 3)
    )


CASES = {
    "images": (images, (1, 9, 3)),
    "channels": (channels, (8, 9, 7)),
    "first frozen": (first_frozen, (9,)),
    "ids": (ids, (4,)),
}


def results(case: str, together: bool, learned: bool, again: bool = False) -> list[bytes]:
    """Of a forward and a backward pass in training: outputs, gradients of parameters and by the inputs."""
    module, shape = CASES[case]
    torch.manual_seed(0)
    layers = as_layers(module(), np.float32, 1)
    nn.name(layers)
    nn.stack_shapes(layers, shape)
    if not learned:
        nn.skip_first_dx(layers)
    layout = Layout(nn.parameters(layers), np.float32)
    values = layout.zeros()
    layout.bind(values)
    layout.initialise(values, 0)
    if together:
        layers = nn.stacked(layers)
        assert [type(layer) for layer in layers] == [TorchStack]
    if again:
        layers = [Recompute(*layers)]
        layers[0].needs_dx = layers[0].layers[0].needs_dx = learned and case != "ids"
    random, slot = np.random.default_rng(1), layout.zeros()
    x = random.integers(0, 5, (6, *shape)) if case == "ids" else random.standard_normal((6, *shape))
    y, backward = nn.forward(layers, x.astype(np.float32), AT, learned=learned and case != "ids")
    dx = backward(random.standard_normal(y.shape).astype(np.float32), Gradients(layout, slot))
    assert np.isfinite(slot).all()
    assert slot.any()
    return [array.tobytes() for array in (y, slot, *([] if dx is None else [dx]))]


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_bits_are_those_of_modules_one_by_one(case: str, learned: bool) -> None:
    together = results(case, True, learned)
    assert together == results(case, False, learned)
    assert len(together) == (3 if learned and case != "ids" else 2)


def test_others_stand_alone() -> None:
    """Layers of the package, and a module that draws again in its backward pass."""
    from torch.utils.checkpoint import checkpoint

    class Again(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Dropout(0.5))

        def forward(self, x: Any) -> Any:
            return checkpoint(self.inner, x, use_reentrant=False, preserve_rng_state=False)

    modules = [torch.nn.Linear(6, 6), torch.nn.Tanh(), Again(), torch.nn.Linear(6, 2)]
    layers = [*as_layers(modules, np.float32, 1), nn.Layer()]
    nn.name(layers)
    nn.stack_shapes(layers, (6,))
    assert [len(layer.inner()) for layer in nn.stacked(layers)] == [2, 0, 0, 0]


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_modules_in_recompute_give_the_same_bits(case: str, learned: bool) -> None:
    """Dropout and running averages among them."""
    assert results(case, True, learned, again=True) == results(case, True, learned)


def test_modules_of_a_users_list_may_stand_in_recompute() -> None:
    """Two that share a parameter are joined, and stand in the block of the first."""
    from mpiml.config import Config
    from mpiml.training.model import model_for
    from mpiml.training.task import Task

    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    second.weight = first.weight
    block = Recompute(torch.nn.Tanh(), torch.nn.Linear(4, 4))
    shared = Recompute(first, torch.nn.ReLU(), second)
    layers = model_for(
        Config(), Task((4,), (), True, 3, 0), [torch.nn.Linear(4, 4), block, shared, torch.nn.Linear(4, 3)]
    )
    assert [layer.path for layer in layers] == [f"layers.{index}" for index in range(5)]
    assert [layer.block for layer in layers] == [None, block, block, shared, None]
    called = grouped([layers[0], *layers[1:]])
    assert [type(layer) for layer in called] == [TorchLayer, Recompute, Recompute, TorchLayer]
    assert [type(layer) for layer in called[1].layers] == [TorchStack]
    assert [type(layer) for layer in grouped(layers, stack=False)[1].layers] == [TorchLayer, TorchLayer]
