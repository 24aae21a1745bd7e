"""What is well with a job, what is not, and what to do, on one screen."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mpiml.doctor.facts import Facts

SHOWN = 8  # nodes that get a line of their own
SLOW = 0.75  # of the median rate: slower ranks are named
SKEW = 1.0  # seconds by which clocks may differ before times in logs mislead


@dataclass
class Finding:
    """A line of the screen: what was looked at, what was found, whether that is "ok", of "note" or a "problem", and
    what to do."""

    name: str
    value: str
    verdict: str = "ok"
    advice: str = ""


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
