"""Scaling studies: `run` measures a set of grids, `report` makes tables, plots and a page of what was found."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mpiml import documents
from mpiml.config import Config, parse
from mpiml.design import open_data
from mpiml.errors import ConfigError
from mpiml.imports import is_name
from mpiml.run.directory import named_errors, write_atomically
from mpiml.run.terminal import say
from mpiml.setting import flag
from mpiml.start import BLAS
from mpiml.study import predict
from mpiml.study.command import Parser, ended, finite, positive, telling, whole, wholes
from mpiml.study.job import Training, training
from mpiml.study.launcher import check_program, launcher
from mpiml.study.points import POINTS, STUDY, TRAINING, Point, plan, read
from mpiml.study.queue import queued, submit
from mpiml.study.tasks import Task, tasks

HELP = "Everything after -- are settings of mpiml.train: model, data, --batch (of a rank, in weak scaling), ..."
CHOSEN = ("pipe", "steps", "epochs", "out", "resume")  # settings that a study decides on,
UNUSED = ("save_every", "time_limit", "trace")  # and some that its jobs have no use for


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 1 if a point failed, 78 if it was asked for what cannot be."""
    return ended("mpiml.scaling", lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--sbatch" in given[:-1]:  # what begins with a dash and has no space would be taken for a flag
        at = given.index("--sbatch")
        given[at : at + 2] = ["=".join(given[at : at + 2])]
    split = given.index("--") if "--" in given else len(given)
    chosen = _parser().parse_args(given[:split])
    if "act" in chosen:
        return int(chosen.act(chosen))
    if chosen.command == "run":
        return run(chosen, given[split + 1 :])
    from mpiml.study.report import report

    report(Path(chosen.directory))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m mpiml.scaling", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="run|calibrate|predict|check|report")
    measure = commands.add_parser("run", help="measure", epilog=HELP, allow_abbrev=False)
    measure.add_argument("--ranks", type=wholes, required=True, metavar="N,N", help="numbers of ranks; 1 is added")
    measure.add_argument(
        "--mode", choices=["strong", "weak"], default="strong", help="the same batch, or the same batch for each rank"
    )
    measure.add_argument("--pipes", type=wholes, default=[1], metavar="N,N", help="pipeline stages (default: 1)")
    measure.add_argument("--repeats", type=whole(), default=5, metavar="N", help="jobs for each point (default: 5)")
    measure.add_argument("--steps", type=whole(), default=50, metavar="N", help="steps that are timed (default: 50)")
    measure.add_argument("--warm-up", type=whole(0), default=10, metavar="N", help="steps before them (default: 10)")
    measure.add_argument(
        "--out", required=True, metavar="DIR", help="directory of the study; an unfinished one goes on"
    )
    measure.add_argument(
        "--launcher", metavar="TEXT", help='how to start a job, "srun -n {ranks}" say (default: srun in a job, mpirun)'
    )
    measure.add_argument("--timeout", type=positive, default=600.0, metavar="X", help="seconds for a job (600)")
    measure.add_argument("--node-ranks", type=whole(), metavar="N", help="ranks that a node takes; --slurm needs it")
    measure.add_argument("--only", type=_job, metavar="N,K", help="of N ranks in repeat K: what a job of --slurm runs")
    accuracy = measure.add_argument_group("time to accuracy")
    accuracy.add_argument(
        "--target",
        type=finite,
        metavar="X",
        help="also train, once for each batch and number of micro-batches, and tell when the test metric reaches this",
    )
    accuracy.add_argument("--max-epochs", type=whole(), default=30, metavar="N", help="of these runs (default: 30)")
    queue = measure.add_argument_group("in SLURM's queue")
    queue.add_argument(
        "--slurm", action="store_true", help="submit a job for each number of ranks and repeat, and do not wait"
    )
    queue.add_argument("--sbatch", default="", metavar="TEXT", help='flags of sbatch, "--partition=x --account=y" say')
    predict.register(commands)
    tell = commands.add_parser("report", help="tables, plots and a page", allow_abbrev=False)
    tell.add_argument("directory", metavar="DIR", help="of a study")
    return parser


def _job(text: str) -> list[int]:
    ranks, _, repeat = text.partition(",")
    if not (ranks.isdecimal() and repeat.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be a number of ranks and a repeat, as in 4,0, not {text!r}")
    return [int(ranks), int(repeat)]


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
    env = dict.fromkeys(BLAS, "1") | os.environ
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=env, timeout=chosen.timeout)
    except subprocess.TimeoutExpired:
        return f"no end within --timeout {chosen.timeout:g} s"
    if task.done:
        return None
    said = telling(done.stderr.splitlines(), r"^mpiml", r"^\w*(Error|Exception)\b")
    return f"failed, exit code {done.returncode}: {said}"


if __name__ == "__main__":
    sys.exit(main())
