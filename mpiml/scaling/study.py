"""A scaling study: which of its points are still to be measured, and the jobs that measure them; no MPI."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mpiml import documents
from mpiml.command import telling
from mpiml.config import Config, parse
from mpiml.errors import ConfigError
from mpiml.flags import flag
from mpiml.run.console import say
from mpiml.run.directory import named_errors, write_atomically
from mpiml.run.launcher import check_program, environment, launcher
from mpiml.scaling.jobs import Task, tasks
from mpiml.scaling.points import POINTS, STUDY, TRAINING, Point, plan, read
from mpiml.scaling.slurm import queued, submit
from mpiml.training.job import Training, training
from mpiml.training.resolve import open_data
from mpiml.usercode import is_name

CHOSEN = ("pipe", "steps", "epochs", "out", "resume")  # settings that a study decides on,
UNUSED = ("save_every", "time_limit", "trace")  # and some that its jobs have no use for


def run(chosen: argparse.Namespace, settings: Sequence[str]) -> int:
    """Measure, here or in SLURM jobs, every repeat of every point that has not been measured yet.

    All that can be refused is refused before anything is written.
    """
    config = parse(settings)
    _check_flags(chosen, config)
    points = plan(chosen.mode, sorted({1, *chosen.ranks}), chosen.pipes, config.batch, config.microbatches)
    what = training(config, open_data(config))
    _check_points(chosen, config, points, what)
    directory = Path(chosen.out).absolute()
    epochs = None if chosen.target is None else chosen.max_epochs
    timed = (chosen.warm_up, chosen.steps)
    todo = tasks(directory, points, chosen.repeats, timed, config, settings, what.rows, epochs)
    if chosen.slurm:
        states = queued(directory, todo, chosen.node_ranks)
        _open(directory, chosen, config, settings, points)
        submit(directory, todo, states, chosen, settings, config.threads)
        return 0
    if chosen.only:
        todo = [task for task in todo if [task.point.ranks, task.repeat] == chosen.only]
        if not todo:
            raise ConfigError("--only {},{}: the study has no job of so many ranks in that repeat".format(*chosen.only))
    _open(directory, chosen, config, settings, points)
    return _work(chosen, todo)


def _check_flags(chosen: argparse.Namespace, config: Config) -> None:
    """Raise ConfigError for settings that are not a study's, and for what cannot be launched."""
    for name in (*CHOSEN, *UNUSED):
        if name in (config.given or ()):
            why = "is the study's to choose" if name in CHOSEN else "is of no use to a study"
            raise ConfigError(f"{flag(name)} {why}; leave it out after --")
    if chosen.sbatch and not chosen.slurm:
        raise ConfigError("--sbatch: these are flags for --slurm, which is not given")
    if not chosen.slurm:
        check_program(launcher(chosen.launcher, 1, chosen.node_ranks))
    elif chosen.launcher:  # the program may be there only where the jobs will run
        launcher(chosen.launcher, 1, chosen.node_ranks)


def _check_points(chosen: argparse.Namespace, config: Config, points: Sequence[Point], what: Training) -> None:
    """Raise ConfigError for what cannot be trained, or reached."""
    largest = max(points)
    if largest.batch > what.rows:
        each = largest.batch // config.batch
        ranks = f" x {each} ranks" if each > 1 else ""
        most = f"--batch {what.rows // each} at most" if what.rows >= each else "use fewer ranks"
        raise ConfigError(f"--batch {config.batch}{ranks}: more than the {what.rows} rows to train on; {most}")
    for point in points:
        grid = {"pipe": point.stages, "batch": point.batch, "microbatches": point.microbatches}
        what.on(config.replace(**grid), point.ranks, point.ranks)
    if chosen.target is not None and chosen.target > 1 and not is_name(config.metric):
        metric = "accuracy" if what.classification else "r2"
        raise ConfigError(f"--target {chosen.target:g}: {metric} is at most 1")


def _work(chosen: argparse.Namespace, todo: Sequence[Task]) -> int:
    """Run what is not done, one after the other. Returns 1 if something failed."""
    failed = 0
    for number, task in enumerate(todo, 1):
        point = task.point
        grid = f"{point.stages} x {point.ranks // point.stages}"
        text = f"[{number}/{len(todo)}] ranks {point.ranks} = {grid}, M = {point.microbatches}"
        if task.done:
            print(f"{text}: there already", flush=True)
            continue
        problem = _launch(chosen, task)
        failed += bool(problem)
        print(f"{text}: {problem or task.told()}", flush=True)
    if failed:
        say(f"{failed} of {len(todo)} jobs failed; the same command tries them again", sys.stderr)
    return int(failed > 0)


def _open(
    directory: Path, chosen: argparse.Namespace, config: Config, settings: Sequence[str], points: Sequence[Point]
) -> None:
    """Make the directory of a study, or go on in it, with more points, repeats or another target perhaps. Raises
    ConfigError if it is of another study."""
    path = directory / STUDY
    study = {"mode": chosen.mode, "steps": chosen.steps, "warm_up": chosen.warm_up, "settings": list(settings)}
    content = documents.read(path) if path.exists() else None
    there = study if content is None else read(directory)
    if parse(there["settings"]) == config:  # in whatever order and words
        study["settings"] = there["settings"]
    for key, value in study.items():
        if there.get(key) != value:
            raise ConfigError(f"{directory} is a study with {key} {there.get(key)}, not {value}; choose another --out")
    known = {*there.get("points", ()), *points}
    study |= {"repeats": max(chosen.repeats, there.get("repeats", 0))}
    asked = {"target": chosen.target, "max_epochs": chosen.max_epochs} if chosen.target is not None else {}
    study |= {key: value for key, value in there.items() if key not in (*study, "points")} | asked
    with named_errors("write", directory):
        for name in (POINTS, TRAINING):
            (directory / name).mkdir(parents=True, exist_ok=True)
    written = json.dumps(study | {"points": [asdict(p) for p in sorted(known)]}, indent=1) + "\n"
    if written.encode() != content:
        write_atomically(path, written)


def _launch(chosen: argparse.Namespace, task: Task) -> str | None:
    """Run a job. Returns what went wrong, if anything did."""
    command = [*launcher(chosen.launcher, task.point.ranks, chosen.node_ranks), sys.executable, *task.words]
    env = environment()
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=env, timeout=chosen.timeout)
    except subprocess.TimeoutExpired:
        return f"no end within --timeout {chosen.timeout:g} s"
    if task.done:
        return None
    said = telling(done.stderr.splitlines(), r"^mpiml", r"^\w*(Error|Exception)\b")
    return f"failed, exit code {done.returncode}: {said}"
