"""How workers that learn apart compare with a sum at every step: `mpirun -n 2 python -m mpiml.examples.learning_apart`.

It prints a table for each of the problems that are named after it, digits and gpt unless others are: how many steps and
seconds it takes until the test rows are scored as well as the table says, and what a rank has sent to other nodes.
"""

from __future__ import annotations

if __name__ == "__main__":
    from mpiml.run import start

    start.begin("mpiml.examples.learning_apart")
    start.start_mpi()

import contextlib
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpi4py import MPI

from mpiml.api import Config, ConfigError, Dataset, Options, open_dataset, train
from mpiml.clock import Clock
from mpiml.config import parse
from mpiml.examples import gpt_stdlib
from mpiml.run.directory import METRICS
from mpiml.run.failure import Guard, exit_code
from mpiml.run.metrics import content_of, lines
from mpiml.team import Team

PROGRAM = "mpiml.examples.learning_apart"
DILOCO = "--outer-lr 0.7 --outer-momentum 0.9"
EVERY = [f"--average-every {steps}" for steps in (1, 4, 16, 64)]
ALL = ["", *(f"{flags} --workers 4" for flags in EVERY), *(f"{flags} --workers 4 {DILOCO}" for flags in EVERY)]
SLOW = ["", "--bucket 0.5", EVERY[1], EVERY[2], f"{EVERY[2]} {DILOCO}"]
HEAD = "| flags | steps | MB sent | at 100 Mbit/s, computed (s) | seconds |\n|---|---:|---:|---:|---:|"
LEGEND = "steps, MB sent to other nodes, seconds that a link of 100 Mbit/s takes for them, and seconds of training"
EVALUATED = "--eval-every 16 --log-every 16 --save-every 0 --quiet"


class Problem(NamedTuple):
    """What is learned: settings, the score that is asked for, and the flags to compare."""

    settings: str
    score: str
    target: float
    cases: Sequence[str]

    def reached(self, score: float) -> bool:
        """Whether a score is as good as is asked for."""
        return score <= self.target if self.score == "loss" else score >= self.target


GPT = "--model gpt --held-out 0.01 --batch 32 --lr 0.003 --warmup-steps 30 --decay none --clip 1"
PROBLEMS = {
    "digits": Problem("--batch 128 --steps 256 --microbatches 4", "accuracy", 0.96, ALL),
    "gpt": Problem(f"{GPT} --context 32 --width 64 --blocks 1 --steps 320 --microbatches 4", "loss", 2.3, ALL),
    # For a slow network: a step sends 4.5 and 1.8 MB.
    "wide": Problem("--hidden 1024,1024 --steps 96 --microbatches 2", "accuracy", 0.97, SLOW),
    "slow-gpt": Problem(f"{GPT} --context 64 --steps 256 --microbatches 2", "loss", 2.2, SLOW),
}


class Reached(NamedTuple):
    """Where a run was good enough: after so many steps, seconds of training, and bytes that the rank which sends most
    has sent to other nodes. If it never was, the step is None, and the others are those of the whole run."""

    step: int | None
    seconds: float
    sent: int


def reached(entries: Sequence[dict[str, Any]], problem: Problem, rows: float) -> Reached:
    """What the lines of metrics.jsonl say, if a step has so many rows on average."""
    seconds, sent, before = 0.0, 0, 0
    for entry in entries:
        if "evaluation" not in entry:
            seconds += (entry["step"] - before) * rows / entry["samples_per_second"]
            sent, before = sent + entry["seconds"]["bytes_sent"]["max"], entry["step"]
        elif problem.reached(entry["evaluation"][problem.score]):
            return Reached(entry["step"], seconds, sent)
    return Reached(None, seconds, sent)


def compare(name: str, team: Team, directory: Path) -> int:
    """Train a problem with each of its flags, and print the table; collective. Returns the exit code."""
    problem = PROBLEMS[name]
    first = _config(name, "")
    data = open_dataset(first.data, Options(context=first.context, held_out=first.held_out))
    _say(team, f"{name}: {problem.settings}\n\n{HEAD}")
    for number, flags in enumerate(problem.cases):
        config = _config(name, flags).replace(out=str(directory / f"{name}-{number}"))
        result = train(config, team.comm, data=data)
        if result["status"] != "done":
            return int(result["exit_code"])
        _say(team, _row(flags, team.on_rank_0(lambda: _reached(config, problem, data)), config.steps))  # noqa: B023
    _say(team, f"\n{LEGEND} up to a test {problem.score} of {problem.target}\n")
    return 0


def _config(name: str, flags: str) -> Config:
    given = [*PROBLEMS[name].settings.split(), *EVALUATED.split(), *flags.split()]
    return gpt_stdlib.settings(given) if "gpt" in name else parse(given, PROGRAM)


def _reached(config: Config, problem: Problem, data: Dataset) -> Reached:
    metrics = Path(str(config.out)) / METRICS
    rows = len(data.train) / math.ceil(len(data.train) / config.batch)
    return reached([entry for _, entry in lines(metrics, content_of(metrics))[0]], problem, rows)


def _row(flags: str, good: Reached, steps: int | None) -> str:
    name, step = f"`{flags}`" if flags else "a sum at every step", good.step or f"not in {steps}"
    sent = good.sent / 1e6
    return f"| {name} | {step} | {sent:.1f} | {sent * 8 / 100:.1f} | {good.seconds:.1f} |"


def _say(team: Team, text: str) -> None:
    if team.rank == 0:
        print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    team = Team(MPI.COMM_WORLD, Clock())
    names = (sys.argv[1:] if arguments is None else arguments) or ["digits", "gpt"]
    try:
        with Guard(team, PROGRAM):
            if unknown := [name for name in names if name not in PROBLEMS]:
                raise ConfigError(f"{unknown[0]}: there are {', '.join(PROBLEMS)}").on_all_ranks()
        with contextlib.ExitStack() as at_end:
            runs = tempfile.TemporaryDirectory(prefix="mpiml-") if team.rank == 0 else contextlib.nullcontext("")
            directory = Path(team.broadcast(at_end.enter_context(runs)))
            return next((code for name in names if (code := compare(name, team, directory))), 0)
    except BaseException as error:  # reported already
        return exit_code(error)


if __name__ == "__main__":
    start.begun()
    start.end(main())
