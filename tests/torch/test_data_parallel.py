"""DataParallel on any number of ranks, against the same module on each rank by itself and a sum by the MPI library."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from mpiml.errors import ConfigError

torch = pytest.importorskip("torch")
nn = torch.nn
checkpoint = torch.utils.checkpoint.checkpoint

from mpiml.torch import DataParallel, rank, size  # noqa: E402
from mpiml.torch.outputs import tensors_in  # noqa: E402
from tests.torch.modules import (  # noqa: E402
    LAST,
    WORLD,
    Branches,
    alone,
    check,
    close,
    gradients,
    mean,
    perceptron,
    rows,
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


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x: Any) -> Any:
        return self.inner(torch.relu(self.inner(x)))


@dataclass
class Output:
    y: Any
    more: Any = None


class Opaque:
    __slots__ = ("y",)


class Packed(nn.Module):
    """An output in whatever is asked for."""

    def __init__(self, kind: str):
        super().__init__()
        self.inner, self.kind = nn.Linear(5, 3), kind

    def forward(self, x: Any) -> Any:
        y = self.inner(x)
        if self.kind == "opaque":
            packed = Opaque()
            packed.y = y
            return packed
        packs = {"dict": {"a": [y]}, "tuple": (None, y), "ordered": OrderedDict(y=y), "dataclass": Output(y, "x")}
        return packs[self.kind]


@pytest.mark.parametrize("kind", ["dict", "tuple", "ordered", "dataclass", "opaque"])
def test_outputs_may_be_packed(kind: str) -> None:
    def act(net: Any) -> None:
        y = net(rows())
        (y.y if kind == "opaque" else next(tensors_in(y))).sum().backward()

    check(Packed(kind), act)


def accumulated(net: Any) -> None:
    for seed in range(3):
        net(rows(seed=seed)).square().sum().backward()


def several_forwards(net: Any) -> None:
    (net(rows()) * net(rows(seed=1))).sum().backward()


def not_synchronised(net: Any) -> None:
    with net.no_sync() if isinstance(net, DataParallel) else contextlib.nullcontext():
        net(rows(seed=3)).sum().backward()
        net(rows(seed=4)).square().sum().backward()
    net(rows(seed=5)).square().sum().backward()


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


@pytest.mark.parametrize(
    "act",
    [accumulated, several_forwards, not_synchronised, in_checkpoint(True), in_checkpoint(False), with_a_penalty],
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


@alone
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


@pytest.mark.skipif(size() == 1, reason="one rank alone keeps its own gradients")
def test_sparse_gradients_become_dense() -> None:
    net = check(
        nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2)),
        lambda net: net(torch.tensor([rank() % 9, 3, 3])).sum().backward(),
    )
    assert net.module[0].weight.grad.layout == torch.strided


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


@pytest.fixture
def gloo() -> Iterator[None]:
    """A process group of torch's own, over a port that rank 0 picks."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank() == 0 else None
    port = WORLD.bcast(store.port if store else 0)
    store = store or torch.distributed.TCPStore("127.0.0.1", port, is_master=False)
    torch.distributed.init_process_group("gloo", store=store, rank=rank(), world_size=size())
    yield
    torch.distributed.destroy_process_group()
    WORLD.Barrier()  # rank 0 has the store


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("act", [accumulated, not_synchronised, several_forwards])
def test_gradients_are_those_of_ddp(act: Callable[[Any], None]) -> None:
    torch.manual_seed(0)
    module = Twice()
    theirs = nn.parallel.DistributedDataParallel(copy.deepcopy(module))
    net = DataParallel(module)
    act(net)
    if act is not_synchronised:
        with theirs.no_sync():
            theirs(rows(seed=3)).sum().backward()
            theirs(rows(seed=4)).square().sum().backward()
        theirs(rows(seed=5)).square().sum().backward()
    else:
        act(theirs)
    close(gradients(net), gradients(theirs))


@pytest.mark.parametrize("outside", [False, True])
def test_compiled_modules(outside: bool) -> None:
    module = perceptron()
    local = copy.deepcopy(module)
    compiled = torch.compile(module, backend="aot_eager") if not outside else module
    net = DataParallel(compiled)
    if outside:
        net = torch.compile(net, backend="aot_eager")
    local.load_state_dict(module.state_dict())
    for seed in range(2):
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
