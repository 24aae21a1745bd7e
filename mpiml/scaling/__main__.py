"""`python -m mpiml.scaling`: `run` measures a set of grids, `report` makes tables, plots and a page of the figures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mpiml.command import Parser, ended, finite, positive, whole, wholes
from mpiml.scaling.study import run

HELP = "Everything after -- are settings of mpiml.train: model, data, --batch (of a rank, in weak scaling), ..."


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
    if chosen.command == "run":
        return run(chosen, given[split + 1 :])
    from mpiml.scaling.report import report

    report(Path(chosen.directory))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m mpiml.scaling", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="run|report")
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
    tell = commands.add_parser("report", help="tables, plots and a page", allow_abbrev=False)
    tell.add_argument("directory", metavar="DIR", help="of a study")
    return parser


def _job(text: str) -> list[int]:
    ranks, _, repeat = text.partition(",")
    if not (ranks.isdecimal() and repeat.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be a number of ranks and a repeat, as in 4,0, not {text!r}")
    return [int(ranks), int(repeat)]


if __name__ == "__main__":
    sys.exit(main())
