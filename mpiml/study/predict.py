"""Predictions for grids that nobody has measured, and a check of such predictions against a study's points; no MPI.

`calibrate` starts the job that measures the pieces (mpiml.study.calibration), `predict` puts them together for any
grid (mpiml.study.step), `check` compares that with what was measured: none of which has gone into the prediction.
"""

from __future__ import annotations

import argparse
import json
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
from mpiml.errors import ConfigError
from mpiml.study import table
from mpiml.study.columns import table as columns
from mpiml.study.job import Job, Training, training
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
    measure.add_argument("--ranks", type=int, metavar="N", help="that compute at once (default: the node's cores)")
    measure.add_argument("--launcher", metavar="TEXT", help="as of run")
    measure.add_argument(
        "--repeats",
        type=int,
        default=3,
        metavar="N",
        help="jobs; medians count, also of earlier ones (default: 3)",
    )
    measure.set_defaults(act=calibrate)
    tell = commands.add_parser("predict", help="the step on grids that are not measured", allow_abbrev=False)
    tell.add_argument("directory", metavar="DIR", help="of a study")
    tell.add_argument("--ranks", type=_ranks, required=True, metavar="N,N", help="numbers of ranks")
    tell.add_argument("--node-ranks", type=int, metavar="N", help="of a node (default: its cores)")
    tell.add_argument("--latency", type=float, metavar="X", help="seconds of a message between nodes")
    tell.add_argument("--bandwidth", type=float, metavar="X", help="of a node, bytes per second")
    tell.add_argument("--json", action="store_true", help="print all grids as JSON")
    tell.set_defaults(act=predict)
    compare = commands.add_parser("check", help="predictions against what was measured", allow_abbrev=False)
    compare.add_argument("directories", nargs="+", metavar="DIR", help="of studies")
    compare.set_defaults(act=check)


def _ranks(text: str) -> list[int]:
    return sorted({int(item) for item in text.split(",")})


def calibrate(chosen: argparse.Namespace) -> int:
    """Start the jobs that measure. Returns the exit code of one that failed."""
    from mpiml.study.scaling import launcher

    directory = Path(chosen.directory)
    config = parse(read(directory)["settings"])
    ranks = chosen.ranks or max(len(os.sched_getaffinity(0)) // config.threads, 1)
    target = (directory / MACHINE).absolute()
    target.mkdir(exist_ok=True)
    command = [*launcher(chosen.launcher, ranks), sys.executable, "-m", "mpiml.study.calibration"]
    env = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | os.environ
    for _ in range(max(chosen.repeats, 1)):
        path = target / f"{len(list(target.iterdir())):03d}.json"
        done = subprocess.run([*command, str(path), *read(directory)["settings"]], check=False, env=env)
        if done.returncode:
            return done.returncode
    machine = load(directory)
    print(told(machine, machine.between or Link.assumed(LATENCY, BANDWIDTH), machine.between is not None))
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
        measured = None if latency or bandwidth else self.machine.between
        self.network = measured or Link.assumed(latency or LATENCY, bandwidth or BANDWIDTH)

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
    for name in ("latency", "bandwidth", "node_ranks"):
        value = getattr(chosen, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}: must be more than 0")
    if chosen.ranks[0] < 1:
        raise ConfigError(f"--ranks {chosen.ranks[0]}: must be at least 1")
    predictor = Predictor(Path(chosen.directory), chosen.latency, chosen.bandwidth)
    node_ranks = chosen.node_ranks or max(predictor.machine.cores // predictor.config.threads, 1)
    found = {ranks: list(predictor.grids(ranks, node_ranks)) for ranks in chosen.ranks}
    if chosen.json:
        every = [asdict(one) for predictions in found.values() for one in predictions]
        print(json.dumps({"machine": asdict(predictor.machine), "predictions": every}, indent=1))
        return 0
    one = max(predictor.grids(1, 1), key=lambda prediction: prediction.samples_per_second)
    print(told(predictor.machine, predictor.network, predictor.network == predictor.machine.between))
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


def told(machine: Machine, network: Link, measured: bool) -> str:
    """What is known of the machine, and what is assumed."""
    lines = [
        f"{machine.cpu}, {machine.cores} cores; {machine.ranks} ranks computed at once",
        f"a step takes {machine.busy.step * 1e6:.0f} us and a micro-batch {machine.busy.microbatch * 1e6:.0f} us "
        f"besides arithmetic; sum and update {machine.busy.update * 1e9:.2f} ns an element",
    ]
    if machine.inside:
        lines.append(f"messages on a node: {_link(machine.inside)}, measured")
    how = "measured" if measured else "ASSUMED; --latency X --bandwidth X say otherwise"
    return "\n".join([*lines, f"messages between nodes: {_link(network)}, {how}"])


def _link(link: Link) -> str:
    return f"{link.latency * 1e6:.1f} us, then {link.bandwidth / 1e9:.1f} GB/s"


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


def compare(directory: Path) -> Iterator[Comparison]:
    """Every point of a study that can be predicted."""
    predictor = Predictor(directory)
    for line in table.load(directory).lines:
        point, nodes = line.point, line.nodes
        if line.oversubscribed:
            continue
        settings = {"pipe": point.stages, "batch": point.batch, "microbatches": point.microbatches}
        job = predictor.job(point.ranks, -(-point.ranks // nodes), **settings)
        median = statistics.median(line.medians)
        yield Comparison(
            study=str(directory),
            grid=f"{point.stages} x {point.ranks // point.stages}",
            batch=point.batch,
            microbatches=point.microbatches,
            measured=median,
            spread=(max(line.medians) - min(line.medians)) / median,
            predicted=step(job, predictor.machine, predictor.network).seconds,
        )


def check(chosen: argparse.Namespace) -> int:
    """Print predictions beside measurements. Returns 1 if the median error is larger than GOAL and than the spread."""
    found = [one for directory in chosen.directories for one in compare(Path(directory))]
    if not found:
        raise ConfigError("nothing to compare: all points have more ranks than cores")
    rows = [["study", "grid", "batch", "M", "measured ms", "repeats apart", "predicted ms", "error"]]
    for one in found:
        cells = [one.study, one.grid, str(one.batch), str(one.microbatches), f"{one.measured * 1e3:.3f}"]
        rows.append([*cells, f"{one.spread:.0%}", f"{one.predicted * 1e3:.3f}", f"{one.error:+.0%}"])
    print("\n".join(columns(rows, "l" + "r" * 7)))
    error = statistics.median(abs(one.error) for one in found)
    spread = statistics.median(one.spread for one in found)
    good = error <= max(GOAL, spread)
    worst = max(abs(one.error) for one in found)
    text = f"{len(found)} points: median error {error:.0%}, largest {worst:.0%}; repeats {spread:.0%} apart"
    print(f"{text}: {'good' if good else f'predictions are off by more than {GOAL:.0%} and the repeats'}")
    return int(not good)
