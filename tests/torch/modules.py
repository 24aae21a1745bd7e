"""What tests of DataParallel share: inputs, modules, ways to a gradient, and means by the MPI library."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
from mpi4py import MPI

torch = pytest.importorskip("torch")
nn = torch.nn

from mpiml.torch import DataParallel, rank  # noqa: E402

WORLD = MPI.COMM_WORLD
LAST = WORLD.size - 1
several_ranks = pytest.mark.skipif(WORLD.size == 1, reason="one rank alone")


def rows(count: int = 6, features: int = 5, seed: int = 0) -> Any:
    """Inputs of this rank."""
    return torch.randn(count, features, generator=torch.Generator().manual_seed(100 * seed + rank()))


def perceptron() -> Any:
    """With values of its own on each rank."""
    torch.manual_seed(rank())
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def mean(gradients: Any, weight: float = 1.0, total: float = WORLD.size) -> list[Any]:
    """The mean of each over the ranks, where None counts as zero."""
    return [WORLD.allreduce(0.0 if g is None else weight * g.detach().to_dense().double()) / total for g in gradients]


def gradients(module: Any) -> list[Any]:
    return [parameter.grad for parameter in module.parameters() if parameter.requires_grad]


def close(ours: list[Any], theirs: list[Any], rtol: float = 1e-5) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), torch.as_tensor(other).double(), rtol=rtol, atol=1e-6)


def check(module: Any, act: Callable[[Any], None], rtol: float = 1e-5) -> Any:
    """What `act` does with the module leaves the mean of what it does with a copy on each rank. Returns the wrapper."""
    net = DataParallel(module)
    local = copy.deepcopy(net.module)
    act(net)
    act(local)
    close(gradients(net), mean(gradients(local)), rtol)
    return net


class Branches(nn.Module):
    """Each rank uses another branch; one is used by nobody, one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(5, 2) for _ in range(4))
        self.frozen = nn.Linear(5, 2).requires_grad_(False)

    def forward(self, x: Any, which: int) -> Any:
        return (self.branches[which] if which < 4 else self.frozen)(x)


class Uncounted(nn.Module):
    """Buffers that change in ways that PyTorch does not count: a codebook, as many write it, a frozen copy that follows
    a weight, and statistics of its own. `late`: from the fourth forward pass on."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.linear, self.copied = nn.Linear(5, 5), nn.Linear(5, 5).requires_grad_(False)
        self.begins, self.calls = 4 if late else 1, 0
        for name in ("mean", "size", "constant"):
            self.register_buffer(name, torch.full((5,), 1 / 3))
        self.register_buffer("var", torch.ones(5))

    def forward(self, x: Any) -> Any:
        self.calls += 1
        y = self.linear(x)
        if self.training and self.calls >= self.begins:
            self.size.data.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
            self.copied.weight.data.mul_(0.5).add_(0.5 * self.linear.weight.data * x.mean())
            y = nn.functional.batch_norm(y, self.mean, self.var, training=True)
        return y * self.constant


class Twice(nn.Module):
    """Uses each parameter twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x: Any) -> Any:
        return self.inner(torch.relu(self.inner(x)))


def accumulated(net: Any) -> None:
    for seed in range(3):
        net(rows(seed=seed)).square().sum().backward()


def several_forwards(net: Any) -> None:
    (net(rows()) * net(rows(seed=1))).sum().backward()


def not_synchronised(net: Any) -> None:
    with net.no_sync() if hasattr(net, "no_sync") else contextlib.nullcontext():
        net(rows(seed=3)).sum().backward()
        net(rows(seed=4)).square().sum().backward()
    net(rows(seed=5)).square().sum().backward()
