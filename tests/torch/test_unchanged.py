"""What exact steps refuse, or warn of, because the bits would depend on the number of ranks."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.errors import ConfigError, NotFiniteError
from mpiml.loop.rows import Rows

torch = pytest.importorskip("torch")
nn = torch.nn

from mpiml.torch import DataParallel  # noqa: E402
from tests.torch.modules import perceptron  # noqa: E402

pytestmark = pytest.mark.mpi
WORLD = MPI.COMM_WORLD
M = 2 * WORLD.size
X = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))


class Changing(nn.Module):
    """A linear layer that does something to itself before it is called."""

    def __init__(self, act: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.act, self.linear, self.rescaled = act, nn.Linear(5, 5), nn.Embedding(3, 5, max_norm=0.1)
        self.calls, self.cache, self.random, self.numpy = 0, None, random.Random(0), np.random.default_rng(0)
        self.register_buffer("least", torch.full((5,), float("inf")))

    def forward(self, x: Any) -> Any:
        self.act(self, x)
        return self.linear(x)


def trained(net: Any, last: int = 2, loss_of: Callable[[Any], Any] = lambda y: y.square().mean()) -> None:
    steps = net.steps(Rows(len(X), 7 * M, M, seed=3), last=last)
    try:
        for step in steps:
            for m in step:
                net.backward(loss_of(net(X[m.rows])), m)
            net.step(torch.optim.SGD(net.parameters(), lr=0.1))
    finally:
        steps.close()
        net._average.sum.drop()


def warned(net: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trained(net, last=4)
    return [text for each in said if "bits on the number of ranks" in (text := str(each.message))]


def first_values(self: Any, x: Any) -> None:
    if not self.calls:
        self.linear.bias.data.copy_(-x.mean(0))
    self.calls = 1


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (first_values, "linear.bias"),
        (lambda self, _: self.linear.weight.data.clamp_(-0.1, 0.1), "linear.weight"),
        (lambda self, _: self.rescaled(torch.tensor([1])), "rescaled.weight"),
        (lambda self, _: setattr(self.linear.bias, "data", self.linear.bias.data + 1), "linear.bias"),
    ],
)
def test_parameters_that_a_micro_batch_changes(act: Callable[[Any, Any], Any], name: str) -> None:
    said = rf"^step 1, micro-batch {2 * WORLD.rank} changes {name}, which only the optimizer may do"
    with pytest.raises(ConfigError, match=said):
        trained(DataParallel(Changing(act)))


@pytest.mark.parametrize(
    ("act", "name"), [(lambda self, _: self.random.random(), "random"), (lambda self, _: self.numpy.random(), "numpy")]
)
def test_generators_of_the_module(act: Callable[[Any, Any], Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^step 1, micro-batch {2 * WORLD.rank} draws from {name}: draw from the"):
        trained(DataParallel(Changing(act)))


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (lambda self, _: setattr(self, "calls", self.calls + 1), "calls"),
        (lambda self, x: setattr(self, "cache", x.mean(0)), "cache"),
    ],
)
def test_attributes_that_a_micro_batch_changes_are_named_once(act: Callable[[Any, Any], Any], name: str) -> None:
    texts = warned(DataParallel(Changing(act)))
    assert len(texts) == (WORLD.rank == 0)
    assert all(text.startswith(f"step 1, micro-batch 0 changes {name}: if what") for text in texts)


@pytest.mark.parametrize("wrap", [nn.utils.spectral_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_each_call_computes_from_parameters(wrap: Callable[[Any], Any]) -> None:
    assert warned(DataParallel(nn.Sequential(wrap(nn.Linear(5, 5))))) == []


def test_attributes_that_no_call_changes() -> None:
    net = DataParallel(Changing(lambda *_: None))
    net.module.cache = torch.empty(3, device="meta")
    assert warned(net) == []


def test_parameters_outside_of_the_module_with_an_optimizer_of_their_own() -> None:
    other = nn.Linear(5, 1)
    with pytest.raises(
        ConfigError, match=r"^step 1, micro-batch \d+: the loss depends on a parameter \(1,( 5)?\) outside"
    ):
        trained(DataParallel(perceptron()), loss_of=lambda y: other(torch.cat([y, y], 1)[:, :5]).square().mean())
    other.requires_grad_(False)
    trained(DataParallel(perceptron()), loss_of=lambda y: other(torch.cat([y, y], 1)[:, :5]).square().mean())


def test_gradients_of_other_backward_passes_are_not_added() -> None:
    """Before a step, between its micro-batches, and after them."""
    weights = []
    for others in (0, 1):
        torch.manual_seed(0)
        net = DataParallel(Changing(lambda *_: None))
        net.module.rescaled.requires_grad_()

        def elsewhere(net: Any = net, others: int = others) -> None:
            for _ in range(others):
                (net.module(X).sum() + net.module.rescaled.weight.sum()).backward()

        for step in net.steps(Rows(len(X), 7 * M, M, seed=3), last=2):
            elsewhere()
            for m in step:
                net.backward(net(X[m.rows]).square().mean(), m)
                elsewhere()
            elsewhere()
            net.step(torch.optim.SGD(net.parameters(), lr=0.1))
        weights.append({name: value.numpy().tobytes() for name, value in net.state_dict().items()})
        net.close()
    assert weights[0] == weights[1]


def running_minimum(self: Any, x: Any) -> None:
    self.least[0] = torch.minimum(self.least[0], x.min())


def overflow(self: Any, x: Any) -> None:
    self.least.copy_(x.mean(0) if self.calls < 2 else torch.full((5,), float("nan")))


def test_buffers_that_start_infinite() -> None:
    net = DataParallel(Changing(running_minimum))
    trained(net, last=3)
    assert net.module.least.isfinite().tolist() == [True, False, False, False, False]


def test_buffers_that_become_infinite_are_named() -> None:
    net = DataParallel(Changing(overflow))
    trained(net)
    net.module.calls = 2
    with pytest.raises(NotFiniteError, match=r"^step 1: the buffer least is not finite"):
        trained(net)
