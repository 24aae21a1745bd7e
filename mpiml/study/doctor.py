"""The doctor: looks at the job it runs in and says, on one screen, what is well, what is not, and what to do."""

from __future__ import annotations

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
from mpiml.clock import Clock
from mpiml.doctor import PROGRAM, parse
from mpiml.errors import ConfigError
from mpiml.parallel.grid import nodes_of_ranks
from mpiml.run import environment, launch
from mpiml.run.clocks import clock_offset
from mpiml.run.failure import Guard, exit_code
from mpiml.run.process import prepare_process
from mpiml.run.verdict import on_rank_0
from mpiml.study import probes
from mpiml.study.command import ended

SIZES = (8, 1 << 16, 1 << 20, 1 << 24)  # bytes of the all-reduces
MESSAGE = 1 << 22  # bytes of the message that tells the bandwidth
SHOWN = 8  # nodes that get a line of their own
SLOW = 0.75  # of the median rate: slower ranks are named
SKEW = 1.0  # seconds by which clocks may differ before times in logs mislead


@dataclass
class Place:
    """Where one rank runs.

    Attributes:
        cores: that it may use, of the `node_cores` that its node has.
        age: the seconds from its process's start to the first line of this program.
        software: what has to be the same on all ranks.
    """

    host: str
    cpu: str
    cores: list[int]
    node_cores: int
    blas: str
    shared_memory: int
    age: float
    software: dict[str, str]


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
        blas_threads: of a rank.
        launch: what is wrong with the way the job was started, if anything is.
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
    blas_threads: int = 1
    launch: str = ""

    def nodes(self) -> dict[int, list[int]]:
        """The ranks of each node, by its first rank."""
        found = defaultdict(list)
        for rank, first in enumerate(self.node):
            found[first].append(rank)
        return dict(found)

    def cores(self, ranks: Sequence[int]) -> set[int]:
        """Those that some ranks of a node may use, all together."""
        return set[int]().union(*(self.places[rank].cores for rank in ranks))

    def crowded(self, ranks: Sequence[int]) -> bool:
        """Whether they have to take turns."""
        return len(ranks) * self.blas_threads > len(self.cores(ranks))


@dataclass
class Finding:
    """A line of the screen: what was looked at, what was found, whether that is "ok", of "note" or a "problem", and
    what to do."""

    name: str
    value: str
    verdict: str = "ok"
    advice: str = ""


def examine(comm: MPI.Intracomm, age: float, blas_threads: int, wrong: str) -> Facts:
    """Look and measure; collective, the result is known to all.

    Args:
        wrong: with the launch.
    """
    node = nodes_of_ranks(comm)
    firsts = sorted(set(node))
    neighbour = next((rank for rank in range(1, comm.size) if node[rank] == node[0]), None)
    facts = Facts(
        mpi=environment.mpi_library(),
        threads=MPI.Query_thread() == MPI.THREAD_MULTIPLE,
        node=node,
        places=comm.allgather(_place(age)),
        gemm_alone=probes.alone(comm, 0, probes.gemm_rate),
        gemm=probes.at_once(comm, probes.gemm_rate),
        copy=probes.at_once(comm, probes.copy_rate),
        allreduce=[(size, probes.allreduce_time(comm, size)) for size in SIZES] if comm.size > 1 else [],
        skew={first: clock_offset(comm, first) for first in firsts},
        blas_threads=blas_threads,
        launch=wrong,
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
    return Place(
        here["host"], here["cpu"], cores, os.cpu_count() or 1, environment.blas(), free, age, launch.software()
    )


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
    if facts.launch:
        yield Finding("MPI", text, "problem", facts.launch)
    elif not facts.threads:
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
        there, cores = places[0].node_cores, facts.cores(ranks)
        few = f"{len(cores)} of {_count(there, 'core')}" if len(cores) < there else _count(there, "core")
        each = f" of {facts.blas_threads} threads" if facts.blas_threads > 1 else ""
        bound = all(len(place.cores) < there for place in places)
        text = f"{_count(len(ranks), 'rank')}{each}, {few}, {'bound' if bound else 'not bound'}"
        text += f", {places[0].shared_memory / 2**30:.1f} GiB free in /dev/shm"
        yield Finding(f"node {places[0].host}", text, *_trouble(facts, first, ranks))
    if len(nodes) > SHOWN:
        yield Finding("...", f"and {len(nodes) - SHOWN} more nodes (--json lists all)")


def _trouble(facts: Facts, first: int, ranks: Sequence[int]) -> tuple[str, str]:
    """Verdict and advice on a node."""
    cores, places = facts.cores(ranks), [facts.places[rank] for rank in ranks]
    there = places[0].node_cores
    if all(len(place.cores) < len(cores) for place in places) and sum(len(p.cores) for p in places) > len(cores):
        return "problem", "ranks are bound to the same cores: mpirun --bind-to core, srun -c"
    if facts.crowded(ranks) and len(cores) < there:
        advice = f"ranks take turns because they are bound to {len(cores)} of {_count(there, 'core')}"
        return "problem", f"{advice}: mpirun --bind-to none, srun -c, or ask for more cores"
    if facts.crowded(ranks) and facts.blas_threads > 1:
        needed = f"{_count(len(ranks), 'rank')} of {facts.blas_threads} threads need"
        return "problem", f"{needed} {_count(len(ranks) * facts.blas_threads, 'core')}: fewer ranks, or --threads 1"
    if facts.crowded(ranks):
        return "note", "more ranks than cores: they take turns; speed does not grow with ranks"
    if abs(facts.skew.get(first, 0.0)) > SKEW:
        return "note", f"its clock is {facts.skew[first]:+.1f} s off rank 0's: times in logs mislead"
    return "ok", ""


def _judge_libraries(facts: Facts) -> Iterator[Finding]:
    for name in facts.places[0].software:
        kinds = sorted({place.software[name] for place in facts.places})
        if len(kinds) > 1:
            yield Finding(name, "; ".join(kinds), "problem", "ranks differ, and a training would be refused")
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
    crowded = any(facts.crowded(ranks) for ranks in facts.nodes().values())
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
    return ended(PROGRAM, lambda: _look(sys.argv[1:] if arguments is None else arguments, age))


def _look(arguments: Sequence[str], age: float) -> int:
    comm, clock = MPI.COMM_WORLD, Clock()
    silent, wrong = comm.rank > 0, ""
    try:
        launch.check_size(comm.size)
    except ConfigError as error:
        silent, wrong = silent or error.silent, str(error)
    if silent and comm.size == 1:  # another process tells
        return 1
    try:
        with Guard(comm, clock, PROGRAM):
            chosen = on_rank_0(comm, clock, lambda: parse(arguments))
    except ConfigError as error:  # reported already
        return exit_code(error)
    prepare_process(chosen.threads)
    facts = examine(comm, age, chosen.threads, wrong)
    findings = judge(facts)
    if chosen.json and not silent:
        found = {"mpiml": mpiml.__version__, "facts": asdict(facts), "findings": [asdict(f) for f in findings]}
        print(json.dumps(found, indent=2), flush=True)
    elif not silent:
        print(screen(findings), flush=True)
    return int(any(finding.verdict == "problem" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
