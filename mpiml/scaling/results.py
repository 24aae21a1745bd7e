"""The results of a scaling study: its points' times, speed-up and efficiency, and their table; no MPI."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpiml import command
from mpiml.errors import ConfigError
from mpiml.scaling.epochs import EpochsLaw
from mpiml.scaling.jobs import points_to_train
from mpiml.scaling.laws import Interval, karp_flatt, median_interval, speed_up
from mpiml.scaling.points import POINTS, Point, read_repeat, read_study, same_parts
from mpiml.scaling.trained import Target, law_of, target_of, training_runs

Repeats = Sequence[Mapping[str, Any]]  # what was measured in each repeat of a point


@dataclass(frozen=True)
class Line:
    """The results of a point.

    Attributes:
        medians: of each repeat, the median seconds of a step; a step takes as long as on its slowest rank.
        rows: rows of a step on average.
        shares: seconds of a step by activity, the mean over ranks and repeats.
        speed_up: rows a second, over those of one rank with the number of micro-batches that is fastest.
        same_parts: the same, over one rank with micro-batches of the same size; 0 if that was not measured.
        target: the training run, if a target is asked for and the run has ended.
    """

    point: Point
    nodes: int
    cores: int
    threads: int
    medians: tuple[float, ...]
    rows: float
    shares: Mapping[str, float]
    speed_up: Interval
    same_parts: float
    target: Target | None = None

    @property
    def step(self) -> Interval:
        """Seconds of a step."""
        return median_interval(self.medians)

    @property
    def samples_per_second(self) -> float:
        return self.rows / self.step.value

    @property
    def efficiency(self) -> Interval:
        """Speed-up per rank."""
        return self.speed_up.scaled(1 / self.point.ranks)

    @property
    def seconds_to_target(self) -> float | None:
        """The steps that the training run needed, each as long as the point's median."""
        return self.target.steps * self.step.value if self.target and self.target.steps else None

    @property
    def oversubscribed(self) -> bool:
        """Whether there were more threads than cores, so that ranks took turns."""
        return self.point.ranks * self.threads > self.cores * self.nodes

    def share(self, *names: str) -> float:
        """The fraction of a step's time that ranks spend on activities."""
        total = sum(self.shares.values())
        return sum(self.shares[name] for name in names) / total if total else 0.0

    def row(self) -> dict[str, Any]:
        """A row of scaling.csv: the figures that computing centres ask for."""
        replicas = self.point.ranks // self.point.stages
        node_hours = self.nodes * self.step.value / 3600
        return {
            "nodes": self.nodes,
            "ranks": self.point.ranks,
            "stages": self.point.stages,
            "replicas": replicas,
            "threads": self.threads,
            "batch": self.point.batch,
            "batch_per_rank": self.point.batch / self.point.ranks,
            "microbatches": self.point.microbatches,
            "repeats": len(self.medians),
            "step_seconds": self.step.value,
            "step_seconds_low": self.step.low,
            "step_seconds_high": self.step.high,
            "samples_per_second": self.samples_per_second,
            "speed_up": self.speed_up.value,
            "speed_up_low": self.speed_up.low,
            "speed_up_high": self.speed_up.high,
            "speed_up_same_parts": self.same_parts,
            "efficiency": self.efficiency.value,
            "karp_flatt": karp_flatt(self.point.ranks, self.speed_up.value) if self.point.ranks > 1 else None,
            "communication_share": self.share("communication"),
            "waiting_share": self.share("waiting"),
            "node_hours_per_million_samples": node_hours * 1e6 / self.rows,
            "oversubscribed": self.oversubscribed,
            "steps_to_target": self.target.steps if self.target else None,
            "samples_to_target": self.target.steps * self.rows if self.target and self.target.steps else None,
            "seconds_to_target": self.seconds_to_target,
            "best_score": self.target.best if self.target else None,
            "epochs_to_target": self.target.reached.by if self.target and self.target.reached else None,
            "noise_scale": self.target.noise_scale if self.target else None,
        }


@dataclass(frozen=True)
class Study:
    """A study as it stands on disk.

    Attributes:
        lines: of all points that have been measured, those asked for first.
        base: one rank with the number of micro-batches that is fastest.
        environment: of the first job.
        open: how many of its jobs have not been done yet.
        bases: the numbers of micro-batches of one rank that have not been measured yet.
        damaged: files of repeats that cannot be read.
        target, max_epochs: the score for training runs to reach, and their epochs; None and 0 without such runs.
        trained: the training runs that have ended.
        law: of their epochs over batches; None without a target.
    """

    mode: str
    settings: Sequence[str]
    lines: list[Line]
    base: Line
    environment: dict[str, Any]
    open: int = 0
    bases: Sequence[int] = ()
    damaged: Sequence[Path] = ()
    target: float | None = None
    max_epochs: int = 0
    trained: Sequence[Target] = ()
    law: EpochsLaw | None = None

    def asked(self) -> list[Line]:
        """The lines without those of extra points."""
        return [line for line in self.lines if not line.point.extra]

    def grids(self) -> list[Line]:
        """Every grid, by ranks and stages; one rank is the base."""
        more = (line for line in self.asked() if line.point.ranks > 1)
        return [self.base, *sorted(more, key=lambda line: line.point)]

    def best(self) -> list[Line]:
        """For each number of ranks the fastest grid; one rank is the base."""
        ordered = sorted(self.grids(), key=lambda line: line.samples_per_second)
        fastest = {line.point.ranks: line for line in ordered}
        return [fastest[ranks] for ranks in sorted(fastest)]


def load_study(directory: Path) -> Study:
    """Read a study with its results. Raises ConfigError if there is none, or no point of one rank is measured."""
    about = read_study(directory)
    asked = {point for point in about["points"] if point.timed}
    repeats: dict[Point, list[dict[str, Any]]] = defaultdict(list)
    damaged = []
    for point in sorted(asked):
        for path in sorted((directory / POINTS).glob(f"{point.name}_*.json")):
            if repeat := read_repeat(path):
                repeats[point].append(repeat)
            else:
                damaged.append(path)
    alone = {point.microbatches: _row_seconds(jobs) for point, jobs in repeats.items() if point.ranks == 1}
    if not alone:
        raise ConfigError(f"{directory}: no job of one rank has been measured yet; run the study again")
    fastest = min(alone, key=lambda microbatches: statistics.median(alone[microbatches]))
    target = about.get("target")
    targets = {point: target_of(about, directory, point) for point in asked} if target is not None else {}
    trained = training_runs(about, directory)
    lines = [
        _line(point, repeats[point], alone[fastest], alone.get(same_parts(about["mode"], point)), targets.get(point))
        for point in sorted(repeats, key=lambda p: (p.extra, p))
    ]
    base = next(line for line in lines if (line.point.ranks, line.point.microbatches) == (1, fastest))
    missing = sum(max(about.get("repeats", 0) - len(repeats.get(point, ())), 0) for point in asked)
    untrained = len(points_to_train(about["points"])) * about.get("trainings", 1) - len(trained) if targets else 0
    return Study(
        mode=about["mode"],
        settings=about["settings"],
        lines=lines,
        base=base,
        environment=repeats[base.point][0]["environment"],
        open=missing + untrained,
        bases=sorted(point.microbatches for point in asked - repeats.keys() if point.ranks == 1),
        damaged=damaged,
        target=target,
        max_epochs=about.get("max_epochs", 0),
        trained=trained,
        law=law_of(trained, target) if trained and target is not None else None,
    )


def _row_seconds(jobs: Repeats) -> list[float]:
    """Of each repeat, the seconds of a row."""
    return [statistics.median(job["step_seconds"]) / job["rows"] for job in jobs]


def _line(point: Point, jobs: Repeats, base: list[float], same: list[float] | None, target: Target | None) -> Line:
    """`base` and `same` are seconds of a row on one rank: as fast as it can be, and with micro-batches as here."""
    seconds = _row_seconds(jobs)
    return Line(
        point=point,
        nodes=jobs[0]["nodes"],
        cores=jobs[0]["cores"],
        threads=jobs[0]["threads"],
        medians=tuple(statistics.median(job["step_seconds"]) for job in jobs),
        rows=jobs[0]["rows"],
        shares={name: statistics.mean(job["shares"][name] for job in jobs) for name in jobs[0]["shares"]},
        speed_up=speed_up(base, seconds),
        same_parts=statistics.median(same) / statistics.median(seconds) if same else 0.0,
        target=target,
    )


def markdown(study: Study) -> str:
    """The table of a study in Markdown."""
    return command.markdown(rows(study))


def rows(study: Study) -> list[list[str]]:
    """The table of a study, with its heads first; points marked * have more ranks than cores."""
    heads = ["nodes", "ranks", "grid", "threads", "batch", "of a rank", "M", "repeats", "step ms (95 %)", "samples/s"]
    heads += ["speed-up (95 %)", "same M", "efficiency", "communication", "node-h / 10^6"]
    if study.target is not None:
        heads += [f"steps to {study.target:g}", "samples to it", "seconds to it"]
    lines = [heads]
    for line in study.asked():
        point, step, up = line.point, line.step, line.speed_up
        cells = [
            str(line.nodes),
            f"{point.ranks}{'*' if line.oversubscribed else ''}",
            point.grid,
            str(line.threads),
            str(point.batch),
            f"{point.batch / point.ranks:g}",
            str(point.microbatches),
            str(len(line.medians)),
            step.scaled(1e3).text("{:.2f}".format),
            f"{line.samples_per_second:,.0f}",
            up.text("{:.2f}".format),
            f"{line.same_parts:.2f}" if line.same_parts else "",
            f"{line.efficiency.value:.0%}",
            f"{line.share('communication', 'waiting'):.0%}",
            f"{line.row()['node_hours_per_million_samples']:.4f}",
            *(_to_target(line) if study.target is not None else ()),
        ]
        lines.append(cells)
    return lines


def _to_target(line: Line) -> tuple[str, str, str]:
    """Steps, samples and seconds to the target, as cells."""
    if not line.target:
        return "open", "", ""
    if not line.target.steps:
        return f"not reached ({line.target.best:.4g})", "", ""
    return str(line.target.steps), f"{line.target.steps * line.rows:,.0f}", f"{line.seconds_to_target:.3g}"
