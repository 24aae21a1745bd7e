"""DataParallel on any number of ranks, against the same module on each rank by itself and a sum by the MPI library."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from mpiml.errors import ConfigError

torch = pytest.importorskip("torch")
nn = torch.nn
checkpoint = torch.utils.checkpoint.checkpoint

from mpiml.torch import DataParallel, rank, size  # noqa: E402
from tests.torch.modules import (  # noqa: E402
    LAST,
    WORLD,
    Twice,
    accumulated,
    check,
    close,
    gradients,
    mean,
    not_synchronised,
    perceptron,
    rows,
    several_forwards,
)

pytestmark = pytest.mark.mpi


def test_gradients_are_means_and_values_start_equal() -> None:
    net = check(perceptron(), lambda net: net(rows()).square().mean().backward())
    for value in net.state_dict().values():
        assert all(np.array_equal(value.numpy(), other) for other in WORLD.allgather(value.numpy()))
    torch.manual_seed(0)
    assert torch.equal(net.module[0].weight, nn.Linear(5, 8).weight)


def test_names_and_modes_are_those_of_ddp() -> None:
    module = perceptron()
    net = DataParallel(module)
    assert list(net.state_dict()) == [f"module.{name}" for name in module.state_dict()]
    assert net.module is module
    net.eval()
    assert not module.training
    net.load_state_dict(net.state_dict())
    assert (rank(), size()) == (WORLD.rank, WORLD.size)


def in_checkpoint(reentrant: bool) -> Callable[[Any], None]:
    return lambda net: checkpoint(net, rows().requires_grad_(), use_reentrant=reentrant).square().sum().backward()


def autocast(net: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(rows()).float().square().sum()
    loss.backward()


def with_a_penalty(net: Any) -> None:
    """A gradient of gradients, and parameters in the loss themselves."""
    x = rows().requires_grad_()
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    (slope.square().sum() + net(x).square().sum() + sum(p.square().sum() for p in net.parameters())).backward()


def in_a_thread(net: Any) -> None:
    """As where the module is on a GPU: autograd has a thread of its own for it, in which hooks are called."""
    loss = net(rows()).square().sum()
    with ThreadPoolExecutor(1) as threads:
        threads.submit(loss.backward).result()


@pytest.mark.parametrize(
    "act",
    [
        accumulated,
        in_a_thread,
        several_forwards,
        not_synchronised,
        in_checkpoint(True),
        in_checkpoint(False),
        with_a_penalty,
    ],
)
def test_ways_to_a_gradient(act: Callable[[Any], None]) -> None:
    check(perceptron(), act)
    if act is not with_a_penalty:
        check(Twice(), act)


def test_autocast() -> None:
    check(perceptron(), autocast, rtol=1e-3)


def test_no_sync_leaves_a_ranks_own_gradients() -> None:
    net = DataParallel(perceptron())
    local = copy.deepcopy(net.module)
    with net.no_sync():
        net(rows()).sum().backward()
    local(rows()).sum().backward()
    close(gradients(net), gradients(local))


class Again(nn.Module):
    """Checkpoints inside."""

    def __init__(self, reentrant: bool):
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(5, 5), nn.Linear(5, 2), reentrant

    def forward(self, x: Any) -> Any:
        hidden = checkpoint(self.first, x.requires_grad_(), use_reentrant=self.reentrant)
        return self.second(checkpoint(torch.tanh, hidden, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_within(reentrant: bool) -> None:
    check(Again(reentrant), lambda net: net(rows()).square().sum().backward())


def test_clipping_optimizer_and_scheduler_keep_ranks_equal() -> None:
    net = DataParallel(perceptron())
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    before = net(torch.ones(1, 5)).detach()
    for seed in range(4):
        optimizer.zero_grad(set_to_none=seed % 2 == 0)
        net(rows(seed=seed)).square().mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
        scheduler.step()
    assert not torch.equal(net(torch.ones(1, 5)), before)
    for parameter in net.parameters():
        assert len({p.detach().numpy().tobytes() for p in WORLD.allgather(parameter)}) == 1


def test_a_scaler_of_the_loss_skips_a_step_on_all_ranks() -> None:
    """Gradients that are not finite on one rank are not on any."""
    net = DataParallel(nn.Linear(1, 1, bias=False))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    weight = net.module.weight.item()
    for x, scale, moved in ((float("inf"), 4.0, 0.0), (3.0, 4.0, (LAST + 3) / WORLD.size)):
        optimizer.zero_grad()
        loss = net(torch.tensor([[x if rank() == LAST else 1.0]])).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale
        assert net.module.weight.item() == pytest.approx(weight - moved)


@pytest.mark.parametrize("given", [False, True])
def test_threads_are_a_share_of_the_cores(given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless somebody has said how many."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
    torch.set_num_threads(7)
    DataParallel(perceptron())
    cores = len(set().union(*WORLD.allgather(os.sched_getaffinity(0))))
    assert torch.get_num_threads() == (7 if given else min(7, max(1, cores // WORLD.size)))
    torch.set_num_threads(before)


def test_a_backward_pass_after_one_that_failed() -> None:
    net = DataParallel(perceptron())
    y = net(rows())
    y.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        y.sum().backward()
    net.zero_grad()
    net(rows()).sum().backward()
    close(gradients(net)[-1:], [torch.full((3,), 6.0)])


def test_ranks_may_be_some_of_all() -> None:
    half = WORLD.Split(rank() % 2)
    net = DataParallel(nn.Linear(5, 1, bias=False), comm=half)
    net(torch.full((1, 5), float(rank()))).sum().backward()
    expected = sum(range(rank() % 2, WORLD.size, 2)) / half.size
    close(gradients(net), [torch.full((1, 5), expected)])


def test_two_wrappers_in_one_loss() -> None:
    one, two = DataParallel(nn.Linear(5, 4)), DataParallel(nn.Linear(4, 2))
    local = nn.Sequential(copy.deepcopy(one.module), copy.deepcopy(two.module))
    two(one(rows())).square().sum().backward()
    local(rows()).square().sum().backward()
    close([*gradients(one), *gradients(two)], mean(gradients(local)))


@pytest.mark.parametrize("outside", [False, True])
def test_compiled_modules(outside: bool) -> None:
    module = perceptron()
    local = copy.deepcopy(module)
    compiled = torch.compile(module, backend="aot_eager") if not outside else module
    net = DataParallel(compiled)
    if outside:
        net = torch.compile(net, backend="aot_eager")
    local.load_state_dict(module.state_dict())
    for seed in range(3):
        with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
            for each in (net, local):
                each.zero_grad()
                each(rows(seed=seed)).square().sum().backward()
        close(gradients(module), mean(gradients(local)))


def test_a_wrapper_that_is_closed() -> None:
    net = DataParallel(perceptron())
    net.close()
    net.close()
    with pytest.raises(ConfigError, match="that is closed"):
        net(rows()).sum().backward()
