"""A scaling study: its settings are checked, its directory is made, and its open jobs are run or submitted; no MPI."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mpiml import documents
from mpiml.command import fault_line
from mpiml.config import Config, parse
from mpiml.errors import ConfigError
from mpiml.flags import flag
from mpiml.run.console import say
from mpiml.run.directory import named_errors, write_atomically
from mpiml.run.launcher import FAULT, check_program, environment, launcher
from mpiml.scaling.jobs import StudyJob, jobs_of
from mpiml.scaling.points import POINTS, STUDY, TRAINING, Point, batches_to_train, points_of, read_study, unmeasured
from mpiml.scaling.slurm import queued, submit
from mpiml.training.job import Unplaced, unplaced
from mpiml.training.resolve import open_data, scored
from mpiml.usercode import is_name

CHOSEN = ("pipe", "steps", "epochs", "out", "resume")  # settings that the study chooses for its jobs
UNUSED = ("save_every", "time_limit", "trace", "log", "rank_log")  # settings of no use to its jobs


def run(chosen: argparse.Namespace) -> int:
    """Measure, here or in SLURM jobs, every repeat of every point that has not been measured yet.

    All refusals come before anything is written. `chosen` are the command's flags, and `settings` of mpiml.train.
    """
    config = parse(chosen.settings)
    _check_flags(chosen, config)
    given = chosen.pipes, config.batch, config.microbatches, config.workers, config.leaf
    points = points_of(chosen.mode, sorted({1, *chosen.ranks}), *given)
    points += batches_to_train(chosen.batches, points)
    plain = parse(unmeasured(chosen.settings))
    training = unplaced(plain, open_data(config))
    _check_points(chosen, plain, points, training)
    chosen.out = chosen.out.absolute()
    epochs = None if chosen.target is None else chosen.max_epochs
    timed = (chosen.warm_up, chosen.steps)
    runs = (epochs, chosen.trainings)
    jobs = jobs_of(chosen.out, points, chosen.repeats, timed, config, chosen.settings, training.rows, *runs)
    if chosen.slurm:
        states = queued(chosen.out, jobs, chosen.node_ranks)
        _open(chosen, config, points, training.rows)
        submit(chosen, config.threads, jobs, states)
        return 0
    if chosen.only:
        jobs = [job for job in jobs if [job.point.ranks, job.repeat] == chosen.only]
        if not jobs:
            raise ConfigError("--only {},{}: the study has no job of so many ranks in that repeat".format(*chosen.only))
    _open(chosen, config, points, training.rows)
    return _run_all(chosen, jobs)


def _check_flags(chosen: argparse.Namespace, config: Config) -> None:
    """Raise ConfigError for settings that a study does not take, and for a launcher that cannot work."""
    for name in (*CHOSEN, *UNUSED):
        if name in (config.given or ()):
            why = "is the study's to choose" if name in CHOSEN else "is of no use to a study"
            raise ConfigError(f"{flag(name)} {why}; leave it out after --")
    for name, there in (("batches", chosen.batches), ("trainings", chosen.trainings > 1)):
        if there and chosen.target is None:
            raise ConfigError(f"--{name}: these only train to a target; say which with --target X")
    if chosen.target is not None and config.average_every and not config.workers:
        every = f"--target with --average-every {config.average_every}"
        raise ConfigError(f"{every}: each grid would have other workers, and train another model; give --workers too")
    if chosen.sbatch and not chosen.slurm:
        raise ConfigError("--sbatch: these are flags for --slurm, which is not given")
    command = launcher(chosen.launcher, 1, chosen.node_ranks) if chosen.launcher or not chosen.slurm else []
    if not chosen.slurm:  # else the program may be installed only where the jobs will run
        check_program(command)


def _check_points(chosen: argparse.Namespace, config: Config, points: Sequence[Point], training: Unplaced) -> None:
    """Raise ConfigError for points that mpiml.train would refuse, and for a target that no run can reach."""
    largest = max(point for point in points if point.timed)
    if largest.batch > training.rows:
        each = largest.batch // config.batch
        ranks = f" x {each} ranks" if each > 1 else ""
        most = f"--batch {training.rows // each} at most" if training.rows >= each else "use fewer ranks"
        raise ConfigError(f"--batch {config.batch}{ranks}: more than the {training.rows} rows to train on; {most}")
    if chosen.batches and chosen.batches[-1] > training.rows:
        most = f"more than the {training.rows} rows to train on"
        raise ConfigError(f"--batches {chosen.batches[-1]}: {most}; {training.rows} at most")
    for point in points:
        grid = {"pipe": point.stages, "batch": point.batch, "microbatches": point.microbatches}
        training.on(config.replace(**grid), point.ranks, point.ranks)
    if chosen.target is not None and chosen.target > 1 and not is_name(config.metric):
        metric = scored(config, training.classification).metric
        raise ConfigError(f"--target {chosen.target:g}: {metric} is at most 1")


def _open(chosen: argparse.Namespace, config: Config, points: Sequence[Point], rows: int) -> None:
    """Make a study's directory, or add points, repeats or another target to the study in it; `rows` are of the training
    set. Raises ConfigError if that is another study."""
    directory: Path = chosen.out
    path = directory / STUDY
    study = {name: getattr(chosen, name) for name in ("mode", "steps", "warm_up", "settings")}
    content = documents.read(path) if path.exists() else None
    before = study if content is None else read_study(directory)
    if parse(before["settings"]) == config:  # the same in other words, or in another order
        study["settings"] = before["settings"]
    for key, value in study.items():
        if before.get(key) != value:
            raise ConfigError(f"{directory} is a study with {key} {before.get(key)}, not {value}; choose another --out")
    known = {*before.get("points", ()), *points}
    study |= {name: max(getattr(chosen, name), before.get(name, 0)) for name in ("repeats", "trainings")}
    study["rows"] = rows
    asked = {"target": chosen.target, "max_epochs": chosen.max_epochs} if chosen.target is not None else {}
    study |= {key: value for key, value in before.items() if key not in (*study, "points")} | asked
    with named_errors("write", directory):
        for name in (POINTS, TRAINING):
            (directory / name).mkdir(parents=True, exist_ok=True)
    written = json.dumps(study | {"points": [asdict(p) for p in sorted(known)]}, indent=1) + "\n"
    if written.encode() != content:
        write_atomically(path, written)


def _run_all(chosen: argparse.Namespace, jobs: Sequence[StudyJob]) -> int:
    """Run the open jobs one after the other. Returns 1 if one failed."""
    failed = 0
    for number, job in enumerate(jobs, 1):
        point = job.point
        text = (
            f"[{number}/{len(jobs)}] ranks {point.ranks} = {point.grid}, batch {point.batch}, M = {point.microbatches}"
        )
        if job.done:
            print(f"{text}: done before", flush=True)
            continue
        problem = _launch(chosen, job)
        failed += bool(problem)
        print(f"{text}: {problem or job.summary()}", flush=True)
    if failed:
        say(f"{failed} of {len(jobs)} jobs failed; the same command tries them again", sys.stderr)
    return int(failed > 0)


def _launch(chosen: argparse.Namespace, job: StudyJob) -> str | None:
    """Run a job. Returns what went wrong, or None."""
    command = [*launcher(chosen.launcher, job.point.ranks, chosen.node_ranks), sys.executable, *job.arguments]
    env = environment()
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=env, timeout=chosen.timeout)
    except subprocess.TimeoutExpired:
        return f"no end within --timeout {chosen.timeout:g} s"
    return None if job.done else f"failed, exit code {done.returncode}: {fault_line(done.stderr, *FAULT)}"
