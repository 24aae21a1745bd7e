"""Predictions for grids that nobody has measured, and a check of such predictions against a study's points; no MPI.

`calibrate` starts the job that measures the pieces (mpiml.study.calibration), `predict` puts them together for any
grid (mpiml.study.step), `check` compares that with what was measured: none of which has gone into the prediction.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpiml.config import parse
from mpiml.design import open_data
from mpiml.documents import to_json
from mpiml.errors import ConfigError
from mpiml.start import BLAS
from mpiml.study import table
from mpiml.study.columns import table as columns
from mpiml.study.command import positive, whole, wholes
from mpiml.study.job import Job, Training, training
from mpiml.study.launcher import check_program, launcher
from mpiml.study.machine import MACHINE, Link, Machine, load
from mpiml.study.points import read
from mpiml.study.step import Step, step

LATENCY, BANDWIDTH = 2e-6, 10e9  # assumed of a network that was not measured: a second, and bytes per second
GOAL = 0.15  # the largest median error of a prediction that is good


@dataclass(frozen=True)
class Prediction:
    """A grid and what a step is predicted to take on it."""

    ranks: int
    stages: int
    batch: int
    microbatches: int
    step: Step
    samples_per_second: float


def register(commands: Any) -> None:
    """Add this module's commands to those of mpiml.scaling."""
    measure = commands.add_parser("calibrate", help="measure what predictions need", allow_abbrev=False)
    measure.add_argument("directory", metavar="DIR", help="of a study")
    measure.add_argument("--ranks", type=whole(), metavar="N", help="that compute at once (default: the node's cores)")
    measure.add_argument("--launcher", metavar="TEXT", help="as of run")
    measure.add_argument(
        "--repeats",
        type=whole(),
        default=3,
        metavar="N",
        help="jobs; medians count, also of earlier ones (default: 3)",
    )
    measure.set_defaults(act=calibrate)
    tell = commands.add_parser("predict", help="the step on grids that are not measured", allow_abbrev=False)
    tell.add_argument("directory", metavar="DIR", help="of a study")
    tell.add_argument("--ranks", type=wholes, required=True, metavar="N,N", help="numbers of ranks")
    tell.add_argument("--node-ranks", type=whole(), metavar="N", help="of a node (default: its cores)")
    tell.add_argument("--latency", type=positive, metavar="X", help="seconds of a message between nodes")
    tell.add_argument("--bandwidth", type=positive, metavar="X", help="of a node, bytes per second")
    tell.add_argument("--json", action="store_true", help="print all grids as JSON")
    tell.set_defaults(act=predict)
    compare = commands.add_parser("check", help="predictions against what was measured", allow_abbrev=False)
    compare.add_argument("directories", nargs="+", metavar="DIR", help="of studies")
    compare.set_defaults(act=check)


def calibrate(chosen: argparse.Namespace) -> int:
    """Start the jobs that measure. Returns the exit code of one that failed."""
    directory = Path(chosen.directory)
    settings = read(directory)["settings"]
    config = parse(settings)
    ranks = chosen.ranks or max(len(os.sched_getaffinity(0)) // config.threads, 1)
    command = [*launcher(chosen.launcher, ranks), sys.executable, "-m", "mpiml.study.calibration"]
    check_program(command)
    target = (directory / MACHINE).absolute()
    target.mkdir(exist_ok=True)
    env = dict.fromkeys(BLAS, "1") | os.environ
    for _ in range(chosen.repeats):
        path = target / f"{len(list(target.iterdir())):03d}.json"
        done = subprocess.run([*command, str(path), *settings], check=False, env=env)
        if done.returncode:
            return done.returncode
    print(told(load(directory)))
    return 0


class Predictor:
    """Predictions for a study's model. Raises ConfigError if it is another than was measured."""

    def __init__(self, directory: Path, latency: float | None = None, bandwidth: float | None = None):
        study = read(directory)
        self.machine, self.weak = load(directory), study["mode"] == "weak"
        self.config = parse(study["settings"])
        self.training: Training = training(self.config, open_data(self.config))
        if len(self.training.layers) != len(self.machine.layers):
            raise ConfigError(f"{directory / MACHINE} is of another model: delete it and calibrate again")
        self.network = network(self.machine, latency, bandwidth)

    def job(self, ranks: int, node_ranks: int, **settings: Any) -> Job:
        """On a grid; a data set that is smaller than a batch is taken to grow with it."""
        config = self.config.replace(**settings)
        return self.training.on(config, ranks, node_ranks, max(self.training.rows, config.batch))

    def grids(self, ranks: int, node_ranks: int) -> Iterator[Prediction]:
        """What each grid of so many ranks would need, with sensible numbers of micro-batches."""
        batch = self.config.batch * (ranks if self.weak else 1)
        for stages in (s for s in range(1, min(ranks, len(self.training.layers)) + 1) if ranks % s == 0):
            replicas = ranks // stages
            for microbatches in self._microbatches(stages, replicas, batch):
                settings = {"pipe": stages, "batch": batch, "microbatches": microbatches, "cuts": ()}
                job = self.job(ranks, node_ranks, **settings)
                found = step(job, self.machine, self.network)
                rows = job.rows / job.steps_per_epoch
                yield Prediction(ranks, stages, batch, microbatches, found, rows / found.seconds)

    def _microbatches(self, stages: int, replicas: int, batch: int) -> list[int]:
        if self.config.microbatches:
            return [self.config.microbatches] if replicas <= self.config.microbatches <= batch else []
        each = sorted({1} | ({stages * 2**power for power in range(5)} if stages > 1 else set()))
        return [count * replicas for count in each if count * replicas <= batch]


def predict(chosen: argparse.Namespace) -> int:
    """Print the best grid for each number of ranks, or all grids as JSON."""
    predictor = Predictor(Path(chosen.directory), chosen.latency, chosen.bandwidth)
    node_ranks = chosen.node_ranks or max(predictor.machine.cores // predictor.config.threads, 1)
    found = {ranks: list(predictor.grids(ranks, node_ranks)) for ranks in chosen.ranks}
    if chosen.json:
        every = [asdict(one) for predictions in found.values() for one in predictions]
        print(to_json({"machine": asdict(predictor.machine), "predictions": every}, indent=1))
        return 0
    one = max(predictor.grids(1, 1), key=lambda prediction: prediction.samples_per_second)
    print(told(predictor.machine, chosen.latency, chosen.bandwidth))
    needed = min(node_ranks, max(chosen.ranks)) * predictor.config.threads
    if needed > predictor.machine.cores:
        print(f"ASSUMED: nodes of {needed} cores, on each of which a rank computes as fast as here")
    print("\n".join(["", *_screen(found, one, node_ranks)]))
    return 0


def _screen(found: dict[int, list[Prediction]], one: Prediction, node_ranks: int) -> list[str]:
    rows = [["ranks", "best grid", "M", "batch", "step ms", "samples/s", "speed-up"]]
    rows[0] += ["compute", "waiting", "communication", "update"]
    refused = []
    for ranks, predictions in found.items():
        if not predictions:
            refused.append(f"{ranks} ranks: no grid has a row of the batch for each of its micro-batches")
            continue
        best = max(predictions, key=lambda prediction: prediction.samples_per_second)
        took = best.step
        shares = [took.compute, took.waiting, took.communication, took.update]
        cells = [str(ranks), f"{best.stages} x {ranks // best.stages}", str(best.microbatches), str(best.batch)]
        cells += [f"{took.seconds * 1e3:.2f}", f"{best.samples_per_second:,.0f}"]
        cells += [f"{best.samples_per_second / one.samples_per_second:.1f}"]
        rows.append([*cells, *(f"{share / took.seconds:.0%}" for share in shares)])
    return [
        *columns(rows, "r" * len(rows[0])),
        *refused,
        f"grids are stages x replicas, with {node_ranks} ranks a node; speed-up is against one rank as predicted",
        "not known, and not in it: other jobs on nodes and network, ranks slower than others, file systems",
    ]


def network(machine: Machine, latency: float | None = None, bandwidth: float | None = None) -> Link:
    """Messages between nodes: as given, else as measured, else as is assumed."""
    known = machine.between or Link.assumed(LATENCY, BANDWIDTH)
    if latency or bandwidth:
        return Link.assumed(latency or known.latency, bandwidth or known.bandwidth)
    return known


def told(machine: Machine, latency: float | None = None, bandwidth: float | None = None) -> str:
    """What is known of the machine, what is given, and what is assumed."""
    lines = [
        f"{machine.cpu}, {machine.cores} cores; {machine.ranks} ranks computed at once",
        f"a step takes {machine.busy.step * 1e6:.0f} us and a micro-batch {machine.busy.microbatch * 1e6:.0f} us "
        f"besides arithmetic; sum and update {machine.busy.update * 1e9:.2f} ns an element",
    ]
    if machine.inside:
        lines.append(f"messages on a node: {_link(machine.inside, 'measured', 'measured')}")
    values = {"latency": latency, "bandwidth": bandwidth}
    other = {name: "measured" if machine.between else f"ASSUMED; --{name} X says otherwise" for name in values}
    sources = ["as given" if value else other[name] for name, value in values.items()]
    return "\n".join([*lines, f"messages between nodes: {_link(network(machine, latency, bandwidth), *sources)}"])


def _link(link: Link, latency: str, bandwidth: str) -> str:
    """Latency and bandwidth, each with how it is known."""
    return f"{link.latency * 1e6:.1f} us ({latency}), then {link.bandwidth / 1e9:.1f} GB/s ({bandwidth})"


@dataclass(frozen=True)
class Comparison:
    """A measured point beside its prediction: medians of seconds of a step, and how far its repeats are apart."""

    study: str
    grid: str
    batch: int
    microbatches: int
    measured: float
    spread: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def compare(directory: Path) -> tuple[list[Comparison], int]:
    """Every point of a study that can be predicted, and how many were left out because ranks had to take turns."""
    predictor = Predictor(directory)
    lines = table.load(directory).lines
    found = [_compared(directory, predictor, line) for line in lines if not line.oversubscribed]
    return found, len(lines) - len(found)


def _compared(directory: Path, predictor: Predictor, line: table.Line) -> Comparison:
    point = line.point
    settings = {"pipe": point.stages, "batch": point.batch, "microbatches": point.microbatches}
    job = predictor.job(point.ranks, -(-point.ranks // line.nodes), **settings)
    median = statistics.median(line.medians)
    return Comparison(
        study=str(directory),
        grid=f"{point.stages} x {point.ranks // point.stages}",
        batch=point.batch,
        microbatches=point.microbatches,
        measured=median,
        spread=(max(line.medians) - min(line.medians)) / median,
        predicted=step(job, predictor.machine, predictor.network).seconds,
    )


def check(chosen: argparse.Namespace) -> int:
    """Print predictions beside measurements. Returns 0 if the median error is at most GOAL; 1 if it is larger, or if
    that cannot be told because repeats are as far apart."""
    compared = [compare(Path(directory)) for directory in chosen.directories]
    found, left_out = [one for some, _ in compared for one in some], sum(count for _, count in compared)
    if not found:
        raise ConfigError("nothing to compare: all points have more ranks than cores")
    rows = [["study", "grid", "batch", "M", "measured ms", "repeats apart", "predicted ms", "error"]]
    for one in found:
        cells = [one.study, one.grid, str(one.batch), str(one.microbatches), f"{one.measured * 1e3:.3f}"]
        rows.append([*cells, f"{one.spread:.0%}", f"{one.predicted * 1e3:.3f}", f"{one.error:+.0%}"])
    print("\n".join(columns(rows, "l" + "r" * 7)))
    if left_out:
        print(f"left out, for they have more ranks than cores: {left_out}")
    error = statistics.median(abs(one.error) for one in found)
    spread = statistics.median(one.spread for one in found)
    if error <= GOAL:
        verdict = "good"
    elif error <= spread:
        verdict = f"cannot be told, repeats are {spread:.0%} apart"
    else:
        verdict = f"predictions are off by more than {GOAL:.0%} and the repeats"
    worst = max(abs(one.error) for one in found)
    print(f"{len(found)} points: median error {error:.0%}, largest {worst:.0%}; repeats {spread:.0%} apart: {verdict}")
    return int(error > GOAL)
