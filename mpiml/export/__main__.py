"""`python -m mpiml.export metrics|onnx RUN`: writes what other programs take of a run; no MPI."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mpiml.command import Parser, run_command

PROGRAM = "mpiml.export"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code of an error, or 0."""
    return run_command(PROGRAM, lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    chosen = _parser().parse_args(arguments)
    from mpiml.export import metrics

    written, notes = metrics.export(chosen.run, chosen.to, chosen.out)
    for note in notes:
        print(f"{PROGRAM}: warning: {note}", file=sys.stderr)
    for text in written:
        print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=f"python -m {PROGRAM}", description="Write what other programs take of a run.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="metrics")
    what = "write the lines of metrics.jsonl for other programs; the run may still be training"
    metrics = commands.add_parser("metrics", help=what, description=f"{what.capitalize()}.", allow_abbrev=False)
    _add_run(metrics)
    forms = "tensorboard: event files; csv: steps.csv and evaluations.csv, for pandas and spreadsheets"
    metrics.add_argument("--to", choices=["tensorboard", "csv"], required=True, help=forms)
    what = "directory to write to (default: RUN/tensorboard, or for csv RUN)"
    metrics.add_argument("--out", type=Path, metavar="DIR", help=what)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")


if __name__ == "__main__":
    sys.exit(main())
