"""`python -m mpiml.evaluate`: what it can be asked; mpiml.study.evaluate does it."""

import argparse
import os
import sys
from collections.abc import Sequence

from mpiml.study.command import Parser, whole


def _text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """What a command line asks for. Raises ConfigError for what cannot be understood; `--help` raises SystemExit."""
    parser = Parser(
        prog="python -m mpiml.evaluate",
        usage="[mpirun -n RANKS] python -m mpiml.evaluate --run DIR [settings]",
        description="Score a run's newest checkpoint on its test rows, with the same result on any grid.",
        allow_abbrev=False,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=_text, metavar="DIR", help="run directory; the run may still be going on")
    which.add_argument("--checkpoint", type=_text, metavar="FILE", help="a checkpoint in place of a run's newest")
    more = {
        "--data": ("SPEC", "score the test rows of this data set, as for mpiml.train"),
        "--label": ("NAME", "its column of labels (default for this and the next two: as in the run)"),
        "--token-dtype": ("NAME", "its tokens'"),
        "--held-out": ("X", "the part of it to test on if it has no test file"),
        "--model": ("package.module:function", "your own model: one that only a checkpoint names is not run"),
        "--loss": ("package.module:function", "your own loss, likewise"),
        "--metric": ("package.module:function", "your own metric, likewise"),
        "--predictions": ("FILE", "write classes, or values, in row order; FILE ends in .npy or .csv"),
    }
    for flag, (metavar, help) in more.items():
        parser.add_argument(flag, type=_text, metavar=metavar, help=help)
    parser.add_argument("--pipe", type=whole(), default=1, metavar="N", help="pipeline stages (default: 1)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(variable, "1")  # as in mpiml.train
    if {"-h", "--help"} & set(sys.argv[1:]):
        parse(["--help"])  # works where MPI cannot start

    from mpiml.study.evaluate import main

    sys.exit(main(lambda: parse(sys.argv[1:])))
