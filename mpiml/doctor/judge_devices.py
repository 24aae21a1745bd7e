"""The doctor's judgement of the devices that ranks take."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

from mpiml.command import plural, size
from mpiml.doctor.devices import Devices, RankDevice
from mpiml.doctor.facts import Facts
from mpiml.doctor.judge import SHOWN, SLOW, Finding

LOW = 5e9  # bytes per second to or from a GPU: PCIe 3.0 does at least twice as much
OWN = 1 << 30  # bytes of a GPU that a rank may take by opening it
NAMED = 4  # ranks
LOCK = "ulimit -l unlimited, or in a container --ulimit memlock=-1"
NEAR = "bind ranks to the cores next to their GPUs (srun --gpu-bind=closest, mpirun --map-by numa)"


def judge_devices(facts: Facts) -> list[Finding]:
    """All findings about devices, in the order of the screen; none if nobody has asked for them."""
    devices = facts.devices
    if devices is None:
        return []
    if any(one.problem for one in devices.of_ranks):
        return [_without(facts, devices)]
    nodes = [_of_node(facts, ranks) for ranks in list(facts.nodes().values())[:SHOWN]]
    hidden = len(facts.nodes()) - len(nodes)
    more = [Finding("...", f"and devices of {hidden} more nodes (--json lists all)")] * bool(hidden)
    refused = [Finding("devices", _counted(devices), "problem", devices.refused)] * bool(devices.refused)
    return [*refused, *nodes, *more, *_transfers(facts, devices)]


def _without(facts: Facts, devices: Devices) -> Finding:
    """The finding where ranks have no device that they can use."""
    without = [rank for rank, one in enumerate(devices.of_ranks) if one.problem]
    all_but = f"on {len(devices.of_ranks) - len(without)} of {plural(len(devices.of_ranks), 'rank')} only"
    reason = devices.refused or f"rank {_ranks(facts, without)}: {devices.of_ranks[without[0]].problem}"
    return Finding("devices", all_but if len(without) < len(devices.of_ranks) else "none", "problem", reason)


def _counted(devices: Devices) -> str:
    count = round(sum(1 / one.ranks for one in devices.of_ranks))
    return f"{plural(len(devices.of_ranks), 'rank')}, {plural(count, 'device')}"


def _of_node(facts: Facts, ranks: Sequence[int]) -> Finding:
    """Which devices the ranks of a node take, and their memory."""
    assert facts.devices, "it is asked for these"
    of_ranks = [facts.devices.of_ranks[rank] for rank in ranks]
    taken = [
        f"{rank} has {'device ' * (rank == ranks[0])}{one.number}" for rank, one in zip(ranks, of_ranks, strict=True)
    ]
    more = f", and {len(taken) - SHOWN} more" if len(taken) > SHOWN else ""
    names, most = ", ".join(sorted({one.name for one in of_ranks})), max(one.ranks for one in of_ranks)
    sharing = f"{plural(most, 'rank')} share one" if most > 1 else "one each"
    least = min(of_ranks, key=lambda one: one.free)
    text = f"rank {', '.join(taken[:SHOWN])}{more} ({names}, {sharing}), {size(least.free)} of {size(least.total)} free"
    others = max(of_ranks, key=_of_others)
    advice = ""
    if (bytes_of_others := _of_others(others)) > 0:
        used = f"others seem to use {size(bytes_of_others)} of device {others.number}"
        advice = f"{used}: nvidia-smi says who; ask for GPUs of your own (srun --exclusive)"
    return Finding(f"devices {facts.places[ranks[0]].host}", text, "note" if advice else "ok", advice)


def _of_others(one: RankDevice) -> int:
    """Bytes of a device that its ranks do not use, or nothing if these may be theirs."""
    used = one.total - one.free
    return used if used > OWN * one.ranks else 0


def _transfers(facts: Facts, devices: Devices) -> Iterator[Finding]:
    """How fast vectors travel, and which ranks are slow."""
    put, fetch = (statistics.median(rates) / 1e9 for rates in _rates(devices, lambda one: 1))
    text = f"{put:.1f} GB/s to a device, {fetch:.1f} back, for each rank when all transfer"
    advice = _unlocked(facts, devices) or _slow(facts, devices)
    yield Finding("transfers", text, "note" if advice else "ok", advice)


def _rates(devices: Devices, factor: Callable[[RankDevice], int]) -> tuple[list[float], list[float]]:
    """Rates to devices and from them, each times a factor."""
    every = devices.of_ranks
    return [one.put * factor(one) for one in every], [one.fetch * factor(one) for one in every]


def _unlocked(facts: Facts, devices: Devices) -> str:
    ranks = [rank for rank, one in enumerate(devices.of_ranks) if not one.locked]
    which = f"the host's memory cannot be locked for rank {_ranks(facts, ranks)}, which makes transfers slow"
    return f"{which}: {LOCK}" if ranks else ""


def _slow(facts: Facts, devices: Devices) -> str:
    """Advice on ranks whose devices get or give vectors slowly; those that share a device count as one."""
    both = _rates(devices, lambda one: one.ranks)
    if devices.kind == "cuda" and (low := _below(both, [LOW, LOW])):
        return f"a GPU gets or gives less than {LOW / 1e9:.0f} GB/s: rank {_ranks(facts, low)}: {NEAR}"
    if any(facts.crowded(ranks) for ranks in facts.nodes().values()):
        return ""
    slow = _below(both, [SLOW * statistics.median(rates) for rates in both])
    return f"slower than the others, which wait: rank {_ranks(facts, slow)}: {NEAR}" if slow else ""


def _below(both: Sequence[Sequence[float]], limits: Sequence[float]) -> list[int]:
    """Ranks of which one rate is below its limit."""
    pairs = enumerate(zip(*both, strict=True))
    return [rank for rank, rates in pairs if any(rate < limit for rate, limit in zip(rates, limits, strict=True))]


def _ranks(facts: Facts, ranks: Sequence[int]) -> str:
    """Ranks with their hosts, the first of them."""
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return ", ".join(f"{rank} ({facts.places[rank].host})" for rank in ranks[:NAMED]) + more
