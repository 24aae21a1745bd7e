"""How the micro-batches of a step are shared out: to workers and replicas, and how many ranks have work; no MPI."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mpiml.config import Config
from mpiml.errors import ConfigError
from mpiml.nn import optimizers
from mpiml.parallel.tree import aligned


def shared_out(config: Config, rows: int, replicas: int, goes_on: bool = False) -> tuple[int, int | None]:
    """The numbers of micro-batches of a step and of workers, None if there are none.

    A run that `goes_on` keeps its micro-batches. Raises ConfigError for micro-batches that replicas, workers or rows
    cannot share.
    """
    workers = (config.workers or replicas) if config.average_every else None
    if workers and workers % replicas and replicas % workers:
        fits = _fitting(replicas, workers)
        raise ConfigError(f"--workers {workers}: {_count(replicas, 'replica')} cannot share them; {fits} could")
    if workers and workers > rows:
        raise ConfigError(f"--workers {workers}: the data set has only {rows} rows to share out")
    parts, leaf = max(replicas, workers or 1), config.leaf
    microbatches = config.microbatches or usual(config.pipe, replicas, workers, leaf, rows)
    given = f"--microbatches {microbatches}" + (f" --leaf {leaf}" if leaf > 1 else "")
    if microbatches % leaf:
        raise _unequal(workers or 1, leaf, microbatches, range(replicas, rows + 1))
    if microbatches // leaf < replicas:
        ranks, leaves = replicas * config.pipe, microbatches // leaf
        fits = next(s for s in range(config.pipe, ranks + 1) if ranks % s == 0 and ranks // s <= leaves)
        smaller = [one for one in range(1, microbatches // replicas + 1) if not microbatches % ((workers or 1) * one)]
        raise ConfigError(
            f"{given}: {replicas} replicas need at least one {'leaf ' if leaf > 1 else ''}each; "
            f"at least {replicas * leaf}, {f'--leaf {smaller[-1]}, ' if smaller else ''}"
            f"or fewer replicas (--pipe {fits}, say)"
        )
    if microbatches > rows:
        fewer = f"; --leaf {rows // parts} would work" if not config.microbatches and rows >= parts else ""
        raise ConfigError(f"{given}: the data set has only {rows} rows to share out{fewer}")
    if workers and microbatches % (workers * leaf):
        raise _unequal(workers, leaf, microbatches, range(replicas, 0 if goes_on else rows + 1))
    return microbatches, workers


def usual(stages: int, replicas: int, workers: int | None, leaf: int, rows: int) -> int:
    """How many micro-batches a step has where that is not said: one for each replica or worker, in pipelines twice as
    many as stages, and whole leaves for each."""
    parts = max(replicas, workers or 1)
    count = max(parts if stages == 1 else min(2 * stages * parts, rows), parts * leaf)
    return count - count % ((workers or 1) * leaf)


def _unequal(workers: int, leaf: int, microbatches: int, allowed: range) -> ConfigError:
    """What is wrong with micro-batches that do not make equally many whole leaves for each worker, with what would work
    in place of one of the three; `allowed` are numbers of leaves, from that of replicas on, and of micro-batches. It is
    empty if only workers may change."""
    unit = workers * leaf
    ways = []
    if workers > 1:
        ways += _either("workers", workers, [w for w in range(1, microbatches + 1) if not microbatches % (w * leaf)])
    if leaf > 1 and allowed:
        each = range(1, microbatches // allowed.start + 1)
        ways += _either("leaf", leaf, [one for one in each if not microbatches % (workers * one)])
    below, least = microbatches // unit * unit, -(-allowed.start // workers) * unit
    near = sorted({max(below, least), max(below + unit, least)})
    ways += [f"--microbatches {number}" for number in near if number in allowed]
    said = [f"--workers {workers}"] * (workers > 1) + [f"--leaf {leaf}"] * (leaf > 1)
    need = "workers need equally many micro-batches each" if leaf == 1 else f"leaves need {leaf} micro-batches each"
    need += ", and workers equally many leaves each" if min(workers, leaf) > 1 else ""
    few = f"the data set has too few rows for {_count(allowed.start, 'replica')}"
    remedy = f"{' or '.join(ways)} would work" if ways else few
    return ConfigError(f"{' '.join(said)} --microbatches {microbatches}: {need}; {remedy}")


def _either(name: str, value: int, fitting: Sequence[int]) -> list[str]:
    """The flag with the fitting values next to this one."""
    near = [one for one in fitting if one < value][-1:] + [one for one in fitting if one > value][:1]
    return [f"--{name} {' or '.join(map(str, near))}"] if near else []


def _fitting(most: int, workers: int) -> int:
    """The largest number of replicas up to `most` that divides the workers or is a multiple of them."""
    return next(replicas for replicas in range(most, 0, -1) if not workers % replicas or not replicas % workers)


def busy(config: Config, before: Config | None, ranks: int) -> int:
    """How many of `ranks` have work: all of them, unless a run goes on that has fewer micro-batches than they would
    make replicas, or has workers that so many replicas cannot share. `before` as of `resolve.resolve`."""
    replicas = ranks // config.pipe
    if before and config.microbatches:
        replicas = min(replicas, config.microbatches // config.leaf)
    if config.average_every and config.workers:
        replicas = _fitting(replicas, config.workers)
    return replicas * config.pipe


def grid_text(stages: int, replicas: int, microbatches: int, workers: int | None = None, leaf: int = 1) -> str:
    """One line on a grid, with the flags that repeat the run's arithmetic on another."""
    text = f"{_count(stages * replicas, 'rank')} = {_count(stages, 'stage')} x {_count(replicas, 'replica')}"
    flags = [f"--workers {workers}"] * bool(workers) + [f"--leaf {leaf}"] * (leaf > 1)
    text += f"; same bits on any grid: {' '.join([*flags, f'--microbatches {microbatches}'])}"
    learners = workers or 1
    each, sharing = microbatches // learners // leaf, max(replicas // learners, 1)  # of a learner: leaves, replicas
    if not aligned(sharing, each):
        power = 1 << (each // sharing).bit_length() - 1
        text += f" (--microbatches {power * sharing * learners * leaf} would need the fewest messages on this one)"
    return text


def idle_text(busy: int, idle: int, microbatches: int, workers: int | None = None, leaf: int = 1) -> list[str]:
    """One line about ranks without work, if there are any."""
    flags = [f"--workers {workers}"] * bool(workers) + [f"--leaf {leaf}"] * (leaf > 1)
    keeps = " and ".join([*flags, f"--microbatches {microbatches}"])
    keeps += f" of the run {'keep' if flags else 'keeps'} {busy} busy"
    return [f"{busy + idle} ranks, but {keeps}: {_count(idle, 'rank')} idle"] if idle else []


def workers_text(config: Config, replicas: int) -> list[str]:
    """One line about the workers of a run with resolved settings and when they meet, if there are any."""
    workers, outer = config.workers, config.outer_step
    if not workers:
        return []
    text = _count(workers, "worker")
    if workers != replicas:
        text += f" of {replicas // workers} replicas" if workers < replicas else f", {workers // replicas} to a replica"
    text += f": learning apart from step {max(config.average_from, 1)} on, averaged every "
    text += _count(config.average_every, "step") if config.average_every > 1 else "step"
    text += " by an outer step, rate {:g}, momentum {:g}".format(*outer) if outer else ""
    if min(replicas, workers) > 1 and config.average_every < (sums := _sums(config)):
        text += f"; that sends more than a sum at every step, which --average-every {math.ceil(sums)} does not"
    return [text]


def _sums(config: Config) -> float:
    """How many sums of gradients send as much as an average: of the weights, and of each vector that is kept for them.
    An outer step sends the weights on once more, which is half of a sum."""
    kept = len(optimizers.build(config.optimizer, 0.0, 0.0).states) + (config.ema > 0)
    return 1 + kept + bool(config.outer_step) / 2


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("s" if number > 1 else "")
