"""The update of values that lie on a device has the bits of the same update on the host, with every optimizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

pytest.importorskip("torch")

from mpiml.clock import Clock
from mpiml.devices.fake import Fake
from mpiml.nn import optimizers
from mpiml.nn.parameters import Layout, Parameter, Statistic, constant
from mpiml.parallel.gradient_sum import LibrarySum, OrderedSum
from mpiml.parallel.memory import PrivateMemory
from mpiml.parallel.on_device import Mirror, SumOfOwners, SumOnHost
from mpiml.parallel.update import Update
from mpiml.parallel.values import Values
from mpiml.team import Team
from mpiml.vectors import BLOCK

STEPS, MICROBATCHES = 3, 3


def layout_of(dtype: str, layerwise: bool) -> Layout:
    """Matrices of several blocks, one with a rate of its own; a bias; running averages; what nobody updates."""
    made = [Parameter((150, 120), constant(0.0)), Statistic((5,), constant(0.0), 0.1), Parameter((7,), constant(0.0))]
    made += [Statistic((3, 3), constant(0.0), 1.0), Parameter((BLOCK // 64, 65), constant(0.0))]
    made[-1].rate = 3.0
    made.append(fixed := Parameter((3,), constant(0.0)))
    fixed.rate = 0.0
    return Layout(made, dtype, layerwise)


def trained(kind: str, name: str, dtype: str) -> list[bytes]:
    """Norms, values and states after some steps on drawn gradients."""
    random, team = np.random.default_rng(1), Team(MPI.COMM_SELF, Clock())
    optimizer = optimizers.build(name, 0.9, 0.01)
    layout, device = layout_of(dtype, optimizer.layerwise), Fake(0, "fake", alone=True)
    flat = layout.size, layout.blocks(), layout.dtype

    def values(vectors: Any = None) -> Values:
        return Values(MPI.COMM_SELF, PrivateMemory(vectors) if vectors else PrivateMemory(), *flat)

    sum_: Any = OrderedSum(values(device.vectors if kind == "alone" else None), MICROBATCHES)
    if kind == "owners":
        sum_ = SumOfOwners(device, sum_, values(device.vectors))
    elif kind == "sharers":
        sum_ = SumOnHost(device, sum_)
    elif kind == "library":
        sum_ = SumOnHost(device, LibrarySum(MPI.COMM_SELF, values(), MICROBATCHES))
    if kind in ("owners", "sharers", "library"):
        assert all(device._is_locked(array) for array in (sum_._sum.values.vector, *sum_._slots))
    update = Update(team, 0, sum_, optimizer, 2.0, lambda step: 10 + step, ema=0.9)
    there = kind in ("alone", "owners")
    mirror = Mirror(device, sum_.values, update.states) if there else None
    first = mirror.vector if mirror else sum_.values.vector
    for parameter, offset in layout.offsets.items():
        first[offset : offset + parameter.size] = random.standard_normal(parameter.size)
    if mirror:
        mirror.put()
    sum_.values.renewed()
    norms = list[float | None]()
    for step in range(1, STEPS + 1):
        for index in range(MICROBATCHES):
            gradient = np.zeros(len(sum_.gradients[0]), dtype)
            for parameter, offset in layout.gradients.items():
                gradient[offset : offset + parameter.size] = random.standard_normal(parameter.size)
            slot = sum_.gradients[sum_.plan.slots[index]]
            slot[...] = device.tensor(gradient) if kind != "host" else gradient
            sum_.accumulate(index)
        norms.append(update.step(0.01, 12.0, step, measure=step % 2 == 0))
        assert update.finite
        if mirror:
            mirror.fetch()
        assert np.array_equal(device.array(sum_.weights), first)  # what layers compute with
    with update.averaged():
        averages = device.array(sum_.weights).copy()
    if mirror:
        mirror.fetch()
    after, states = (mirror.vector, mirror.states) if mirror else (sum_.values.vector, update.states)
    assert not np.array_equal(after, averages)
    assert np.array_equal(device.array(sum_.weights), after)
    sum_.free()
    return [repr(norms).encode(), after.tobytes(), averages.tobytes(), *(state.tobytes() for state in states.values())]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "adam", "adamw", "lars", "lamb"])
def test_the_bits_are_those_of_the_host(name: str, dtype: str) -> None:
    host = trained("host", name, dtype)
    for kind in ("alone", "owners", "sharers", "library"):
        assert trained(kind, name, dtype) == host, kind
