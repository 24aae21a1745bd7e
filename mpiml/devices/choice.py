"""Which device a rank takes; no MPI."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mpiml.errors import ConfigError

if TYPE_CHECKING:
    from mpiml.devices.host import Host

KINDS = ("auto", "cpu", "cuda", "fake")  # as --device has them


class Candidate(NamedTuple):
    """The device that a rank would take: its number among those that the rank sees, its type, and a text that no other
    device has; or on which host there is none, and why."""

    number: int = 0
    name: str = ""
    mark: str = ""
    host: str = ""
    problem: str = ""


def is_host(kind: str) -> bool:
    """Whether layers compute on the processor."""
    return kind in ("auto", "cpu")


def candidate(kind: str, homes: Sequence[int], rank: int) -> Candidate:
    """The device for a rank of this host: its number on its node modulo that of the devices that it sees. `homes` are
    the numbers of the nodes of all ranks."""
    host, node = os.uname().nodename, [other for other, home in enumerate(homes) if home == homes[rank]]
    try:
        every = _seen(kind, f"{host}, node {homes[rank]}", len(node))
    except ConfigError as error:
        return Candidate(host=host, problem=str(error))
    number = node.index(rank) % len(every)
    return Candidate(number, *every[number])


def check_sharing(kind: str, share: bool) -> None:
    """Raise ConfigError if ranks are to share devices and there are none."""
    if share and is_host(kind):
        raise ConfigError(f"--share-devices --device {kind}: there are none; give --device cuda too")


def check(kind: str, everyone: Sequence[Candidate], share: bool) -> None:
    """Raise ConfigError unless all ranks, by their candidates, can compute on them; `share`: several may use one."""
    if problem := next((one.problem for one in everyone if one.problem), ""):
        without = [rank for rank, one in enumerate(everyone) if one.problem]
        some = f" (rank {without[0]} on {everyone[without[0]].host}; {len(everyone) - len(without)} ranks have one)"
        raise ConfigError(problem + (some if len(without) < len(everyone) else ""))
    names = sorted({one.name for one in everyone})
    if len(names) > 1:
        first = {one.name: f"{one.name} (rank {rank})" for rank, one in reversed(list(enumerate(everyone)))}
        listed = ", ".join(first[name] for name in names)
        raise ConfigError(f"--device {kind}: ranks have devices of several types, which compute other bits: {listed}")
    sharing = sharers(everyone)
    most = max(len(ranks) for ranks in sharing.values())
    if most > 1 and not share:
        ranks = next(ranks for ranks in sharing.values() if len(ranks) > 1)
        listed = " and ".join(map(str, ranks[:2]))
        raise ConfigError(
            f"--device {kind}: {len(everyone)} ranks for {len(sharing)} device{'s' * (len(sharing) > 1)}, so ranks "
            f"{listed} would use the same; start {len(sharing)}, or give --share-devices"
        )


def check_count(kind: str, ranks: int, node_ranks: int, devices: int, share: bool) -> None:
    """The same of ranks on nodes with so many devices of one type each, which none of them has looked for yet."""
    places = (divmod(rank, node_ranks) for rank in range(ranks))
    check(kind, [Candidate(own % devices, mark=f"{node}, {own % devices}") for node, own in places], share)


def sharers(everyone: Sequence[Candidate]) -> dict[str, list[int]]:
    """The ranks that use each device."""
    sharing: dict[str, list[int]] = {}
    for rank, one in enumerate(everyone):
        sharing.setdefault(one.mark, []).append(rank)
    return sharing


def opened(kind: str, everyone: Sequence[Candidate], rank: int, tf32: bool) -> Host:
    """The device of a rank. Raises ConfigError if it cannot be used."""
    own = everyone[rank]
    ranks = len(sharers(everyone)[own.mark])
    alone = ranks == 1
    device: Host
    if kind == "cuda":
        from mpiml.devices.cuda import Cuda

        device = Cuda(own.number, own.name, alone)
    else:
        from mpiml.devices.fake import Fake

        device = Fake(own.number, own.name, alone)
    device.ranks, device.tf32 = ranks, tf32
    device.fix_arithmetic()
    return device


def unused() -> int:
    """How many GPUs this process could use for PyTorch's modules, if it has imported PyTorch."""
    torch = sys.modules.get("torch")
    return torch.cuda.device_count() if torch else 0


def of_tensor(tensor: Any) -> Host:
    """The device on which a tensor of PyTorch lies."""
    if tensor.is_cuda:
        from mpiml.devices import cuda

        return cuda.of_tensor(tensor)
    from mpiml.devices.host import HOST  # which loads NumPy: too much for a --help

    fake = sys.modules.get("mpiml.devices.fake")
    return fake.of_tensor(tensor) if fake else HOST


def _seen(kind: str, node: str, ranks: int) -> list[tuple[str, str]]:
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: without libraries that it needs
        reason = " ".join(str(error).split())
        raise ConfigError(f"--device {kind}: needs PyTorch, which cannot be imported here: {reason}") from None
    if kind == "cuda":
        from mpiml.devices import cuda

        return cuda.seen(node)
    from mpiml.devices import fake

    return fake.seen(node, ranks)
