"""The doctor's judgement: which facts are a problem, and what to do about it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mpiml.command import plural, size
from mpiml.doctor.facts import Facts

SHOWN = 8  # nodes that get a line of their own
SLOW = 0.75  # of the median rate: ranks below it are named
SKEW = 1.0  # seconds by which clocks may differ before times in logs mislead


@dataclass
class Finding:
    """A line of the screen: the subject, its state, a verdict ("ok", "note" or "problem"), and advice."""

    name: str
    value: str
    verdict: str = "ok"
    advice: str = ""


def judge(facts: Facts) -> list[Finding]:
    """All findings but those about devices, in the order of the screen."""
    parts = (_judge_mpi, _judge_nodes, _judge_libraries, _judge_rates, _judge_links)
    return [finding for part in parts for finding in part(facts)]


def _noted(name: str, value: str, advice: str) -> Finding:
    """A finding that is a note if there is advice."""
    return Finding(name, value, "note" if advice else "ok", advice)


def _judge_mpi(facts: Facts) -> Iterator[Finding]:
    ranks, nodes = len(facts.node), len(facts.nodes())
    text = f"{facts.mpi}; {plural(ranks, 'rank')} on {plural(nodes, 'node')}"
    threads = "" if facts.threads else "no MPI_THREAD_MULTIPLE: stalled ranks are not detected; use another build"
    if problem := facts.launch or threads:
        yield Finding("MPI", text, "problem", problem)
    else:
        start = "start it as you would start training: mpirun -n 4 python -m mpiml.doctor"
        yield _noted("MPI", text, start if ranks == 1 else "")


def _judge_nodes(facts: Facts) -> Iterator[Finding]:
    nodes = facts.nodes()
    for first, ranks in list(nodes.items())[:SHOWN]:
        places = [facts.places[rank] for rank in ranks]
        node_cores, cores = places[0].node_cores, facts.cores(ranks)
        few = f"{len(cores)} of " if len(cores) < node_cores else ""
        each = f" of {facts.blas_threads} threads" if facts.blas_threads > 1 else ""
        bound = all(len(place.cores) < node_cores for place in places)
        text = f"{plural(len(ranks), 'rank')}{each}, {few}{plural(node_cores, 'core')}, {'' if bound else 'not '}bound"
        text += f", {places[0].shared_memory / 2**30:.1f} GiB free in /dev/shm"
        yield Finding(f"node {places[0].host}", text, *_trouble(facts, first, ranks))
    if len(nodes) > SHOWN:
        yield Finding("...", f"and {len(nodes) - SHOWN} more nodes (--json lists all)")


def _trouble(facts: Facts, first: int, ranks: Sequence[int]) -> tuple[str, str]:
    """Verdict and advice on a node."""
    cores, places = facts.cores(ranks), [facts.places[rank] for rank in ranks]
    node_cores = places[0].node_cores
    if all(len(place.cores) < len(cores) for place in places) and sum(len(p.cores) for p in places) > len(cores):
        return "problem", "ranks are bound to the same cores: mpirun --bind-to core, srun -c"
    if facts.crowded(ranks) and len(cores) < node_cores:
        advice = f"ranks take turns because they are bound to {len(cores)} of {plural(node_cores, 'core')}"
        return "problem", f"{advice}: mpirun --bind-to none, srun -c, or ask for more cores"
    if facts.crowded(ranks) and facts.blas_threads > 1:
        needed = f"{plural(len(ranks), 'rank')} of {facts.blas_threads} threads need"
        return "problem", f"{needed} {plural(len(ranks) * facts.blas_threads, 'core')}: fewer ranks, or --threads 1"
    if facts.crowded(ranks):
        return "note", "more ranks than cores: they take turns; speed does not grow with ranks"
    if abs(facts.skew.get(first, 0.0)) > SKEW:
        return "note", f"its clock is {facts.skew[first]:+.1f} s off rank 0's: times in logs mislead"
    return "ok", ""


def _judge_libraries(facts: Facts) -> Iterator[Finding]:
    for name in facts.places[0].software:
        kinds = sorted({place.software[name] for place in facts.places})
        if len(kinds) > 1:
            yield Finding(name, "; ".join(kinds), "problem", "ranks differ: mpiml.train would refuse to start")
    for name, attribute in (("processor", "cpu"), ("BLAS", "blas")):
        kinds = sorted({getattr(place, attribute) for place in facts.places})
        differ = "ranks differ: bits may differ from another job's" if len(kinds) > 1 else ""
        yield _noted(name, "; ".join(kinds), differ)
    slowest = max(range(len(facts.places)), key=lambda rank: facts.places[rank].age)
    age = facts.places[slowest].age
    advice = f"rank {slowest} waits for its files: put the virtual environment on a local disk or into an image"
    yield _noted("start", f"{age:.1f} s until all is imported", advice if age > 20 else "")


def _judge_rates(facts: Facts) -> Iterator[Finding]:
    crowded = any(facts.crowded(ranks) for ranks in facts.nodes().values())
    products = statistics.median(facts.gemm)
    text = f"{products / 1e9:.1f} GFLOP/s a rank when all compute, {facts.gemm_alone / 1e9:.1f} alone"
    advice = "" if crowded else _slow_ranks(facts, facts.gemm)
    if not crowded and not advice and products < SLOW * facts.gemm_alone:
        advice = "ranks slow each other down: other jobs on the node, or two threads of one core"
    yield _noted("products", text, advice)
    advice = "" if crowded else _slow_ranks(facts, facts.copy)
    yield _noted("copying", f"{statistics.median(facts.copy) / 1e9:.1f} GB/s a rank", advice)


def _slow_ranks(facts: Facts, rates: Sequence[float]) -> str:
    """Advice that names the ranks slower than most; empty if there are none."""
    slow = [rank for rank, rate in enumerate(rates) if rate < SLOW * statistics.median(rates)]
    names = ", ".join(f"{rank} ({facts.places[rank].host})" for rank in slow[:4])
    return f"slower than the others, which wait: rank {names}" if slow else ""


def _judge_links(facts: Facts) -> Iterator[Finding]:
    for name, link, limit in (("on a node", facts.inside, 20e-6), ("between nodes", facts.between, 100e-6)):
        if link:
            latency, rate = link
            slow = "more ranks than cores, or a network used through TCP: is the MPI library built for it?"
            text = f"messages take {_time(latency)}, then {rate / 1e9:.1f} GB/s"
            yield _noted(name, text, slow if latency > limit else "")
    if facts.allreduce:
        yield Finding("all-reduce", ", ".join(f"{size(amount)} {_time(time)}" for amount, time in facts.allreduce))


def screen(findings: Sequence[Finding]) -> str:
    """The findings as text; advice stands below its finding."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict:<8} {finding.name:<{width}}  {finding.value}")
        if finding.advice:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.advice}")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"
