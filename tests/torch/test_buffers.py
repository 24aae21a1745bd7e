"""Buffers that a forward pass changes, and ranks with different numbers of batches."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from mpiml.errors import ConfigError

torch = pytest.importorskip("torch")
nn = torch.nn

from mpiml.loop.rows import Rows  # noqa: E402
from mpiml.torch import DataParallel, rank  # noqa: E402
from tests.torch.modules import (  # noqa: E402
    LAST,
    WORLD,
    Uncounted,
    check,
    close,
    gradients,
    mean,
    perceptron,
    rows,
    several_ranks,
)

pytestmark = pytest.mark.mpi


class Averages(nn.Module):
    """Buffers of all kinds: of a normalisation, of its own, replaced, frozen, constant."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fixed = nn.BatchNorm1d(5), nn.BatchNorm1d(5).eval()
        self.register_buffer("seen", torch.zeros(5, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("table", torch.full((2, 2), 1 / 3))
        self.copied = nn.Parameter(torch.zeros(5), requires_grad=False)

    def forward(self, x: Any) -> Any:
        if self.training:
            with torch.no_grad():
                self.seen = 0.5 * self.seen + x.double().mean(0)
                self.count += len(x)
                self.copied.lerp_(x.mean(0), 0.5)
        return self.norm(x) + self.fixed(x)


def test_buffers_are_averaged() -> None:
    torch.manual_seed(0)
    net = DataParallel(Averages())
    net.module.fixed.eval()
    local = copy.deepcopy(net.module)
    for seed in range(3):
        for module in (net, local):
            module(rows(seed=seed)).sum().backward()
        close(list(net.buffers()), expected := mean(local.buffers()))
        close([net.module.copied], mean([local.copied]))
        local.load_state_dict({k.removeprefix("module."): v for k, v in net.state_dict().items()})
    assert len(expected) == 9
    assert net.module.norm.num_batches_tracked == 3
    assert torch.equal(net.module.table, torch.full((2, 2), 1 / 3))
    assert net.module.seen.abs().sum() > 0


def test_buffers_may_stay_apart() -> None:
    net = DataParallel(nn.BatchNorm1d(5), broadcast_buffers=False)
    local = copy.deepcopy(net.module)
    for module in (net, local):
        module(rows()).sum().backward()
    close(list(net.buffers()), list(local.buffers()), rtol=0)


def test_evaluation_is_a_ranks_own() -> None:
    net = DataParallel(Averages())
    if rank() == LAST:
        with torch.no_grad():
            net.eval()(rows())
    net.train()(rows()).sum().backward()


def without_gradients(net: Any) -> None:
    with torch.no_grad():
        net(rows(seed=1))


def inner_in_training(net: Any) -> None:
    net.eval()
    getattr(net, "module", net).train()
    net(rows(seed=1))


def part_in_training(net: Any) -> None:
    net.eval()
    getattr(net, "module", net).norm.train()
    net(rows(seed=1))


@pytest.mark.parametrize("change", [without_gradients, inner_in_training, part_in_training])
def test_changes_are_averaged_by_the_next_backward_pass(change: Callable[[Any], None]) -> None:
    net = DataParallel(Averages())
    local = copy.deepcopy(net.module)
    for module in (net, local):
        change(module)
        module.eval()(rows()).sum().backward()
    close(list(net.buffers()), mean(local.buffers()))
    close([net.module.copied], mean([local.copied]))
    assert net.module.norm.num_batches_tracked == 1


class Seeded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.register_buffer("count", torch.tensor(2**47))
        self.register_buffer("seed", torch.tensor(0))

    def forward(self, x: Any) -> Any:
        self.count += 1
        self.seed += 2**48
        return self.linear(x)


@several_ranks
def test_integers_too_large_for_an_exact_mean_are_refused() -> None:
    net = DataParallel(Seeded())
    net(rows()).sum().backward()
    assert (net.module.count, net.module.seed) == (2**47 + 1, 2**48)
    with pytest.raises(ConfigError, match=r"the buffer seed has integers above 2\*\*48"):
        net(rows()).sum().backward()


def test_join() -> None:
    """The last ranks have more batches; means are those of ranks that still have any."""
    net = DataParallel(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with net.join():
        for batch in range(1 + rank()):
            optimizer.zero_grad()
            net(rows(seed=batch))[:, 0].square().sum().backward()
            if batch == rank() == LAST:  # alone with data by now
                local = copy.deepcopy(net.module)
                local.zero_grad()
                # in the state before this batch its gradient would be the same, as statistics are the batch's
                local(rows(seed=batch))[:, 0].square().sum().backward()
                close(gradients(net), gradients(local))
            optimizer.step()
    for value in net.state_dict().values():
        assert len({v.numpy().tobytes() for v in WORLD.allgather(value)}) == 1
    last = WORLD.bcast(net.state_dict(), LAST)
    assert last["module.1.num_batches_tracked"] == WORLD.size


@pytest.mark.parametrize("averaged", [True, False])
def test_buffers_that_are_not_averaged_stay_apart_in_join(averaged: bool) -> None:
    net = DataParallel(nn.BatchNorm1d(5), broadcast_buffers=averaged)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with net.join():
        for batch in range(1 + rank()):
            optimizer.zero_grad()
            net(rows(seed=batch))[:, 0].square().sum().backward()
            optimizer.step()
    assert len({v.detach().numpy().tobytes() for v in WORLD.allgather(net.module.weight)}) == 1
    assert net.module.num_batches_tracked == (WORLD.size if averaged else 1 + rank())


def test_join_may_divide_by_all_ranks() -> None:
    net = DataParallel(nn.Linear(5, 1, bias=False))
    with net.join(divide_by_initial_world_size=True):
        if rank() == 0:
            net(torch.ones(1, 5)).sum().backward()
            close(gradients(net), [torch.full((1, 5), 1 / WORLD.size)])
    assert not net._average.by_all_ranks
    with pytest.raises(ConfigError, match=r"join\(\) within a join"), net.join(), DataParallel(nn.Linear(1, 1)).join():
        pass
    with pytest.raises(ConfigError, match="leave join"), net.join(throw_on_early_termination=True):
        pass


@pytest.mark.parametrize("late", [False, True])
def test_buffers_whose_changes_are_not_counted_are_averaged(late: bool) -> None:
    torch.manual_seed(0)
    net = DataParallel(Uncounted(late))
    local = copy.deepcopy(net.module)
    for seed in range(6):
        for module in (net, local):
            module(rows(seed=seed)).sum().backward()
        close(list(net.buffers()), mean(local.buffers()))
        close([net.module.copied.weight], mean([local.copied.weight]))
        local.load_state_dict(net.module.state_dict())
    assert not torch.allclose(net.module.size, torch.tensor(1 / 3), atol=1e-3)
    assert torch.equal(net.module.constant, torch.full((5,), 1 / 3))


def two_losses(net: Any) -> None:
    a, b = (net(rows(seed=seed)).square().mean() for seed in range(2))
    a.backward()
    b.backward()


def two_passes(net: Any) -> None:
    y = net(rows())
    y.square().mean().backward(retain_graph=True)
    y.sum().backward()


class Replaced(nn.Module):
    """A buffer that is divided by, and becomes another tensor; one that is an input of the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.register_buffer("scale", torch.ones(5))
        self.register_buffer("last", torch.zeros(6, 5))

    def forward(self, x: Any) -> Any:
        self.scale, self.last = 0.9 * self.scale + 0.1 * x.detach().abs().mean(0), x
        return self.linear(x) / self.scale


@pytest.mark.parametrize("act", [two_losses, two_passes])
@pytest.mark.parametrize("module", [lambda: nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), Replaced, Uncounted])
def test_several_backward_passes_after_forward(module: Callable[[], Any], act: Callable[[Any], None]) -> None:
    """The second finds what the forward pass has saved, though buffers have become means meanwhile."""
    check(module(), act)


def test_an_input_that_becomes_a_buffer_is_left_alone() -> None:
    net, x = DataParallel(Replaced()), rows()
    net(x).sum().backward()
    assert torch.equal(x, rows())
    close([net.module.last], mean([x]))


class Cache(nn.Module):
    """With a table as long as the longest input so far, or none."""

    def __init__(self, comes: bool) -> None:
        super().__init__()
        self.linear, self.comes = nn.Linear(5, 5), comes
        self.register_buffer("table", torch.ones(2))

    def forward(self, x: Any) -> Any:
        y = self.linear(x) * self.table.sum()
        self.table = torch.ones(len(x)) if self.comes else None
        return y


@pytest.mark.parametrize(
    ("comes", "said"),
    [(True, r"buffer table is of shape \(6,\) now, and was of shape \(2,\) when"), (False, "buffer table is None now")],
)
def test_buffers_that_grow_or_go_are_named(comes: bool, said: str) -> None:
    net = DataParallel(Cache(comes))
    with pytest.raises(ConfigError, match=f"{said}.* plain attribute"):
        net(rows())
    order = Rows(60, 6 * 2 * WORLD.size, 2 * WORLD.size)
    step = next(steps := (net := DataParallel(Cache(comes))).steps(order))
    m = next(iter(step))
    with pytest.raises(ConfigError, match=f"{said}.* plain attribute"):
        net.backward(net(rows()).sum(), m)
    steps.close()
    net = DataParallel(Cache(True), broadcast_buffers=False)
    net(rows()).sum().backward()
    assert len(net.module.table) == 6


def test_parameters_that_are_frozen_later_are_no_new_buffers() -> None:
    net, x = DataParallel(perceptron()), rows().requires_grad_()
    net.requires_grad_(False)
    with warnings.catch_warnings(action="error"):
        net(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("exact", [True, False])
def test_a_warning_names_buffers_that_are_made_later(exact: bool) -> None:
    net = DataParallel(nn.Linear(5, 5))
    net.module.register_buffer("none", None)

    def act(m: Any = None) -> None:
        loss = net(rows()).sum()
        net.module.none = torch.ones(len(rows()))
        net.module.register_buffer("new", torch.ones(1), persistent=False)
        net.backward(loss, m) if exact else loss.backward()

    with pytest.warns(UserWarning, match="new, none: no buffer") if rank() == 0 else contextlib.nullcontext():
        if exact:
            for step in net.steps(Rows(8 * WORLD.size, 2 * WORLD.size, WORLD.size), last=2):
                for m in step:
                    act(m)
                net.step(torch.optim.SGD(net.parameters(), lr=0.1))
        else:
            act()
            act()
