"""Exact steps on one rank, against plain PyTorch; that other ranks have the same bits is tested with the example."""

from __future__ import annotations

import random
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
from tests.torch.modules import Uncounted, perceptron, several_ranks  # noqa: E402

pytestmark = pytest.mark.mpi
WORLD = MPI.COMM_WORLD
M = 2 * WORLD.size
BATCH = max(20, 3 * M if M > 8 else 0)  # normalisations need two rows of each micro-batch
X = torch.randn(max(50, 8 * M if M > 8 else 0), 5, generator=torch.Generator().manual_seed(0))
Y = X.square().sum(1, keepdim=True)


class Net(nn.Module):
    """With an average of its own, and one branch that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.unused, self.norm = nn.Linear(5, 4), nn.Linear(5, 4), nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(5))
        self.register_buffer("temperature", torch.tensor(0.0))
        self.drop, self.last = nn.Dropout(0.2), nn.Linear(4, 1)

    def forward(self, x: Any) -> Any:
        if self.training:
            self.seen.lerp_(x.mean(0), 0.5)
        return self.last(self.drop(self.norm(torch.tanh(self.inner(x)))))


def made(batch: int = BATCH) -> tuple[Any, Any, Rows]:
    torch.manual_seed(0)
    net = DataParallel(Net())
    return net, torch.optim.AdamW(net.parameters(), lr=0.05), Rows(len(X), batch, M, seed=3)


def trained(net: Any, optimizer: Any, rows: Rows, start: int = 1, last: int = 5) -> list[float]:
    losses = []
    for step in net.steps(rows, start, last):
        for m in step:
            net.backward((net(X[m.rows]) - Y[m.rows]).square().mean(), m)
        losses.append(net.step(optimizer))
    return losses


def state(net: Any) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in net.state_dict().items()}


def test_steps_that_go_on_are_those_that_never_stopped() -> None:
    net, optimizer, rows = made()
    losses = trained(net, optimizer, rows)
    again, of_again, rows = made()
    first = trained(again, of_again, rows, last=2)
    resumed, of_resumed, rows = made()
    resumed.load_state_dict(again.state_dict())
    of_resumed.load_state_dict(of_again.state_dict())
    assert first + trained(resumed, of_resumed, rows, start=3) == losses
    assert state(resumed) == state(net)
    assert len({repr(losses) for losses in WORLD.allgather(losses)}) == 1
    assert len({repr(state) for state in WORLD.allgather(state(net))}) == 1


@pytest.mark.parametrize("batch", [2, 3 * M // 2])
def test_gradients_and_loss_are_means_over_rows(batch: int) -> None:
    """Empty micro-batches, and ragged ones, against all rows at once."""
    torch.manual_seed(0)
    net, plain = DataParallel(nn.Linear(5, 1)), nn.Linear(5, 1)
    rows = Rows(len(X), batch, M, seed=3)
    sizes = {rows.size(t, m) for t in range(1, 6) for m in range(M)}
    assert sizes == ({1, 2} if batch > 2 else {0, 1} if M > 2 else {1})
    plain.load_state_dict(net.module.state_dict())
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (net, plain)]
    for step in net.steps(rows, last=5):
        everything = np.concatenate([rows.at(step.number, m) for m in range(M)])
        for m in step:
            assert len(m) == len(m.rows) == rows.size(step.number, m.m) > 0
            net.backward((net(X[m.rows]) - Y[m.rows]).square().mean(), m)
        loss = net.step(optimizers[0])
        expected = (plain(X[everything]) - Y[everything]).square().mean()
        optimizers[1].zero_grad()
        expected.backward()
        optimizers[1].step()
        assert loss == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)
        assert one.grad is None


def test_buffers_are_means_over_rows_of_one_forward_each() -> None:
    net, optimizer, rows = made(batch=7 * M)
    before = net.module.seen.clone()
    for step in net.steps(rows, last=2):
        parts = [X[rows.at(step.number, m)] for m in range(M)]
        expected = sum(len(p) * (0.5 * before + 0.5 * p.mean(0)) for p in parts) / sum(map(len, parts))
        for m in step:
            assert torch.equal(net.module.seen, before)
            net.backward(net(X[m.rows]).sum(), m)
        net.step(optimizer)
        torch.testing.assert_close(net.module.seen, expected)
        before = net.module.seen.clone()
    assert net.module.norm.num_batches_tracked == 2
    assert net.module.unused.weight.grad is None


@several_ranks
@pytest.mark.parametrize("module", [Net, Uncounted])
def test_buffers_have_the_same_bits_on_one_rank(module: Callable[[], Any]) -> None:
    """Those whose changes PyTorch does not count, too."""
    states = []
    for comm in (WORLD, MPI.COMM_SELF):
        torch.manual_seed(0)
        net = DataParallel(module(), comm=comm)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
        losses = trained(net, optimizer, Rows(len(X), 7 * M, M, seed=3, comm=comm))
        states.append(state(net) | {"losses": repr(losses)})
    assert states[0] == states[1]


class Sometimes(nn.Module):
    """With a buffer that the forward pass changes as it is asked to, counted by PyTorch or not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.register_buffer("size", torch.ones(5))

    def forward(self, x: Any, how: str) -> Any:
        if how:
            (self.size.data if how == "uncounted" else self.size).add_(x.mean(0))
        return self.linear(x) * self.size


@several_ranks
@pytest.mark.parametrize("last_only", [True, False])
def test_buffers_that_change_otherwise_in_the_first_steps(last_only: bool) -> None:
    """On one rank only, or counted by PyTorch; later in each micro-batch, uncounted."""
    states = []
    for comm in (WORLD, MPI.COMM_SELF):
        torch.manual_seed(0)
        net, rows = DataParallel(Sometimes(), comm=comm), Rows(len(X), 7 * M, M, seed=3, comm=comm)
        for step in net.steps(rows, last=6):
            for m in step:
                how = "uncounted"
                if last_only and step.number <= 2 and m.m < M - 1:
                    how = ""
                elif not last_only and step.number == 1:
                    how = "counted"
                net.backward(net(X[m.rows], how).square().mean(), m)
            net.step(torch.optim.SGD(net.parameters(), lr=0.01))
        states.append(state(net))
    assert states[0] == states[1]


def test_uncounted_changes_that_begin_after_the_first_step_are_refused() -> None:
    net = DataParallel(Uncounted())
    net.module.begins = 5  # calls of the first step: one or two on each rank
    with pytest.raises(ConfigError, match=r"changes .*size.* in step [24], and did not in the first"):
        trained(net, torch.optim.SGD(net.parameters(), lr=0.1), Rows(len(X), BATCH, M, seed=3))


def test_a_buffer_that_the_loop_sets_keeps_its_value() -> None:
    net, optimizer, rows = made(batch=7 * M)
    for step in net.steps(rows, last=3):
        net.module.temperature.fill_(step.number)
        for m in step:
            assert net.module.temperature == step.number
            net.backward(net(X[m.rows]).sum(), m)
        net.step(optimizer)
        assert net.module.temperature == step.number


def test_generators_are_keyed_by_step_and_micro_batch() -> None:
    net, optimizer, rows = made()
    drawn = {}
    torch.manual_seed(WORLD.rank)
    before = torch.get_rng_state()
    for step in net.steps(rows, last=2):
        for m in step:
            drawn[step.number, m.m] = torch.rand(1).item(), random.random(), np.random.rand()
            net.backward(net(X[m.rows]).sum(), m)
        net.step(optimizer)
    everything = {key: value for part in WORLD.allgather(drawn) for key, value in part.items()}
    assert len(set(everything.values())) == len(everything) == 2 * M
    assert torch.equal(torch.get_rng_state(), before)


def test_the_process_has_the_threads_that_are_asked_for_and_deterministic_operations() -> None:
    net, optimizer, rows = made()
    before = torch.get_num_threads()
    torch.use_deterministic_algorithms(False)
    for step in net.steps(rows, last=1, threads=before + 1):
        for m in step:
            net.backward(net(X[m.rows]).sum(), m)
        net.step(optimizer)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)


def test_rows_of_a_dataset_that_draws_random_numbers() -> None:
    class Noisy(torch.utils.data.Dataset):
        def __getitem__(self, index: int) -> Any:
            return X[index] + torch.rand(5), Y[index]

    def losses(seed: int) -> list[float]:
        net, optimizer, rows = made()
        torch.manual_seed(seed)
        said = []
        for step in net.steps(rows, last=3):
            for m in step:
                x, y = torch.utils.data.default_collate([dataset[i] for i in m.rows.tolist()])
                net.backward((net(x) - y).square().mean(), m)
            said.append(net.step(optimizer))
        return said

    dataset = Noisy()
    first = losses(seed=0)
    assert losses(seed=1 + WORLD.rank) == first
    assert len({repr(said) for said in WORLD.allgather(first)}) == 1


def test_ddp_and_exact_steps_take_turns() -> None:
    net, optimizer, rows = made()
    trained(net, optimizer, rows, last=1)
    net(X).sum().backward()
    assert net.module.last.weight.grad is not None
    trained(net, optimizer, rows, start=2, last=2)
    assert net.module.last.weight.grad is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("loss", f"step 1: the loss of micro-batch {M - 1}, on rank {WORLD.size - 1}, is not"),
        ("gradient", "inner.weight"),
    ],
)
def test_what_is_not_finite_is_named(value: str, said: str) -> None:
    net, optimizer, rows = made()
    before = net.module.inner.weight.clone()
    step = next(steps := net.steps(rows))
    for m in step:
        loss = net(X[m.rows]).sum()
        if m.m == M - 1 and value == "loss":
            loss = loss * float("nan")
        elif m.m == M - 1:
            loss = loss + 0 * torch.sqrt(0 * net.module.inner.weight.sum())
        net.backward(loss, m)
    with pytest.raises(NotFiniteError, match=said) as caught:
        net.step(optimizer)
    steps.close()
    assert caught.value.everywhere
    assert caught.value.rank == (WORLD.size - 1 if value == "loss" else None)
    assert torch.equal(net.module.inner.weight, before)
    assert trained(net, optimizer, rows, last=1)[0] > 0


def test_a_step_that_is_left_is_dropped() -> None:
    net, optimizer, rows = made()
    for step in net.steps(rows):
        for m in step:
            net.backward(net(X[m.rows]).sum(), m)
        break
    assert trained(net, optimizer, rows) == trained(*made())


def test_steps_of_one_loop_at_a_time() -> None:
    net, optimizer, rows = made()
    left = net.steps(rows)
    for m in next(left):
        net.backward(net(X[m.rows]).sum(), m)
    with pytest.raises(ConfigError, match=r"steps\(\) within step 1: call net\.step\(optimizer\) before, or leave"):
        next(net.steps(rows))
    net.step(optimizer)
    again = net.steps(rows, start=2)  # the loop before is done with its step
    step = next(again)
    left.close()
    for m in step:
        net.backward(net(X[m.rows]).sum(), m)
    net.step(optimizer)
    again.close()


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda y: y, r"loss has shape \(\d+, 1\): must be one number"),
        (lambda y: y.sum().detach(), r"loss depends on no parameter: is there a torch\.no_grad\(\) or \.detach"),
        (lambda y: y.sum().item(), "loss is a float: must be a tensor"),
    ],
)
def test_losses_without_a_backward_pass(loss: Callable[[Any], Any], said: str) -> None:
    net, _, rows = made()
    m = next(iter(next(steps := net.steps(rows))))
    with pytest.raises(ConfigError, match=rf"^step 1: net\.backward\(loss, m={m.m}\): {said}"):
        net.backward(loss(net(X[m.rows])), m)
    steps.close()


def test_a_tensor_outside_of_the_module_that_the_optimizer_has() -> None:
    net, _, rows = made()
    scale = torch.ones(3, requires_grad=True)
    step = next(steps := net.steps(rows))
    for m in step:
        net.backward((net(X[m.rows]) * scale.sum()).sum(), m)
    with pytest.raises(ConfigError, match=r"step 1: the optimizer has a parameter \(3,\) with a gradient"):
        net.step(torch.optim.SGD([*net.parameters(), scale], lr=0.1))
    steps.close()
    net._average.sum.drop()


def test_calls_that_a_step_refuses() -> None:
    net, optimizer, rows = made()
    for step in net.steps(rows, last=1):
        for m in step:
            net.backward(net(X[m.rows]).sum(), m)
            with pytest.raises(ConfigError, match=rf"^step 1: net\.backward\(loss, m={m.m}\): to be called once for"):
                net.backward(net(X[m.rows]).sum(), m)
        with pytest.raises(ConfigError, match=r"^step 1: net\.step\(None\): must be an optimizer"):
            net.step(None)
        net.step(optimizer)


def test_calls_out_of_order() -> None:
    net, optimizer, rows = made()
    with pytest.raises(ConfigError, match=r"only within `for step in net\.steps"):
        net.step(optimizer)
    with pytest.raises(ConfigError, match=r"step 1, micro-batch \d+: net.backward\(loss, m\) is missing"):
        list(next(net.steps(rows)))
    with pytest.raises(ConfigError, match="counted from 1"):
        next(net.steps(rows, start=0))
    net, optimizer, rows = made()
    steps = net.steps(rows)
    for m in next(steps):
        net.backward(net(X[m.rows]).sum(), m)
    with pytest.raises(ConfigError, match=r"step 1: net.step\(optimizer\) is missing"):
        next(steps)
    net._average.sum.drop()


def test_a_hook_of_the_optimizer_may_clip_the_mean() -> None:
    net = DataParallel(perceptron())
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(net.parameters(), 1e-3)

    optimizer.register_step_pre_hook(clip)
    before = [p.detach().clone() for p in net.parameters()]
    for step in net.steps(Rows(64, 16, 2 * WORLD.size), last=1):
        for m in step:
            net.backward(net(torch.ones(len(m), 5)).square().mean(), m)
        net.step(optimizer)
    moved = sum(float((p.detach() - q).square().sum()) for p, q in zip(net.parameters(), before, strict=True))
    assert moved**0.5 == pytest.approx(1e-3, rel=1e-2)
