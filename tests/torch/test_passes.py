"""Which backward passes average: all that add to gradients, wherever they begin, and no others."""

from __future__ import annotations

import gc
import types
import weakref
from typing import Any

import pytest

from mpiml.errors import ConfigError

torch = pytest.importorskip("torch")
nn = torch.nn

from mpiml.torch import DataParallel, rank  # noqa: E402
from mpiml.torch.outputs import tensors_in  # noqa: E402
from tests.torch.modules import LAST, WORLD, check, close, gradients, mean, perceptron, rows, several_ranks  # noqa: E402

pytestmark = pytest.mark.mpi


class Keeping(nn.Module):
    """It keeps its loss, and returns what no loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 3)

    def forward(self, x: Any) -> Any:
        y = self.inner(x)
        self.loss = y.square().mean()
        return y.detach()


def plain(net: Any) -> Any:
    return net.module if isinstance(net, DataParallel) else net


def kept_loss(net: Any) -> None:
    net(rows())
    plain(net).loss.backward()


def penalty_alone(net: Any) -> None:
    """A pass of gradients of gradients does not come to the outputs."""
    x = rows().requires_grad_()
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    slope.square().sum().backward()


def test_a_loss_that_the_module_keeps() -> None:
    check(Keeping(), kept_loss)


def test_a_penalty_on_gradients_alone() -> None:
    check(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3, bias=False)), penalty_alone)


@several_ranks
def test_a_second_pass_past_the_outputs_is_said_to_be_local() -> None:
    net = DataParallel(perceptron())
    net(rows()).sum().backward()
    net.zero_grad()
    with pytest.warns(UserWarning, match="stay this rank's own"):
        net.module(rows()).sum().backward()
    close(gradients(net)[-1:], [torch.full((3,), 6.0)])


@pytest.mark.parametrize("of", ["inputs", "parameters", "backward"])
def test_gradients_that_are_not_added_are_a_ranks_own(of: str) -> None:
    net = DataParallel(perceptron())
    if rank() == LAST:
        x = rows(seed=1).requires_grad_()
        y = net(x).sum()
        if of == "backward":
            y.backward(inputs=[x])
        else:
            torch.autograd.grad(y, x if of == "inputs" else list(net.parameters()))
    net(rows()).square().sum().backward()
    close(gradients(net)[-1:], mean([(2 * net.module(rows())).sum(0)]))
    assert net._average.meetings.number == (WORLD.size > 1)


class Switched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 3)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def forward(self, x: Any) -> Any:
        return self.inner(x)


def test_outputs_that_depend_on_nothing_are_an_error() -> None:
    net = DataParallel(Switched())
    kind, said = (
        (ConfigError, "what Switched returns depends on no par") if LAST else (RuntimeError, "does not require")
    )
    with pytest.raises(kind, match=said):
        net(rows()).sum().backward()


class Codebook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.book = nn.Parameter(torch.ones(5))

    def forward(self, x: Any) -> Any:
        return (x * self.book).sum(), self.book


def test_a_parameter_among_the_outputs_keeps_no_hooks() -> None:
    net = check(Codebook(), lambda net: sum(y.square().sum() for y in net(rows())).backward())
    for _ in range(3):
        net(rows())
    assert not net.module.book._backward_hooks


def test_outputs_are_looked_through_once() -> None:
    tensor = torch.ones(1)
    inner: Any = types.SimpleNamespace(y=tensor)
    for _ in range(4):
        inner = [inner, inner]
    inner.append(inner)
    assert len(list(tensors_in(inner))) == 1
    module = types.ModuleType("module")
    module.tensor = tensor  # type: ignore[attr-defined]
    assert list(tensors_in([module, 1, "text", None])) == []


def test_a_wrapper_that_is_closed_holds_nothing() -> None:
    net = DataParallel(perceptron())
    net(rows()).sum().backward()
    module, slots = weakref.ref(net.module), net._average.slots
    net.close()
    assert slots == []
    with pytest.raises(ConfigError, match=r"steps\(\) of a DataParallel that is closed"):
        next(net.steps(None))
    del net
    gc.collect()
    assert module() is None
