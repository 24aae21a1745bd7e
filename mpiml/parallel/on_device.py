"""Gradients, values and state of a replica that computes on a device: what travels, and where the update is made.

Where a replica has its device to itself, values and state lie there and the update is made there. A replica alone needs
nothing else: its sum, values and update are as on the host, in the memory of the device. With others, only gradients
travel: they are added up on the host, and their sum comes back. Where replicas share a device, sum and update are made
on the host, once for all of a node, and new values go to the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mpiml.devices.host import Host
from mpiml.parallel.gradient_sum import LibrarySum, OrderedSum, merge
from mpiml.parallel.values import Values
from mpiml.vectors import Vector


class _Fetched:
    """A gradient sum (mpiml.parallel.gradient_sum) that is made on the host, of gradients of a device. The partial sums
    of a replica's own micro-batches are made on the device, so that each gets to the host once a step.

    Args:
        sum_: that on the host.
        like: a sum of the same kind, in which another copy of the model has its turn: it shares vectors of gradients.
    """

    complete: Callable[[int], None] | None = None

    def __init__(self, device: Any, sum_: OrderedSum | LibrarySum, like: _Fetched | None = None):
        self._device, self._sum, self._slots, self.plan = device, sum_, sum_.slots, sum_.plan
        size, dtype = sum_.values.summed, sum_.values.dtype
        self.gradients: list[Any] = like.gradients if like else [device.vectors.zeros(size, dtype) for _ in self._slots]
        device.lock(sum_.values.vector, *self._slots)
        self._left = sum(1 - merged for merged in self.plan.counts)  # partial sums

    def accumulate(self, index: int) -> None:
        merge(self.plan, self.gradients, index, self._device.vectors)
        if index == len(self.plan.counts) - 1:
            for gradient, slot in zip(self.gradients[: self._left], self._slots, strict=False):
                self._device.fetch(gradient, slot)
            self._device.settle()
            self._sum.written()

    def drop(self) -> None:
        self._sum.drop()

    def free(self) -> None:
        self._sum.free()
        self._device.unlock(self._sum.values.vector, *self._slots)


class SumOnHost(_Fetched):
    """A gradient sum of replicas that share devices: values, state and update are on the host."""

    def __init__(self, device: Any, sum_: OrderedSum | LibrarySum, like: SumOnHost | None = None):
        super().__init__(device, sum_, like)
        self.on_host, self.values, self.slots = sum_, sum_.values, sum_.slots
        self.weights: Any = copied(device, self.values)

    def start(self) -> None:
        self._sum.start()

    def total(self, index: int, out: Vector) -> Vector:
        return self._sum.total(index, out)

    def publish(self) -> None:
        self._sum.publish()


class SumOfOwners(_Fetched):
    """A gradient sum of replicas that have a device each, on which each updates everything: the sum over all replicas
    goes to each device.

    Args:
        sum_: on the host; the values that it changes are the sum of the gradients.
        values: the model's, on the device, over MPI.COMM_SELF.
    """

    def __init__(self, device: Any, sum_: OrderedSum, values: Values):
        super().__init__(device, sum_)
        self._sum: OrderedSum = sum_
        self.values, self.slots, self.weights = values, self.gradients, values.vector

    def start(self) -> None:
        of_sum = self._sum.values
        self._sum.start()
        for index, piece in enumerate(of_sum.pieces):
            out = of_sum.vector[piece.start : piece.stop]
            total = self._sum.total(index, out)
            if total is not out:
                np.copyto(out, total)
        self._sum.publish()
        self.values.sent = of_sum.sent
        summed = of_sum.vector[: len(self.gradients[0])]  # without what pads it to a device's boundary
        self._device.put(summed, self.gradients[0])
        self._device.settle()

    def total(self, index: int, out: Vector) -> Vector:
        piece = self.values.summed_pieces[index]
        total: Vector = self.gradients[0][piece.start : piece.stop]
        return total

    def publish(self) -> None:
        pass

    def free(self) -> None:
        super().free()
        self._sum.values.free()


def copied(device: Any, values: Values) -> Any:
    """A copy on a device of values that lie on the host; it gets new ones as they are published."""
    copy = device.vectors.zeros(len(values.vector), values.dtype)

    def take() -> None:
        device.put(values.vector, copy)
        device.settle()

    values.copies.append(take)
    return copy


class Mirror:
    """Copies on the host of the values and the state of a replica that lie on its device, for checkpoints.

    Attributes:
        vector: all values of the stage; states: the state vectors by name. Memory is taken when they are written to.
    """

    def __init__(self, device: Host, values: Values, states: Mapping[str, Any]):
        self._device: Any = device
        self.vector = np.zeros(len(values.vector), values.dtype)
        self.states = {name: np.zeros(len(state), values.dtype) for name, state in states.items()}
        self._pairs = [(self.vector, values.vector), *((self.states[name], state) for name, state in states.items())]

    def fetch(self) -> None:
        """Copy from the device."""
        for host, there in self._pairs:
            self._device.fetch(there, host)
        self._device.settle()

    def put(self) -> None:
        """Copy to the device."""
        for host, there in self._pairs:
            self._device.put(host, there)
        self._device.settle()
