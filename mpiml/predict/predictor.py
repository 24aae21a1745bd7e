"""Predictions for the model of a study, and their comparison with what the study measured; no MPI."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpiml.config import parse
from mpiml.errors import ConfigError
from mpiml.predict.machine import MACHINE, Link, Machine, load
from mpiml.predict.step import Step, step
from mpiml.scaling import table
from mpiml.scaling.points import read
from mpiml.training.job import Job, Training, training
from mpiml.training.resolve import open_data

LATENCY, BANDWIDTH = 2e-6, 10e9  # assumed of a network that was not measured: a second, and bytes per second


@dataclass(frozen=True)
class Prediction:
    """A grid and what a step is predicted to take on it."""

    ranks: int
    stages: int
    batch: int
    microbatches: int
    step: Step
    samples_per_second: float


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
