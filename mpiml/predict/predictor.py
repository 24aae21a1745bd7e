"""Predictions for the model of a study, and their comparison with the study's times; no MPI."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpiml.config import parse
from mpiml.errors import ConfigError
from mpiml.predict.machine import MACHINE, Link, Machine, load_machine
from mpiml.predict.step import StepTime, step_time
from mpiml.scaling.laws import Interval
from mpiml.scaling.points import Point, read_study, unmeasured
from mpiml.scaling.results import load_study
from mpiml.scaling.trained import law_of, training_runs
from mpiml.training.job import Job, unplaced
from mpiml.training.resolve import open_data

LATENCY, BANDWIDTH = 2e-6, 10e9  # assumed of a network that was not measured: seconds, and bytes per second


@dataclass(frozen=True)
class Prediction:
    """A grid and the predicted time of its step, of `rows` rows on average; with a law of epochs, epochs and seconds to
    the target."""

    ranks: int
    stages: int
    batch: int
    microbatches: int
    step: StepTime
    samples_per_second: float
    rows: float
    epochs_to_target: Interval | None = None
    seconds_to_target: Interval | None = None


class Predictor:
    """Predictions for a study's model. Raises ConfigError if the calibration is of another model.

    Attributes:
        target: the score that training runs are to reach; None without such runs.
        law: of their epochs over batches.
    """

    def __init__(self, directory: Path, latency: float | None = None, bandwidth: float | None = None):
        study = read_study(directory)
        self.machine, self.weak = load_machine(directory), study["mode"] == "weak"
        self.config = parse(unmeasured(study["settings"]))
        self.training = unplaced(self.config, open_data(self.config))
        if len(self.training.layers) != len(self.machine.layers):
            raise ConfigError(f"{directory / MACHINE} is of another model: delete it and calibrate again")
        self.network = network(self.machine, latency, bandwidth)
        self.target: float | None = study.get("target")
        runs = training_runs(study, directory)
        self.law = law_of(runs, self.target) if runs and self.target is not None else None

    def job(self, ranks: int, node_ranks: int, **settings: Any) -> Job:
        """The job on a grid; a data set smaller than the batch is assumed to grow with it."""
        config = self.config.replace(balance="operations", **settings)
        return self.training.on(config, ranks, node_ranks, max(self.training.rows, config.batch))

    def grids(self, ranks: int, node_ranks: int) -> Iterator[Prediction]:
        """A prediction for each grid of these ranks and each sensible number of micro-batches."""
        batch = self.config.batch * (ranks if self.weak else 1)
        for stages in (s for s in range(1, min(ranks, len(self.training.layers)) + 1) if ranks % s == 0):
            replicas = ranks // stages
            for microbatches in self._microbatches(stages, replicas, batch):
                settings = {"pipe": stages, "batch": batch, "microbatches": microbatches, "cuts": ()}
                job = self.job(ranks, node_ranks, **settings)
                time = step_time(job, self.machine, self.network)
                rows = job.rows / job.steps_per_epoch
                speed = rows / time.seconds
                epochs = self.law.at(rows) if self.law else None
                seconds = epochs.scaled(self.training.rows / speed) if epochs else None
                yield Prediction(ranks, stages, batch, microbatches, time, speed, rows, epochs, seconds)

    def _microbatches(self, stages: int, replicas: int, batch: int) -> list[int]:
        """Numbers of micro-batches that such a grid can share out; none if it cannot share the workers."""
        workers, leaf = (self.config.workers or replicas) if self.config.average_every else 1, self.config.leaf
        if workers % replicas and replicas % workers:
            return []
        if given := self.config.microbatches:
            fits = replicas * leaf <= given <= batch and given % (workers * leaf) == 0
            return [given] if fits else []
        parts = max(replicas, workers) * leaf
        each = sorted({1} | ({stages * 2**power for power in range(5)} if stages > 1 else set()))
        return [count * parts for count in each if count * parts <= batch]


def network(machine: Machine, latency: float | None = None, bandwidth: float | None = None) -> Link:
    """Messages between nodes: as given, else as measured, else as assumed."""
    known = machine.between or Link.assumed(LATENCY, BANDWIDTH)
    if latency or bandwidth:
        return Link.assumed(latency or known.latency, bandwidth or known.bandwidth)
    return known


def describe(machine: Machine, latency: float | None = None, bandwidth: float | None = None) -> str:
    """The machine in a few lines; of the network, what is measured, given and assumed."""
    lines = [
        f"{machine.cpu}, {machine.cores} cores; {machine.ranks} ranks computed at once",
        f"overhead: {machine.busy.step * 1e6:.0f} us a step, {machine.busy.microbatch * 1e6:.0f} us a micro-batch; "
        f"sum and update {machine.busy.update * 1e9:.2f} ns an element",
    ]
    if machine.inside:
        lines.append(f"messages on a node: {_link(machine.inside, 'measured', 'measured')}")
    values = {"latency": latency, "bandwidth": bandwidth}
    other = {name: "measured" if machine.between else f"ASSUMED; set it with --{name} X" for name in values}
    sources = ["as given" if value else other[name] for name, value in values.items()]
    return "\n".join([*lines, f"messages between nodes: {_link(network(machine, latency, bandwidth), *sources)}"])


def _link(link: Link, latency: str, bandwidth: str) -> str:
    """Latency and bandwidth, each with its source."""
    return f"{link.latency * 1e6:.1f} us ({latency}), then {link.bandwidth / 1e9:.1f} GB/s ({bandwidth})"


@dataclass(frozen=True)
class Comparison:
    """A point's measured and predicted time: seconds of a step, and the relative range of the measured repeats."""

    study: str
    point: Point
    measured: float
    spread: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def compare(directory: Path) -> tuple[list[Comparison], int]:
    """A study's points with their predictions, and how many points are left out: those with more ranks than cores."""
    predictor = Predictor(directory)
    lines = load_study(directory).lines
    compared = []
    for line in lines:
        if not line.oversubscribed:
            point, median = line.point, statistics.median(line.medians)
            settings = {"pipe": point.stages, "batch": point.batch, "microbatches": point.microbatches}
            job = predictor.job(point.ranks, -(-point.ranks // line.nodes), **settings)
            predicted = step_time(job, predictor.machine, predictor.network).seconds
            spread = (max(line.medians) - min(line.medians)) / median
            compared.append(Comparison(str(directory), point, median, spread, predicted))
    return compared, len(lines) - len(compared)
