"""Checkpoints of a PyTorch loop: stopped and resumed is never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml import random
from mpiml.errors import ConfigError, OutputError, RunError
from mpiml.loop.rows import Rows
from tests.conftest import launch

torch = pytest.importorskip("torch")
nn = torch.nn

from mpiml.torch import DataParallel, checkpoints  # noqa: E402
from mpiml.torch.packed import unpack  # noqa: E402
from tests.torch.modules import LAST, WORLD, rows, several_ranks  # noqa: E402

SGD, ADAMW, LBFGS = torch.optim.SGD, torch.optim.AdamW, torch.optim.LBFGS
rates = torch.optim.lr_scheduler
OPTIMIZERS = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "groups": lambda p: ADAMW([{"params": p[:1]}, {"params": p[1:], "lr": 0.3}], lr=0.01, amsgrad=True),
    "LBFGS": lambda p: LBFGS(p, lr=0.1, max_iter=2),
}
SCHEDULERS = {
    "step": lambda o: rates.StepLR(o, 2),
    "milestones": lambda o: rates.MultiStepLR(o, [2, 4]),
    "cosine": lambda o: rates.CosineAnnealingLR(o, 5),
    "cycle": lambda o: rates.OneCycleLR(o, 0.1, total_steps=9),
    "sequence": lambda o: rates.SequentialLR(o, [rates.ConstantLR(o), rates.StepLR(o, 1)], [2]),
    "lambda": lambda o: rates.LambdaLR(o, lambda step: 1 / (1 + step)),
    "plateau": lambda o: rates.ReduceLROnPlateau(o, patience=0),
}


class Loop:
    """A module with all kinds of state, and a loop that draws random numbers."""

    def __init__(self, optimizer: str, scheduler: str):
        torch.manual_seed(WORLD.rank)
        first, tied = nn.Linear(5, 5), nn.Linear(5, 5)
        tied.weight = first.weight
        frozen = nn.Linear(5, 5).requires_grad_(False)
        module = nn.Sequential(first, tied, nn.BatchNorm1d(5), nn.Dropout(0.3), frozen)
        module.register_buffer("short", torch.full((), 1.5 + WORLD.rank, dtype=torch.bfloat16))
        self.net = DataParallel(module)
        self.optimizer = OPTIMIZERS[optimizer]([p for p in self.net.parameters() if p.requires_grad])
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)
        self.parts = {"optimizer": self.optimizer, "scheduler": self.scheduler}

    def step(self, number: int) -> None:
        def closure() -> Any:
            self.optimizer.zero_grad()
            loss = self.net(rows(seed=number)).square().mean()
            loss.backward()
            return loss

        self.optimizer.step(closure)
        self.scheduler.step(*[1.0] if isinstance(self.scheduler, rates.ReduceLROnPlateau) else [])

    def state(self) -> str:
        torch.set_printoptions(precision=20)
        states = self.net.state_dict(), self.optimizer.state_dict(), self.scheduler.state_dict()
        return repr(states) + repr(torch.rand(3))


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("optimizer", "scheduler"), [*(("SGD", s) for s in SCHEDULERS), ("groups", "cosine"), ("LBFGS", "step")]
)
def test_resumed_is_never_stopped(tmp_path: Path, optimizer: str, scheduler: str) -> None:
    directory = WORLD.bcast(tmp_path)
    one = Loop(optimizer, scheduler)
    saved = one.net.checkpoints(directory)
    assert saved.restore(**one.parts) == 0
    for number in range(1, 7):
        one.step(number)
        if number == 3:
            saved.save(3, meta={"note": "here"}, **one.parts)
    whole = one.state()
    other = Loop(optimizer, scheduler)
    torch.rand(WORLD.rank)
    again = other.net.checkpoints(directory)
    assert again.restore(**other.parts) == 3
    assert again.meta == {"note": "here"}
    for number in range(4, 7):
        other.step(number)
    assert other.state() == whole


@pytest.mark.mpi
def test_another_module_or_optimizer_is_named(tmp_path: Path) -> None:
    directory = WORLD.bcast(tmp_path)
    net = DataParallel(nn.Linear(5, 3))
    net.checkpoints(directory).save(1, optimizer=SGD(net.parameters(), lr=0.1))
    for module, kind, words in (
        (nn.Linear(5, 4), SGD, r"module.bias is float32 \(3,\) in it, and float32 \(4,\) here"),
        (nn.Linear(5, 3, bias=False), SGD, r"module.bias is float32 \(3,\) in it, and nothing here"),
        (nn.Linear(5, 3), ADAMW, "optimizer is SGD in it, and AdamW here"),
        (nn.Linear(5, 3), None, "optimizer is SGD in it, and nothing here"),
    ):
        other = DataParallel(module)
        with pytest.raises(ConfigError, match=words):
            other.checkpoints(directory).restore(optimizer=kind and kind(other.parameters(), lr=0.1))


@pytest.mark.mpi
def test_what_is_no_tensor_or_number_is_refused(tmp_path: Path) -> None:
    class Odd(nn.Linear):  # type: ignore[misc]
        def get_extra_state(self) -> Any:
            return object()

    with pytest.raises(ConfigError, match=r"module\._extra_state: object"):
        DataParallel(Odd(2, 2)).checkpoints(WORLD.bcast(tmp_path)).save(1)


@pytest.mark.mpi
def test_lists_come_back_and_what_rank_0_has(tmp_path: Path) -> None:
    def made() -> tuple[Any, list[Any], list[Any]]:
        net = DataParallel(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)), broadcast_buffers=False)
        optimizers = [SGD(net.module[0].parameters(), lr=0.1, momentum=0.9), ADAMW(net.module[1].parameters())]
        return net, optimizers, [rates.StepLR(optimizer, 1) for optimizer in optimizers]

    net, optimizers, schedulers = made()
    net(rows()).square().sum().backward()
    for part in (*optimizers, *schedulers):
        part.step()
    net.module[1].running_mean.fill_(WORLD.rank)
    directory = WORLD.bcast(tmp_path)
    net.checkpoints(directory).save(1, optimizer=optimizers, scheduler=schedulers)
    again, of_again, rates_again = made()
    again.checkpoints(directory).restore(optimizer=of_again, scheduler=rates_again)
    for one, other in zip((*optimizers, *schedulers), (*of_again, *rates_again), strict=True):
        assert repr(one.state_dict()) == repr(other.state_dict())
    assert again.module[1].running_mean.tolist() == [0.0] * 5
    with pytest.raises(ConfigError, match=r"optimizer\.1 is AdamW in it, and nothing here"):
        again.checkpoints(directory).restore(optimizer=of_again[:1], scheduler=rates_again)


@pytest.mark.mpi
@several_ranks
def test_generators_stay_on_another_number_of_ranks(tmp_path: Path) -> None:
    directory = WORLD.bcast(tmp_path)
    DataParallel(nn.Linear(5, 3)).checkpoints(directory).save(1)
    single = DataParallel(nn.Linear(5, 3), comm=MPI.COMM_SELF).checkpoints(directory)
    torch.rand(1 + WORLD.rank)
    before = torch.get_rng_state()
    assert single.restore() == 1
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("gpu_is_used", ["before", "after"])
def test_a_loop_goes_on_where_there_are_other_generators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu_is_used: str
) -> None:
    """As from a GPU to processors, and back. Those that both have are restored."""
    own = random.global_generators()
    gpu = own | {"CUDA": random.Global(print, lambda: np.arange(3), lambda state: pytest.fail("nothing to restore"))}

    def used(when: str) -> None:
        monkeypatch.setattr(checkpoints, "global_generators", lambda: gpu if gpu_is_used == when else own)

    saved = DataParallel(nn.Linear(5, 3), comm=MPI.COMM_SELF).checkpoints(tmp_path)
    used("before")
    saved.save(1)
    before = torch.get_rng_state()
    torch.rand(3)
    used("after")
    assert saved.restore() == 1
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.mpi
def test_a_checkpoint_that_cannot_be_written(tmp_path: Path) -> None:
    directory = WORLD.bcast(tmp_path) / "checkpoints"
    saved = DataParallel(nn.Linear(5, 3)).checkpoints(directory)
    if WORLD.rank == 0:
        directory.rmdir()
        directory.write_text("in the way")
    with pytest.raises(OutputError, match="checkpoints") as caught:
        saved.save(1)
    assert caught.value.everywhere


@pytest.mark.parametrize("hostile", [{"tensor": "a", "dtype": "load"}, {"os.system": [["a", "b"]]}, {"dict": "a"}])
def test_a_file_from_elsewhere_calls_nothing(hostile: Any) -> None:
    with pytest.raises(OutputError, match="not one of a PyTorch loop"):
        unpack([hostile], {"a": np.zeros(3, np.float32)})


@pytest.mark.mpi
@several_ranks
@pytest.mark.parametrize("call", ["save", "restore", "checkpoints"])
def test_ranks_at_different_calls_are_named(tmp_path: Path, call: str) -> None:
    net, directory = DataParallel(nn.Linear(5, 3)), WORLD.bcast(tmp_path)
    saved, backward = net.checkpoints(directory), net(rows()).sum().backward
    calls = {"save": lambda: saved.save(1), "restore": saved.restore, "checkpoints": lambda: net.checkpoints(directory)}
    with pytest.raises(RunError, match=rf"rank {LAST} came to {call}\(\), call 2") as caught:
        (calls[call] if WORLD.rank == LAST else backward)()
    assert "came to backward(), call 2" in str(caught.value)
    assert caught.value.everywhere


@pytest.mark.mpi
def test_saved_after_steps_and_not_within(tmp_path: Path) -> None:
    net = DataParallel(nn.Linear(5, 3))
    optimizer, saved = SGD(net.parameters(), lr=0.1), net.checkpoints(WORLD.bcast(tmp_path))
    for step in net.steps(Rows(64, 8, WORLD.size), last=2):
        saved.save(step.number - 1)
        for m in step:
            net.backward(net(rows(len(m))).sum(), m)
        with pytest.raises(ConfigError, match=rf"save\(\) within step {step.number}: only after"):
            saved.save(step.number)
        net.step(optimizer)
    net.close()
    saved.save(2)
    assert saved.restore() == 2


LOOP = """
import hashlib, os, signal, sys
import torch
from mpiml.api import Rows, guard
from mpiml.torch import DataParallel, rank

x = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))


def run(directory, killed):
    torch.manual_seed(0)
    net = DataParallel(torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.2)))
    optimizer = torch.optim.AdamW(net.parameters())
    saved = net.checkpoints(directory)
    first = saved.restore(optimizer=optimizer) + 1
    for step in net.steps(Rows(100, batch=20, microbatches=4), first, 5):
        if step.number == killed and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        for m in step:
            net.backward(net(x[m.rows]).square().mean(), m)
        net.step(optimizer)
        saved.save(step.number, optimizer=optimizer)
    if rank() == 0:
        print(first, hashlib.sha256(b"".join(t.numpy().tobytes() for t in net.state_dict().values())).hexdigest())


with guard():
    for directory in sys.argv[2:]:
        run(directory, int(sys.argv[1]))
"""


@pytest.mark.contract
def test_killed_on_4_ranks_and_resumed_on_2_has_the_same_bits(tmp_path: Path) -> None:
    killed, whole = str(tmp_path / "killed"), str(tmp_path / "whole")
    assert launch(4, "-c", LOOP, "3", killed).returncode
    first, bits, of_whole, expected = launch(2, "-c", LOOP, "0", killed, whole).stdout.split()
    assert (first, of_whole) == ("3", "1")
    assert bits == expected
