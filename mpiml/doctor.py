"""`mpirun -n 4 python -m mpiml.doctor`: what it can be asked; mpiml.study.doctor does it."""

import argparse
import sys
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
    if {"-h", "--help"} & set(sys.argv[1:]):
        parse(["--help"])  # works where MPI cannot start

    from mpiml.study.doctor import main

    sys.exit(main(lambda: parse(sys.argv[1:])))
