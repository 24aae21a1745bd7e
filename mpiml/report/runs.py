"""A run as its directory shows it: finished, going on, or failed before its first line."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpiml.config import OF_THE_JOB, settings
from mpiml.errors import ConfigError
from mpiml.report.columns import Metrics, Numbers, read_metrics
from mpiml.run import environment, jobs, step_files
from mpiml.run.directory import CHECKPOINTS, CONFIG, METRICS, RESULT, names, settings_in
from mpiml.run.result import read_result


@dataclass
class Run:
    """A run.

    Attributes:
        path: its directory, as given.
        label: a name that no other run of the page has.
        settings: of config.toml, by flag; none if it is not written yet.
        unknown: those that this version of mpiml does not know.
        result, environment: of result.json and environment.json.
        jobs: of the run, if an mpiml has written them that knows of them.
        checkpoints: the steps of those that are there.
    """

    path: Path
    label: str
    settings: dict[str, Any]
    unknown: list[str]
    result: dict[str, Any]
    environment: dict[str, Any]
    jobs: list[jobs.Job]
    checkpoints: list[int]
    metrics: Metrics

    @property
    def status(self) -> str:
        """As in result.json; "unknown" without one."""
        return str(self.result.get("status", "unknown"))

    @property
    def evaluated(self) -> str:
        """What the rows are called that the run evaluates on."""
        return "validation" if self._setting("validation") else "test"

    @property
    def restarts(self) -> list[int]:
        """The steps that later jobs of the run went on from."""
        return sorted({job["after"] for job in self.jobs if job["after"] > 0})

    @functools.cached_property
    def steps_per_epoch(self) -> float | None:
        """As the last job says, else by the lines, which say in which epoch a step was; None if neither tells."""
        if self.jobs and "steps_per_epoch" in self.jobs[-1]:
            return self.jobs[-1]["steps_per_epoch"]
        step, epoch = self.metrics.epochs()
        known = (epoch >= 1) & (step >= 1)
        step, epoch = step[known], epoch[known]
        low = float(np.ceil(step / epoch).max(initial=1))
        later = epoch > 1
        high = float(np.floor((step[later] - 1) / (epoch[later] - 1)).min(initial=math.inf))
        return (low + high) / 2 if low <= high < math.inf else None

    @property
    def batch(self) -> int:
        """Rows of a step that were asked for; 0 if that is not known."""
        return int(self._setting("batch"))

    @property
    def last_step(self) -> int:
        """The step that the run is to end with; 0 if that is not known."""
        return int(self._setting("steps"))

    @property
    def rows_per_step(self) -> float:
        """Rows of a step on average; what was asked for in runs whose jobs do not say; 1 if that is not known."""
        told = self.jobs[-1].get("rows_per_step") if self.jobs else None
        return told or float(self.batch or 1)

    def _setting(self, name: str) -> float:
        """A setting that is a number; 0 if config.toml has no number there."""
        value = self.settings.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return 0
        return value

    @functools.cached_property
    def seconds(self) -> Numbers:
        """Seconds of training up to each line of a step: those of all steps, without evaluations and saves.

        A line says how many rows a second there were since the line before, or since the job began.
        """
        steps, speed = self.metrics.steps["step"], self.metrics.steps["samples_per_second"]
        before = np.concatenate([[0.0], steps[:-1]]) if len(steps) else steps
        began = np.array([0.0, *self.restarts])
        job = began[np.searchsorted(began, steps) - 1] if len(steps) else steps
        with np.errstate(divide="ignore", invalid="ignore"):
            seconds = (steps - np.maximum(before, job)) * self.rows_per_step / speed
        return np.cumsum(np.where(np.isfinite(seconds), seconds, 0.0))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in some directories, each once. Raises ConfigError for a directory that holds no run, and OutputError
    for what cannot be read."""
    once = {path.resolve(): path for path in reversed(paths)}
    kept = [path for path in paths if once.get(path.resolve()) is path]
    return [read_run(path, label) for path, label in zip(kept, labels(kept), strict=True)]


def read_run(path: Path, label: str) -> Run:
    """The run in a directory. Raises as `read_runs`."""
    if not path.is_dir():
        what = "is a file; give the directory that it is in" if path.exists() else "there is no such directory"
        raise ConfigError(f"{path}: {what}")
    if not names(path) & {CONFIG, METRICS, RESULT}:
        runs = sorted(one.parent.name for one in path.glob(f"*/{CONFIG}"))
        more = f"; runs in it: {', '.join(runs[:4])}{', ...' if len(runs) > 4 else ''}" if runs else ""
        raise ConfigError(f"{path}: holds no run{more}")
    table, about = settings_in(path), environment.read(path)
    checkpoints = step_files.listed(path / CHECKPOINTS) if (path / CHECKPOINTS).is_dir() else []
    return Run(
        path,
        label,
        table,
        sorted(table.keys() - known_settings()),
        read_result(path),
        about,
        jobs.jobs_of(path, about),
        sorted(map(step_files.step_of, checkpoints)),
        read_metrics(path / METRICS),
    )


def known_settings() -> Mapping[str, Any]:
    """Each setting of this version by its name in config.toml, with its default as a run writes it."""
    return {f.name.replace("_", "-"): f.default for f in settings() if f.name not in OF_THE_JOB}


def labels(paths: Sequence[Path]) -> list[str]:
    """A short name for each path: as few of its last parts as tell it from the others."""
    parts = [path.resolve().parts for path in paths]
    texts = []
    for one in parts:
        count = 1
        while count < len(one) and sum(other[-count:] == one[-count:] for other in parts) > 1:
            count += 1
        texts.append(printable(os.path.join(*one[-count:])))
    return texts


def printable(text: str) -> str:
    """A name of a file as text that a page and a figure can hold."""
    shown = os.fsencode(text).decode(errors="replace")
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in shown)
