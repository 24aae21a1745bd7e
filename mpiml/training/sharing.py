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
    parts = max(replicas, workers or 1)
    default = parts if config.pipe == 1 else min(2 * config.pipe * parts, rows)
    microbatches = config.microbatches or default - default % (workers or 1)
    if microbatches < replicas:
        ranks = replicas * config.pipe
        fits = next(s for s in range(config.pipe, ranks + 1) if ranks % s == 0 and ranks // s <= microbatches)
        raise ConfigError(
            f"--microbatches {microbatches}: {replicas} replicas need at least one each; "
            f"at least {replicas}, or fewer replicas (--pipe {fits}, say)"
        )
    if microbatches > rows:
        raise ConfigError(f"--microbatches {microbatches}: the data set has only {rows} rows to share out")
    if workers and microbatches % workers:
        raise _unequal(workers, microbatches, [] if goes_on else range(replicas, rows + 1))
    return microbatches, workers


def _unequal(workers: int, microbatches: int, allowed: Sequence[int]) -> ConfigError:
    """What is wrong with workers that do not divide the micro-batches, with what would work in place of either;
    `allowed` are other numbers of micro-batches."""
    divisors = [number for number in range(1, microbatches + 1) if microbatches % number == 0]
    less, more = [w for w in divisors if w < workers][-1:], [w for w in divisors if w > workers][:1]
    below = microbatches // workers * workers
    ways = [f"--workers {' or '.join(map(str, less + more))}"]
    ways += [f"--microbatches {number}" for number in (below, below + workers) if number in allowed]
    return ConfigError(
        f"--workers {workers} --microbatches {microbatches}: workers need equally many micro-batches each; "
        f"{' or '.join(ways)} would work"
    )


def _fitting(most: int, workers: int) -> int:
    """The largest number of replicas up to `most` that divides the workers or is a multiple of them."""
    return next(replicas for replicas in range(most, 0, -1) if not workers % replicas or not replicas % workers)


def busy(config: Config, before: Config | None, ranks: int) -> int:
    """How many of `ranks` have work: all of them, unless a run goes on that has fewer micro-batches than they would
    make replicas, or has workers that so many replicas cannot share. `before` as of `resolve.resolve`."""
    replicas = ranks // config.pipe
    if before and config.microbatches:
        replicas = min(replicas, config.microbatches)
    if config.average_every and config.workers:
        replicas = _fitting(replicas, config.workers)
    return replicas * config.pipe


def grid_text(stages: int, replicas: int, microbatches: int, workers: int | None = None) -> str:
    """One line on a grid, with the flags that repeat the run's arithmetic on another."""
    ranks, of_workers = stages * replicas, f"--workers {workers} " if workers else ""
    text = f"{_count(ranks, 'rank')} = {_count(stages, 'stage')} x {_count(replicas, 'replica')}"
    text += f"; {of_workers}--microbatches {microbatches} repeats these bits on any grid"
    learners = workers or 1
    each, sharing = microbatches // learners, max(replicas // learners, 1)  # of a learner: micro-batches, replicas
    if not aligned(sharing, each):
        power = 1 << (each // sharing).bit_length() - 1
        text += f" (--microbatches {power * sharing * learners} would need the fewest messages on this one)"
    return text


def idle_text(busy: int, idle: int, microbatches: int, workers: int | None = None) -> list[str]:
    """One line about ranks without work, if there are any."""
    keeps = f"--workers {workers} and " if workers else ""
    keeps += f"--microbatches {microbatches} of the run {'keep' if workers else 'keeps'} {busy} busy"
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
