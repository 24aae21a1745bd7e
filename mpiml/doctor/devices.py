"""The facts about the devices that ranks take: which ones, their memory, and how fast vectors get there and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

from mpiml.devices import choice
from mpiml.doctor import probes
from mpiml.errors import ConfigError

VECTOR = 1 << 26  # bytes of the vector that travels
PART = 4  # if less memory is free: all vectors on a device take one part in so many of it


@dataclass
class RankDevice:
    """The device of one rank.

    Attributes:
        number: among those that the rank sees; name: its type.
        ranks: how many ranks use it.
        problem: why the rank has none, or cannot use it; what is not known then is zero.
        free, total: bytes of its memory, when all ranks have opened their devices.
        locked: whether the host's memory in which vectors travel could be locked.
        put, fetch: bytes per second to the device and from it, while all ranks transfer.
    """

    number: int = 0
    name: str = ""
    ranks: int = 1
    problem: str = ""
    free: int = 0
    total: int = 0
    locked: bool = False
    put: float = 0.0
    fetch: float = 0.0


@dataclass
class Devices:
    """The devices of a job.

    Attributes:
        kind: as --device has it.
        of_ranks: by rank.
        refused: why training would refuse them; empty if it would not.
    """

    kind: str
    of_ranks: list[RankDevice]
    refused: str = ""


def examine_devices(comm: MPI.Intracomm, node: Sequence[int], kind: str, share: bool) -> Devices:
    """Look at the devices of all ranks, and measure them; collective, known to all. `node` has for each rank the first
    on its node; `share`: ranks may share devices."""
    everyone = comm.allgather(choice.candidate(kind, node, comm.rank))
    sharing = choice.sharers(everyone)
    found = [RankDevice(one.number, one.name, len(sharing[one.mark]), one.problem) for one in everyone]
    if not any(one.problem for one in everyone):
        found = _measured(comm, found[comm.rank], kind, everyone)
    try:
        choice.check(kind, everyone, share)
    except ConfigError as error:
        return Devices(kind, found, str(error))
    return Devices(kind, found)


def _measured(
    comm: MPI.Intracomm, own: RankDevice, kind: str, everyone: Sequence[choice.Candidate]
) -> list[RankDevice]:
    """The devices of all ranks with what is measured of them; collective: each rank takes part in all steps, whatever
    has failed on it."""
    of = _Examination(own, lambda: choice.opened(kind, everyone, comm.rank, tf32=False))
    for step in (of.open, of.look, of.prepare, of.put, of.fetch, of.close):
        try:
            if not own.problem:
                step()
        except (ConfigError, RuntimeError) as error:  # PyTorch raises the latter for whatever goes wrong on a GPU
            own.problem = " ".join(str(error).split())
        comm.Barrier()
    return comm.allgather(own)


class _Examination:
    """The steps in which a rank examines its device, which `opened` gives, and enters what it finds into `own`."""

    def __init__(self, own: RankDevice, opened: Callable[[], Any]):
        self._own, self._opened = own, opened

    def open(self) -> None:
        self._device = self._opened()

    def look(self) -> None:
        self._own.free, self._own.total = self._device.memory()

    def prepare(self) -> None:
        size = min(VECTOR, self._own.free // (PART * self._own.ranks)) // 4
        if not size:
            raise ConfigError(f"{self._own.name} has no free memory")
        self._host, self._there = np.ones(size, np.float32), self._device.vectors.zeros(size, np.float32)
        self._device.lock(self._host)
        self._own.locked = self._device.locked >= self._host.nbytes

    def put(self) -> None:
        self._own.put = self._rate(lambda: self._device.put(self._host, self._there))

    def fetch(self) -> None:
        self._own.fetch = self._rate(lambda: self._device.fetch(self._there, self._host))

    def close(self) -> None:
        self._device.free()

    def _rate(self, begin: Callable[[], None]) -> float:
        def transfer() -> None:
            begin()
            self._device.settle()

        return float(self._host.nbytes / probes.medians(probes.timed(transfer))[0])
