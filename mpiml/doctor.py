"""`mpirun -n 4 python -m mpiml.doctor`: what it can be asked; mpiml.study.doctor does it."""

import sys

if __name__ == "__main__":
    from mpiml import start

    start.begin("mpiml.doctor")

import argparse
from collections.abc import Sequence

from mpiml.study.command import Parser, whole


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """What a command line asks for. Raises ConfigError for what cannot be understood; `--help` raises SystemExit."""
    parser = Parser(
        prog="python -m mpiml.doctor",
        description="Look at the job it runs in, and say what is well, what is not, and what to do.",
        allow_abbrev=False,
    )
    parser.add_argument("--threads", type=whole(), default=1, metavar="N", help="BLAS threads of a rank (default: 1)")
    parser.add_argument("--json", action="store_true", help="print facts and findings as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    if start.help_is_asked_for():
        parse(["--help"])
    start.start_mpi()
    from mpiml.study.doctor import main

    start.begun()
    start.end(main(lambda: parse(sys.argv[1:])))
