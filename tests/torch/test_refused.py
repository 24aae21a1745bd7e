"""What a DataParallel refuses: modules, keywords, calls; each by a line that names it."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest

from mpiml.errors import ConfigError, RunError
from mpiml.loop.rows import Rows

torch = pytest.importorskip("torch")
nn = torch.nn

from mpiml.torch import DataParallel, rank  # noqa: E402
from tests.torch.modules import (  # noqa: E402
    LAST,
    WORLD,
    Branches,
    perceptron,
    rows,
    several_ranks,
)

pytestmark = pytest.mark.mpi


@several_ranks
@pytest.mark.parametrize("leaves", [True, False])
def test_ranks_at_different_calls_are_named(leaves: bool) -> None:
    net = DataParallel(perceptron())
    net(rows()).sum().backward()
    order = Rows(64, 8, 2 * WORLD.size)
    backward, steps = net(rows()).sum().backward, net.steps(order)
    with pytest.raises(RunError) as caught:
        (backward if rank() != LAST else net.close if leaves else steps.__next__)()
    place = "left after call 1" if leaves else "began steps() in call 2"
    assert f"rank {LAST} {place}" in str(caught.value)
    assert re.search(r"rank 0( and \d+ more)? came to backward\(\), call 2", str(caught.value))
    assert "a rank has left, or has skipped or repeated one" in str(caught.value)
    assert caught.value.everywhere
    assert caught.value.rank == LAST or (WORLD.size == 2 and not leaves)


@several_ranks
def test_a_rank_that_leaves_a_step_and_begins_anew_is_named() -> None:
    net, order = DataParallel(perceptron()), Rows(64, 8, 2 * WORLD.size)
    for m in (step := next(steps := net.steps(order))):
        net.backward(net(torch.ones(len(m), 5)).sum(), m)
    if rank() == LAST:
        steps.close()
    again, optimizer = net.steps(order, start=step.number), torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(RunError, match=rf"rank {LAST} began steps\(\) in call 2") as caught:
        next(again) if rank() == LAST else net.step(optimizer)
    assert re.search(r"rank 0( and \d+ more)? came to step\(\), call 2", str(caught.value))


@several_ranks
@pytest.mark.parametrize(
    ("module", "said"),
    [
        (lambda r: nn.Linear(5 + r, 3), rf"ranks differ in weight: float32 \(3, {5 + LAST}\), trained|{5 + 1}"),
        (
            lambda r: nn.Linear(5, 3).to(torch.float64 if r else torch.float32),
            r"weight: float64 \(3, 5\), trained \(ra",
        ),
        (lambda r: nn.Sequential(nn.Linear(5, 3), *([nn.Linear(3, 3)] if r else [])), r"1\.weight: .*none \(rank 0\)"),
        (lambda r: nn.Linear(5, 3).requires_grad_(r == 0), r"weight.*trained \(rank 0\)|no parameter"),
    ],
)
def test_other_modules_on_other_ranks(module: Callable[[int], Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        DataParallel(module(rank()))
    assert caught.value.everywhere


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (lambda: [1], "takes a torch.nn.Module, and not a list"),
        (lambda: nn.Sequential(nn.SyncBatchNorm(3)), "^0 is a SyncBatchNorm"),
        (nn.Flatten, "no parameter that requires a gradient"),
        (lambda: nn.LazyLinear(3), "has no shape yet"),
        (lambda: DataParallel(nn.Linear(3, 3)), r"^the module averages gradients already: pass .* its \.module"),
        (lambda: nn.Sequential(nn.DataParallel(nn.Linear(3, 3))), "^0 averages gradients already"),
        (lambda: nn.Linear(3, 3, device="meta"), "the module is on meta"),
    ],
)
def test_modules_that_cannot_be_averaged(module: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DataParallel(module())


def test_what_a_wrapper_cannot_do() -> None:
    net = DataParallel(nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="no communication hooks"):
        net.register_comm_hook(None, None)
    with pytest.raises(ConfigError, match=r"use `with net\.join\(\):`"):
        torch.distributed.algorithms.Join([net])
    for act in (pickle.dumps, copy.deepcopy):
        with pytest.raises(ConfigError, match=r"copy its \.module"):
            act(net)


def test_a_parameter_that_is_unfrozen_later() -> None:
    net = DataParallel(Branches())
    net.module.frozen.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"frozen.weight, frozen.bias requires a gradient now"):
        net(rows(), 0).sum().backward()


def added(net: Any) -> None:
    net.module.more = nn.Linear(5, 2)


def replaced(net: Any) -> None:
    net.module.branches[0] = nn.Linear(5, 2)


def replaced_unseen(net: Any) -> None:
    net.module.branches[0]._parameters["bias"] = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (added, r"more\.weight, more\.bias: another parameter than when"),
        (replaced, r"branches\.0\.weight, branches\.0\.bias: another parameter than when"),
        (replaced_unseen, r"branches\.0\.bias: another parameter than when"),
        (lambda net: net.double(), r"branches\.0\.weight is torch\.float64 now, and was torch\.float32 when"),
    ],
)
def test_a_module_that_is_changed_later(change: Callable[[Any], None], said: str) -> None:
    net = DataParallel(Branches())
    change(net)
    with pytest.raises(ConfigError, match=said):
        net(rows().to(net.module.branches[1].weight.dtype), 0).sum().backward()
