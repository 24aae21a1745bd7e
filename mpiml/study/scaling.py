"""Scaling studies: `run` measures a set of grids, `report` makes tables, plots and a page of what was found."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from mpiml.config import parse
from mpiml.errors import ConfigError, RunError
from mpiml.run.directory import write_atomically
from mpiml.study import predict
from mpiml.study.points import POINTS, STUDY, Point, plan, runs

HELP = "Everything after -- are settings of mpiml.train: model, data, --batch (of a rank, in weak scaling), ..."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 1 if a point failed, 78 if it was asked for what cannot be."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    split = given.index("--") if "--" in given else len(given)
    try:
        chosen = _parser().parse_args(given[:split])
        if "act" in chosen:
            return int(chosen.act(chosen))
        if chosen.command == "run":
            return run(chosen, given[split + 1 :])
        from mpiml.study.report import report

        report(Path(chosen.directory))
    except RunError as error:
        print(f"mpiml.scaling: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m mpiml.scaling", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("run", help="measure", epilog=HELP, allow_abbrev=False)
    measure.add_argument("--ranks", type=_numbers, required=True, metavar="N,N", help="numbers of ranks; 1 is added")
    measure.add_argument(
        "--mode", choices=["strong", "weak"], default="strong", help="the same batch, or the same batch for each rank"
    )
    measure.add_argument("--pipes", type=_numbers, default=[1], metavar="N,N", help="pipeline stages (default: 1)")
    measure.add_argument("--repeats", type=int, default=5, metavar="N", help="jobs for each point (default: 5)")
    measure.add_argument("--steps", type=int, default=50, metavar="N", help="steps that are timed (default: 50)")
    measure.add_argument("--warm-up", type=int, default=10, metavar="N", help="steps before them (default: 10)")
    measure.add_argument(
        "--out", required=True, metavar="DIR", help="directory of the study; an unfinished one goes on"
    )
    measure.add_argument(
        "--launcher", metavar="TEXT", help='how to start a job, "srun -n {ranks}" say (default: srun in a job, mpirun)'
    )
    measure.add_argument("--timeout", type=float, default=600.0, metavar="X", help="seconds for a job (default: 600)")
    predict.register(commands)
    tell = commands.add_parser("report", help="tables, plots and a page", allow_abbrev=False)
    tell.add_argument("directory", metavar="DIR", help="of a study")
    return parser


def _numbers(text: str) -> list[int]:
    numbers = sorted({int(item) for item in text.split(",")})
    if numbers[0] < 1:
        raise ValueError(text)
    return numbers


def run(chosen: argparse.Namespace, settings: Sequence[str]) -> int:
    """Measure every repeat of every point that has not been measured yet."""
    config = parse(settings)
    for name in {"pipe", "steps", "epochs", "out", "resume"} & (config.given or set()):
        raise ConfigError(f"--{name} is the study's to choose; leave it out after --")
    ranks = sorted({1, *chosen.ranks})
    points = plan(chosen.mode, ranks, chosen.pipes, config.batch, config.microbatches)
    directory = Path(chosen.out)
    study = {
        "mode": chosen.mode,
        "steps": chosen.steps,
        "warm_up": chosen.warm_up,
        "settings": list(settings),
    }
    _open(directory, study, points)
    todo = [(point, repeat) for point, repeat in runs(points, chosen.repeats)]
    failed = 0
    for number, (point, repeat) in enumerate(todo, 1):
        path = directory / POINTS / f"{point.name}_{repeat}.json"
        grid = f"{point.stages} x {point.ranks // point.stages}"
        text = f"[{number}/{len(todo)}] ranks {point.ranks} = {grid}, M = {point.microbatches}"
        if path.exists():
            print(f"{text}: there already", flush=True)
            continue
        problem = _launch(chosen, point, path, settings)
        failed += bool(problem)
        print(f"{text}: {problem or _told(json.loads(path.read_text()))}", flush=True)
    if failed:
        print(f"{failed} of {len(todo)} jobs failed; the same command tries them again", file=sys.stderr)
    return int(failed > 0)


def _told(found: dict[str, Any]) -> str:
    middle = sorted(found["step_seconds"])[len(found["step_seconds"]) // 2]
    return f"{middle * 1e3:.2f} ms a step, {found['rows'] / middle:,.0f} samples/s"


def _open(directory: Path, study: dict[str, Any], points: Sequence[Point]) -> None:
    """Make the directory of a study, or go on in it, with more points perhaps. Raises ConfigError if it is of another
    study."""
    path = directory / STUDY
    there = json.loads(path.read_text()) if path.exists() else study
    for key, value in study.items():
        if there.get(key) != value:
            raise ConfigError(f"{directory} is a study with {key} {there.get(key)}, not {value}; choose another --out")
    known = {Point(**point) for point in there.get("points", ())} | set(points)
    (directory / POINTS).mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(study | {"points": [asdict(p) for p in sorted(known)]}, indent=1) + "\n")


def _launch(chosen: argparse.Namespace, point: Point, path: Path, settings: Sequence[str]) -> str | None:
    """Run a job that writes `path`. Returns what went wrong, if anything did."""
    command = [
        *launcher(chosen.launcher, point.ranks),
        *(sys.executable, "-m", "mpiml.study.timing", str(path.absolute()), str(chosen.warm_up), str(chosen.steps)),
        *settings,
        *point.settings(),
    ]
    env = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | os.environ
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=env, timeout=chosen.timeout)
    except subprocess.TimeoutExpired:
        return f"no end within --timeout {chosen.timeout:g} s"
    if path.exists():
        return None
    lines = [line for line in done.stderr.splitlines() if line.startswith("mpiml")] or done.stderr.splitlines()
    return f"failed, exit code {done.returncode}: {lines[0] if lines else 'it said nothing'}"


def launcher(given: str | None, ranks: int) -> list[str]:
    """The words that start a job of some ranks."""
    if given:
        if "{ranks}" not in given:
            raise ConfigError(f"--launcher {given!r}: must say {{ranks}} where the number of ranks goes")
        return [word.replace("{ranks}", str(ranks)) for word in given.split()]
    if "SLURM_JOB_ID" in os.environ and shutil.which("srun"):
        return ["srun", "-n", str(ranks)]
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if not found:
        raise ConfigError("no mpirun found; install one with pip install mpich, load a module, or give --launcher")
    return [found, "-n", str(ranks)]


if __name__ == "__main__":
    sys.exit(main())
