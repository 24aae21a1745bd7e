"""Steps of the package against steps by hand, of PyTorch's data parallelism and pipelining, and on fewer ranks."""

from __future__ import annotations

import itertools
import os
import resource
from collections.abc import Sequence

import numpy as np
from mpi4py import MPI

from mpiml.bench.byhand import Perceptron
from mpiml.bench.models import MOMENTUM, RATE, images, perceptron, tower
from mpiml.bench.pairs import PAIRS, Action, ratio
from mpiml.bench.rows import Ratio
from mpiml.parallel.memory import SharedMemory
from mpiml.parallel.schedules import SCHEDULES
from mpiml.parallel.simulator import simulate
from mpiml.run.trace import Noted, Recorder
from mpiml.team import quiet_barrier, share_cores

WORLD = MPI.COMM_WORLD


def widths(text: str) -> list[int]:
    """Hidden widths, written 256-256."""
    return [int(width) for width in text.split("-")]


def by_hand(hidden: str, batch: str, microbatches: str, optimizer: str) -> Ratio:
    """Time of a step of one rank over that of the same arithmetic written by hand."""
    rows, parts = int(batch), int(microbatches)
    trainer = perceptron(MPI.COMM_SELF, widths(hidden), rows, parts, optimizer=optimizer)
    hand = hand_step(hidden, rows, parts, MOMENTUM if optimizer == "momentum" else 0.0)
    return ratio(WORLD, trainer.step, hand, trainer.repeats)


def hand_checked(hidden: str, batch: str) -> Ratio:
    """Time of a step by hand that looks whether its numbers are finite over that of one that does not."""
    checked, plain = (hand_step(hidden, int(batch), 1, MOMENTUM, checked) for checked in (True, False))
    return ratio(WORLD, checked, plain, 1000)


def hand_step(hidden: str, rows: int, parts: int, momentum: float, checked: bool = False) -> Action:
    """A step by hand on the next rows, in so many micro-batches."""
    hand = Perceptron([784, *widths(hidden), 10])
    x, y = images()
    orders = itertools.cycle(np.split(np.random.default_rng(1).permutation(len(x)), len(x) // rows))

    def step() -> None:
        hand.step([(x[part], y[part]) for part in np.array_split(next(orders), parts)], RATE, momentum, checked)

    return step


def page_faults(hidden: str, batch: str) -> Ratio:
    """Page faults of a step, after the first steps."""
    trainer = perceptron(WORLD, widths(hidden), int(batch), WORLD.size)
    counts = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            trainer.step()
        counts.append((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
    return Ratio.of(counts[2:])


def traced(hidden: str, batch: str, microbatches: str) -> Ratio:
    """Time of a step with --trace over that of a step without, on one rank."""
    size = widths(hidden), int(batch), int(microbatches)
    recorded, plain = (perceptron(MPI.COMM_SELF, *size, trace=path) for path in ("timeline.json", None))
    return ratio(WORLD, recorded.step, plain.step, plain.repeats)


def torch_ddp(hidden: str, rows: str) -> Ratio:
    """Samples/s over those of PyTorch's DistributedDataParallel; `rows` of each rank."""
    from mpiml.bench import torch_distributed, torch_eager

    trainer = perceptron(WORLD, widths(hidden), int(rows) * WORLD.size, WORLD.size)
    module = torch_eager.mlp(widths(hidden))
    peer = torch_distributed.data_parallel(WORLD, module, *images(), int(rows), "momentum")
    return ratio(WORLD, peer.step, trainer.step, trainer.repeats)


def torch_pipeline(width: str, batch: str) -> Ratio:
    """Samples/s of a pipeline over those of PyTorch's."""
    from mpiml.bench.torch_distributed import Pipeline

    trainer = tower(WORLD, int(width), int(batch), 8, WORLD.size)
    peer = Pipeline(WORLD, int(width), int(batch), 8)
    return ratio(WORLD, peer.step, trainer.step, trainer.repeats)


def pipeline(width: str, batch: str, microbatches: str) -> Ratio:
    """Samples/s of S stages over S (1 - bubble) times those of one rank, with bubble (S - 1) / (M + S - 1)."""
    stages, parts = WORLD.size, int(microbatches)
    whole = tower(WORLD, int(width), int(batch), parts, stages)
    alone = tower(MPI.COMM_SELF, int(width), int(batch), parts, 1).step if WORLD.rank == 0 else None
    ideal = stages * (1 - (stages - 1) / (parts + stages - 1))
    return ratio(WORLD, alone, whole.step, whole.repeats, 1 / ideal)


def schedules(width: str, batch: str, microbatches: str, schedule: str) -> Ratio:
    """Samples/s of a pipeline by a schedule over those by 1F1B."""
    size = int(width), int(batch), int(microbatches), WORLD.size
    chosen, usual = (tower(WORLD, *size, schedule=name) for name in (schedule, "1f1b"))
    return ratio(WORLD, usual.step, chosen.step, chosen.repeats)


def simulated(width: str, batch: str, microbatches: str, schedule: str) -> Ratio:
    """The time of a pipeline's passes by the simulator, from how long those of each stage take here, over the time that
    they take together."""
    trainer = tower(WORLD, int(width), int(batch), int(microbatches), WORLD.size, schedule=schedule, trace="unwritten")
    recorder = trainer.run.grid.team.clock
    assert isinstance(recorder, Recorder), "it is traced"
    ratios = []
    for step in range(3 * PAIRS + 1):
        recorder.events.clear()
        quiet_barrier(WORLD)
        trainer.step()
        spent, begin, end = passes(list(recorder.events))
        forward, inputs, weights = zip(*WORLD.allgather(spent / int(microbatches)), strict=True)
        whole = np.add(inputs, weights).tolist()
        made = simulate(SCHEDULES[schedule], WORLD.size, int(microbatches), forward, whole, weights=weights)
        if step:
            ratios.append(made.makespan / (max(WORLD.allgather(end)) - min(WORLD.allgather(begin))))
    return Ratio.of(ratios)


def passes(events: Sequence[Noted]) -> tuple[np.ndarray, float, float]:
    """The seconds that a rank computes F, I and W in a step, by its events, when it began, and when it was done."""
    kinds = {"data": 0, "forward": 0, "loss": 0, "backward": 1, "weights": 2, "accumulate": 2}
    spent, kind = np.zeros(3), 0
    for event, following in itertools.pairwise(events):
        time, _, _, name, _ = event
        if name == "communication":
            break
        kind = kinds.get(name, kind)  # what is sent belongs to the pass before
        if name != "waiting":
            spent[kind] += following[0] - time
    return spent, events[0][0], time


def weak_scaling(hidden: str, rows: str, how: str) -> Ratio:
    """Time of one rank alone over that of all ranks with as many rows each.

    `how`: they train "together", or each a model of its own ("apart"), with a barrier after every step. What they lose
    when apart is the machine's doing: it delays now one rank, now another.
    """
    comm = WORLD if how == "together" else MPI.COMM_SELF
    everyone = perceptron(comm, widths(hidden), int(rows) * comm.size, comm.size)
    alone = perceptron(MPI.COMM_SELF, widths(hidden), int(rows), 1).step if WORLD.rank == 0 else None
    share_cores(WORLD.size, len(os.sched_getaffinity(0)))
    meeting = SharedMemory(WORLD, 0, 0)

    def step() -> None:
        everyone.step()
        if how == "apart":
            meeting.barrier()

    return ratio(WORLD, alone, step, everyone.repeats)


def workers(hidden: str, rows: str, every: str, how: str) -> Ratio:
    """Time of the steps of ranks that train "together", or each a model of its own ("apart"), over that of a round of
    as many steps in which each rank is a worker; `rows` of each rank."""
    steps, size = int(every), (widths(hidden), int(rows) * WORLD.size, WORLD.size)
    learning = perceptron(WORLD, *size, average_every=steps, log_every=10**9)
    comm = WORLD if how == "together" else MPI.COMM_SELF
    other = perceptron(comm, widths(hidden), int(rows) * comm.size, comm.size)
    share_cores(WORLD.size, len(os.sched_getaffinity(0)))

    def others() -> None:
        for _ in range(steps):
            other.step()

    return ratio(WORLD, others, learning.step, max(1, learning.repeats // steps))


def oversubscribed(hidden: str, batch: str, microbatches: str) -> Ratio:
    """Samples/s of more ranks than cores over those of one rank with as many micro-batches."""
    size = widths(hidden), int(batch), int(microbatches)
    everyone = perceptron(WORLD, *size, optimizer="sgd")
    alone = perceptron(MPI.COMM_SELF, *size, optimizer="sgd").step if WORLD.rank == 0 else None
    return ratio(WORLD, alone, everyone.step, 50)
