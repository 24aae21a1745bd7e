"""A DataParallel of a module on a device: the same as on the processor, to the bit, on a device that is pretended."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import launch

pytest.importorskip("torch")

import torch

from mpiml.devices.fake import Fake
from mpiml.loop.rows import Rows
from mpiml.torch import DataParallel, alike, flat, keywords, packed
from mpiml.torch.flat import Places

pytestmark = pytest.mark.contract

LOOP = """
import hashlib, sys
import numpy as np
import torch
import mpiml.torch
from mpiml.api import Rows
from mpiml.devices.fake import Fake

torch.manual_seed(mpiml.torch.rank())  # rank 0's values count
net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
net.append(torch.nn.Linear(1, 1).requires_grad_(False))
there = torch.from_numpy
if "fake" in sys.argv:
    there = Fake(0, "fake", True).tensor
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.data = there(tensor.data)
draw = np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)
x, y = there(draw), there(draw.sum(1, keepdims=True))
mine = slice(mpiml.torch.rank(), None, mpiml.torch.size())
net = mpiml.torch.DataParallel(net)
optimizer = torch.optim.AdamW(net.parameters(), 0.01)
for step in range(3):
    optimizer.zero_grad()
    (net(x[mine]) - y[mine]).square().mean().backward()
    optimizer.step()
with net.join():  # the last rank goes on when the others contribute nothing any more
    for batch in range(1 + mpiml.torch.rank()):
        optimizer.zero_grad()
        (net(x[mine]) - y[mine]).square().mean().backward()
        optimizer.step()
optimizer = torch.optim.AdamW(net.parameters(), 0.01)  # with the same state on all ranks
for step in net.steps(Rows(64, batch=32, microbatches=4), last=3):
    for m in step:
        rows = there(m.rows.numpy())
        net.backward((net(x[rows]) - y[rows]).square().mean(), m)
    loss = net.step(optimizer)
saved = net.checkpoints(sys.argv[2])
saved.save(1, optimizer=optimizer)
for tensor in net.parameters():
    tensor.data.zero_()
saved.restore(optimizer=optimizer)
values = [tensor.detach().cpu().numpy().tobytes() for tensor in (*net.parameters(), *net.buffers())]
if mpiml.torch.rank() == 0:
    print(loss, hashlib.sha256(b"".join(values)).hexdigest())
"""


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_bits_are_those_of_the_processor(ranks: int, tmp_path: object) -> None:
    """Steps of each rank's own, uneven ones, and exact steps; buffers, frozen parameters and checkpoints, too."""
    kinds = {"cpu": {}, "fake": {}, "fake again": {"MPIML_FAKE_UNLOCKED": "1"}}
    done = [
        launch(ranks, "-c", LOOP, kind.split()[0], f"{tmp_path}/{number}", **environment)
        for number, (kind, environment) in enumerate(kinds.items())
    ]
    assert all(one.returncode == 0 for one in done), done[1].stderr
    assert len({one.stdout for one in done}) == 1
    assert float(done[0].stdout.split()[0]) < 20


def test_a_forgotten_transfer_is_not_a_number() -> None:
    device = Fake(0, "fake", alone=True)
    places = Places([torch.zeros(3), torch.zeros(2, dtype=torch.float64)], 1)
    there, arrays = places.there(device), [array.copy() for array in places.like]
    slot = there.slot(arrays)
    for number, view in enumerate((*slot.tensors, slot.flags)):
        view.fill_(number + 1)
    assert not any(array.any() for array in arrays)
    slot.written()
    assert [array[0] for array in arrays] == [1, 2]
    arrays[0] += 1
    total = there.total(arrays)
    assert [view.tolist() for view in total.tensors] == [[2, 2, 2], [2, 2]]


@pytest.mark.parametrize("types", ["float32 float32", "bfloat16 float32 bfloat16", "float64 float32", "float16"])
def test_tensors_of_one_type_are_copied_at_once(monkeypatch: pytest.MonkeyPatch, types: str) -> None:
    """PyTorch may take the types of all for those of the first on a GPU, as it is made to do here."""
    copied = torch._foreach_copy_

    def alike(into: list[torch.Tensor], tensors: list[torch.Tensor]) -> None:
        assert len({(a.dtype, b.dtype) for a, b in zip(into, tensors, strict=True)}) == 1
        copied(into, tensors)

    monkeypatch.setattr(torch, "_foreach_copy_", alike)
    own = [torch.full((3,), 1.5 + n, dtype=getattr(torch, kind)) for n, kind in enumerate(types.split())]
    own.append(torch.tensor([7, 8]))
    places = Places(own, 1)
    slot = places.slot([array.copy() for array in places.like])
    flat.copy(slot.tensors, own)
    back = [torch.zeros_like(tensor) for tensor in own]
    flat.take(back, slot.tensors)
    assert all(map(torch.equal, back, own))
    flat.copy([], [])


def test_what_travels_in_every_step_is_locked() -> None:
    device, net = Fake(0, "fake", alone=True), torch.nn.Linear(3, 2)
    for tensor in net.parameters():
        tensor.data = device.tensor(tensor.data)
    parallel = DataParallel(net)
    average: Any = parallel._average
    for step in parallel.steps(Rows(8, 8, 2), last=2):
        for m in step:
            parallel.backward(net(device.tensor(torch.ones(len(m), 3))).sum(), m)
        parallel.step(torch.optim.SGD(net.parameters(), 0.1))
        own: Any = average.device
        assert all(own._is_locked(array) for arrays in (*average.sum.slots.trees, average._arrays) for array in arrays)
        assert own._staging is None
    parallel.close()


def test_gpus_that_a_module_is_on_may_be_named() -> None:
    for value in ([1], 1, [torch.device("cuda", 1)], torch.device("cuda:1")):
        keywords.check({"device_ids": value, "output_device": 1}, {}, 0.0, gpus=[1])
        with pytest.raises(keywords.ConfigError, match=r"device_ids=...\): the module computes where it is: leave it"):
            keywords.check({"device_ids": value}, {}, 0.0)


def test_a_module_on_two_devices_is_refused() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    with pytest.raises(alike.ConfigError, match=r"lies on several devices, 0.bias on cpu, 1.bias on meta"):
        alike._check(net)
    with pytest.raises(alike.ConfigError, match="the module is on meta: ranks train on the CPU, or on CUDA"):
        alike._check(net[1])


def test_what_lies_on_a_device_is_saved() -> None:
    arrays: packed.Arrays = {}
    there = Fake(0, "fake", alone=True).tensor(torch.arange(3.0))
    name = packed.pack(there, "x", arrays)["tensor"]
    assert arrays[name].tolist() == [0, 1, 2]
