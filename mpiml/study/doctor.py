"""The doctor: looks at the job it runs in and says, on one screen, what is well, what is not, and what to do."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

from mpi4py import MPI

import mpiml
from mpiml.parallel.grid import nodes_of_ranks
from mpiml.run import environment
from mpiml.run.clocks import clock_offset
from mpiml.run.process import prepare_process
from mpiml.study import probes

SIZES = (8, 1 << 16, 1 << 20, 1 << 24)  # bytes of the all-reduces
MESSAGE = 1 << 22  # bytes of the message that tells the bandwidth
SHOWN = 8  # nodes that get a line of their own
SLOW = 0.75  # of the median rate: slower ranks are named
SKEW = 1.0  # seconds by which clocks may differ before times in logs mislead


@dataclass
class Place:
    """Where one rank runs; `cores` are those it may use, `age` the seconds from its process's start to the first
    line of this program."""

    host: str
    cpu: str
    cores: list[int]
    blas: str
    shared_memory: int
    age: float


@dataclass
class Facts:
    """All that the doctor finds out. Rates are per second, by rank; times are seconds.

    Attributes:
        node: for each rank, the first rank on its node.
        copy: bytes read and written by each rank while all copy.
        gemm_alone: floating-point operations of rank 0 while the others rest; `gemm` of each while all compute.
        inside, between: latency and bytes per second of messages on a node and between two, where there are such.
        allreduce: (bytes, seconds).
        skew: by node, how far its clock is ahead of rank 0's.
    """

    mpi: str
    threads: bool
    node: list[int]
    places: list[Place]
    gemm_alone: float
    gemm: list[float]
    copy: list[float]
    allreduce: list[tuple[int, float]]
    inside: tuple[float, float] | None = None
    between: tuple[float, float] | None = None
    skew: dict[int, float] = field(default_factory=dict)

    def nodes(self) -> dict[int, list[int]]:
        """The ranks of each node, by its first rank."""
        found = defaultdict(list)
        for rank, first in enumerate(self.node):
            found[first].append(rank)
        return dict(found)


@dataclass
class Finding:
    """A line of the screen: what was looked at, what was found, whether that is "ok", of "note" or a "problem", and
    what to do."""

    name: str
    value: str
    verdict: str = "ok"
    advice: str = ""


def examine(comm: MPI.Intracomm, age: float) -> Facts:
    """Look and measure; collective, the result is known to all."""
    node = nodes_of_ranks(comm)
    firsts = sorted(set(node))
    neighbour = next((rank for rank in range(1, comm.size) if node[rank] == node[0]), None)
    facts = Facts(
        mpi=MPI.Get_library_version().splitlines()[0].strip("\x00 ").replace("Version:      ", ""),
        threads=MPI.Query_thread() == MPI.THREAD_MULTIPLE,
        node=node,
        places=comm.allgather(_place(age)),
        gemm_alone=probes.alone(comm, 0, probes.gemm_rate),
        gemm=probes.at_once(comm, probes.gemm_rate),
        copy=probes.at_once(comm, probes.copy_rate),
        allreduce=[(size, probes.allreduce_time(comm, size)) for size in SIZES] if comm.size > 1 else [],
        skew={first: clock_offset(comm, first) for first in firsts},
    )
    if neighbour is not None:
        facts.inside = _link(comm, neighbour)
    if len(firsts) > 1:
        facts.between = _link(comm, firsts[1])
    return facts


def _place(age: float) -> Place:
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    here = environment.of_rank(threads=0)
    cores = sorted(os.sched_getaffinity(0))
    return Place(here["host"], here["cpu"], cores, environment.blas(), free, age)


def _link(comm: MPI.Intracomm, other: int) -> tuple[float, float]:
    return probes.message_time(comm, 0, other, 8), MESSAGE / probes.message_time(comm, 0, other, MESSAGE)


def judge(facts: Facts) -> list[Finding]:
    """What the facts mean."""
    return [
        *_judge_mpi(facts),
        *_judge_nodes(facts),
        *_judge_libraries(facts),
        *_judge_rates(facts),
        *_judge_links(facts),
    ]


def _judge_mpi(facts: Facts) -> Iterator[Finding]:
    ranks, nodes = len(facts.node), len(facts.nodes())
    text = f"{facts.mpi}; {_count(ranks, 'rank')} on {_count(nodes, 'node')}"
    if not facts.threads:
        yield Finding(
            "MPI", text, "problem", "no MPI_THREAD_MULTIPLE: a rank that stalls is not noticed; use another build"
        )
    elif ranks == 1:
        yield Finding("MPI", text, "note", "start it as the training would be: mpirun -n 4 python -m mpiml.doctor")
    else:
        yield Finding("MPI", text)


def _judge_nodes(facts: Facts) -> Iterator[Finding]:
    nodes = facts.nodes()
    for first, ranks in list(nodes.items())[:SHOWN]:
        places = [facts.places[rank] for rank in ranks]
        sets = [set(place.cores) for place in places]
        cores = set[int]().union(*sets)
        bound = all(len(own) < len(cores) for own in sets) or len(cores) == len(ranks) == 1
        text = f"{_count(len(ranks), 'rank')}, {_count(len(cores), 'core')}, " + ("bound" if bound else "not bound")
        text += f", {places[0].shared_memory / 2**30:.1f} GiB free in /dev/shm"
        name = f"node {places[0].host}"
        if sum(len(own) for own in sets) > len(cores) and bound:
            yield Finding(name, text, "problem", "ranks are bound to the same cores: mpirun --bind-to core, srun -c")
        elif len(ranks) > len(cores):
            yield Finding(name, text, "note", "more ranks than cores: they take turns; speed does not grow with ranks")
        elif abs(facts.skew.get(first, 0.0)) > SKEW:
            advice = f"its clock is {facts.skew[first]:+.1f} s off rank 0's: times in logs mislead"
            yield Finding(name, text, "note", advice)
        else:
            yield Finding(name, text)
    if len(nodes) > SHOWN:
        yield Finding("...", f"and {len(nodes) - SHOWN} more nodes (--json lists all)")


def _judge_libraries(facts: Facts) -> Iterator[Finding]:
    for name, attribute in (("processor", "cpu"), ("BLAS", "blas")):
        kinds = sorted({getattr(place, attribute) for place in facts.places})
        if len(kinds) > 1:
            yield Finding(name, "; ".join(kinds), "note", "ranks differ: bits may differ from another job's")
        else:
            yield Finding(name, kinds[0])
    slowest = max(range(len(facts.places)), key=lambda rank: facts.places[rank].age)
    age = facts.places[slowest].age
    advice = f"rank {slowest} waits for its files: a virtual environment on a local disk or in an image starts sooner"
    yield Finding("start", f"{age:.1f} s until all is imported", *(("note", advice) if age > 20 else ()))


def _judge_rates(facts: Facts) -> Iterator[Finding]:
    crowded = any(
        len(ranks) > len(set[int]().union(*(facts.places[rank].cores for rank in ranks)))
        for ranks in facts.nodes().values()
    )
    for name, rates, unit in (("products", facts.gemm, "GFLOP/s"), ("copying", facts.copy, "GB/s")):
        middle = statistics.median(rates)
        slow = [rank for rank, rate in enumerate(rates) if rate < SLOW * middle]
        text = f"{middle / 1e9:.1f} {unit} a rank"
        if name == "products":
            text += f" when all compute, {facts.gemm_alone / 1e9:.1f} alone"
        if slow and not crowded:
            named = ", ".join(f"{rank} ({facts.places[rank].host})" for rank in slow[:4])
            yield Finding(name, text, "note", f"slower than the others, who will wait for them: rank {named}")
        elif name == "products" and middle < SLOW * facts.gemm_alone and not crowded:
            yield Finding(
                name, text, "note", "ranks slow each other down: other jobs on the node, or cores that are two"
            )
        else:
            yield Finding(name, text)


def _judge_links(facts: Facts) -> Iterator[Finding]:
    for name, link, limit in (("on a node", facts.inside, 20e-6), ("between nodes", facts.between, 100e-6)):
        if link:
            latency, rate = link
            text = f"messages take {_time(latency)}, then {rate / 1e9:.1f} GB/s"
            if latency > limit:
                slow = "more ranks than cores, or a network used through TCP: is the MPI library built for it?"
                yield Finding(name, text, "note", slow)
            else:
                yield Finding(name, text)
    if facts.allreduce:
        yield Finding("all-reduce", ", ".join(f"{_size(size)} {_time(time)}" for size, time in facts.allreduce))


def screen(findings: Sequence[Finding]) -> str:
    """The findings as text; advice stands below the line it belongs to."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict:<8} {finding.name:<{width}}  {finding.value}")
        if finding.advice:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.advice}")
    return "\n".join(lines)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("s" if number != 1 else "")


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def _size(size: int) -> str:
    return f"{size} B" if size < 1024 else f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 1 if there is a problem."""
    age = probes.seconds_since_start()
    parser = argparse.ArgumentParser(prog="python -m mpiml.doctor", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="BLAS threads of a rank (default: 1)")
    parser.add_argument("--json", action="store_true", help="print facts and findings as JSON")
    chosen = parser.parse_args(arguments)
    prepare_process(chosen.threads)
    facts = examine(MPI.COMM_WORLD, age)
    findings = judge(facts)
    if MPI.COMM_WORLD.rank == 0 and chosen.json:
        found = {"mpiml": mpiml.__version__, "facts": asdict(facts), "findings": [asdict(f) for f in findings]}
        print(json.dumps(found, indent=2), flush=True)
    elif MPI.COMM_WORLD.rank == 0:
        print(screen(findings), flush=True)
    return int(any(finding.verdict == "problem" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
