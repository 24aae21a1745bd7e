"""`python -m mpiml.compare A B`: compares two runs, checkpoints or metrics files; no MPI."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mpiml.command import CLOSED, INTERRUPTED, Parser, run_command
from mpiml.compare.comparison import DIFFERENT, EQUAL, ERROR, compare
from mpiml.compare.screen import as_json, screen
from mpiml.documents import to_json


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 0 if the two are equal, 1 if they are not, 2 if that is not known."""
    code = run_command("mpiml.compare", lambda: _main(arguments))
    return code if code in (EQUAL, DIFFERENT, INTERRUPTED, CLOSED) else ERROR


def _main(arguments: Sequence[str] | None) -> int:
    chosen = _parser().parse_args(arguments)
    made = compare(chosen.a, chosen.b, chosen.quick)
    print(to_json(as_json(made), indent=2) if chosen.json else screen(made))
    return made.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m mpiml.compare",
        description="Say whether two runs are equal, bit for bit, and if not: which step and which element of the "
        "weights differ first, by how much, and what explains it. Starts no MPI.",
        epilog="Exit code 0: equal; 1: different; 2: something cannot be read, or they have nothing in common.",
        allow_abbrev=False,
    )
    what = "the directory of a run, a checkpoint (.safetensors), or metrics (.jsonl)"
    parser.add_argument("a", type=Path, metavar="A", help=what)
    parser.add_argument("b", type=Path, metavar="B", help="another, or the same at another time")
    what = "trust the digests in checkpoints: do not read equal ones to verify them"
    parser.add_argument("--quick", action="store_true", help=what)
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
