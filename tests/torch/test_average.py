"""Means of gradients: of parameters that some ranks do not use, of several dtypes, sparse ones, and not finite ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
nn = torch.nn

from mpiml.torch import DataParallel, rank  # noqa: E402
from tests.torch.modules import (  # noqa: E402
    LAST,
    WORLD,
    Branches,
    check,
    close,
    mean,
    perceptron,
    rows,
    several_ranks,
)

pytestmark = pytest.mark.mpi


def test_parameters_used_on_some_ranks_only() -> None:
    def act(net: Any) -> None:
        net(rows(), rank() % 3).square().sum().backward()

    module = Branches()
    net = DataParallel(module)
    local = copy.deepcopy(module)
    act(net)
    act(local)
    used = [p for branch in list(module.branches)[: min(3, WORLD.size)] for p in branch.parameters()]
    of_local = [p.grad for branch in list(local.branches)[: min(3, WORLD.size)] for p in branch.parameters()]
    close([p.grad for p in used], mean(of_local))
    others = [p for p in module.parameters() if all(p is not q for q in used)]
    assert [p.grad for p in others] == [None] * len(others)
    assert len(others) >= 4


@several_ranks
def test_a_rank_without_any_gradient_takes_part() -> None:
    net = DataParallel(Branches())
    net(rows(), 0 if rank() < LAST else 4).sum().backward()
    expected = mean([rows().sum(0).expand(2, 5) if rank() < LAST else None])
    close([net.module.branches[0].weight.grad], expected)


class Kinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("float32", "float64", "bfloat16", "float16", "complex64"):
            self.register_parameter(f"of_{name}", nn.Parameter(torch.ones(3, dtype=getattr(torch, name))))
        self.number = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Any) -> Any:
        kinds = (self.of_float32 + self.of_float64 + self.of_bfloat16 + self.of_float16) * self.number
        return (x.double() * kinds * (self.of_complex64 * (1 + 2j)).abs()).sum()


def test_parameters_of_several_dtypes() -> None:
    net = DataParallel(Kinds())
    local = copy.deepcopy(net.module)
    for module in (net, local):
        module(rows(features=3)).backward()
    for (name, one), other in zip(net.module.named_parameters(), local.parameters(), strict=True):
        assert one.grad.dtype == other.grad.dtype == one.dtype
        expected = WORLD.allreduce(other.grad.to(torch.complex128)) / WORLD.size
        tolerance = {"of_bfloat16": 1e-2, "of_float16": 1e-2, "of_float64": 1e-12}.get(name, 1e-5)
        torch.testing.assert_close(one.grad.to(torch.complex128), expected, rtol=tolerance, atol=tolerance)


def test_float16_is_summed_in_float32() -> None:
    net = DataParallel(nn.Linear(1, 1, bias=False).half())
    net(torch.full((1, 1), 40000.0).half()).sum().backward()
    assert net.module.weight.grad.item() == torch.tensor(40000.0).half().item()


@several_ranks
def test_sparse_gradients_become_dense() -> None:
    net = check(
        nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2)),
        lambda net: net(torch.tensor([rank() % 9, 3, 3])).sum().backward(),
    )
    assert net.module[0].weight.grad.layout == torch.strided


def test_gradients_that_are_not_finite_are_passed_on() -> None:
    net = DataParallel(nn.Linear(2, 1, bias=False))
    net(torch.tensor([[float("nan") if rank() == LAST else 1.0, 1.0]])).sum().backward()
    assert net.module.weight.grad.isnan().tolist() == [[True, False]]


def test_gradients_keep_their_memory() -> None:
    net = DataParallel(perceptron())
    net(rows()).sum().backward()
    before = [p.grad.data_ptr() for p in net.parameters()]
    net(rows()).sum().backward()
    assert [p.grad.data_ptr() for p in net.parameters()] == before
