"""`python -m mpiml.scaling run|report`: measures training on several numbers of ranks, and reports the times."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mpiml.command import Parser, finite, positive, run_command, whole, wholes
from mpiml.scaling.study import run

POINT = "each is a grid of stages x replicas, with the batch and the micro-batches of its step"
SETTINGS = "Everything after -- are settings of mpiml.train: model, data, --batch (in weak scaling: for each rank), ..."


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 1 if a job failed, or the exit code of an error."""
    return run_command("mpiml.scaling", lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--sbatch" in given[:-1]:  # argparse would take a value that begins with a dash for a flag
        at = given.index("--sbatch")
        given[at : at + 2] = ["=".join(given[at : at + 2])]
    split = given.index("--") if "--" in given else len(given)
    chosen = _parser().parse_args(given[:split])
    if chosen.command == "run":
        chosen.settings = given[split + 1 :]
        return run(chosen)
    from mpiml.scaling.report import report

    report(chosen.directory)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m mpiml.scaling",
        description="Measure how training scales: time steps on several numbers of ranks, and report the times.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="run|report")
    usage = "%(prog)s --ranks N,N --out DIR [flags] [-- settings of mpiml.train]"
    what = "measure the points of a study that are not measured yet"
    measure = commands.add_parser(
        "run", help=what, description=f"{what.capitalize()}: {POINT}.", usage=usage, epilog=SETTINGS, allow_abbrev=False
    )
    add = measure.add_argument
    add("--ranks", type=wholes, required=True, metavar="N,N", help="numbers of ranks; 1 is added")
    add("--mode", choices=["strong", "weak"], default="strong", help="the same batch on any ranks, or for each rank")
    add("--pipes", type=wholes, default=[1], metavar="N,N", help="numbers of pipeline stages (default: 1)")
    add("--repeats", type=whole(), default=5, metavar="N", help="jobs for each point (default: 5)")
    add("--steps", type=whole(), default=50, metavar="N", help="steps to time in a job (default: 50)")
    add("--warm-up", type=whole(0), default=10, metavar="N", help="steps to warm up before (default: 10)")
    add("--out", type=Path, required=True, metavar="DIR", help="directory of the study; a study in it is continued")
    what = 'how to start a job: "srun -n {ranks}" (default: srun in SLURM, else mpirun)'
    add("--launcher", metavar="TEXT", help=what)
    add("--timeout", type=positive, default=600.0, metavar="X", help="seconds that a job may take (default: 600)")
    add("--node-ranks", type=whole(), metavar="N", help="ranks on each node; --slurm needs it")
    add("--only", type=_job, metavar="N,K", help="only the jobs of N ranks in repeat K; --slurm uses it")
    accuracy = measure.add_argument_group("time to accuracy")
    what = "also train, for each batch and number of micro-batches, and report when the metric reaches X"
    accuracy.add_argument("--target", type=finite, metavar="X", help=what)
    what = "epochs of these runs (default: 30)"
    accuracy.add_argument("--max-epochs", type=whole(), default=30, metavar="N", help=what)
    what = "also train with these batches, on the largest grid, and fit a law of epochs over batches"
    accuracy.add_argument("--batches", type=wholes, default=[], metavar="N,N", help=what)
    what = "trainings of each kind, with the seed, the next one, and so on (default: 1)"
    accuracy.add_argument("--trainings", type=whole(), default=1, metavar="N", help=what)
    queue = measure.add_argument_group("in SLURM's queue")
    what = "submit a job for each number of ranks and repeat, and exit"
    queue.add_argument("--slurm", action="store_true", help=what)
    queue.add_argument("--sbatch", default="", metavar="TEXT", help='flags for sbatch: "--partition=x --account=y"')
    what = "make tables, plots and one Markdown page of the measured times"
    make = commands.add_parser("report", help=what, description=what.capitalize() + ".", allow_abbrev=False)
    make.add_argument("directory", type=Path, metavar="DIR", help="directory of the study")
    return parser


def _job(text: str) -> list[int]:
    ranks, _, repeat = text.partition(",")
    if not (ranks.isdecimal() and repeat.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be a number of ranks and a repeat, as in 4,0, not {text!r}")
    return [int(ranks), int(repeat)]


if __name__ == "__main__":
    sys.exit(main())
