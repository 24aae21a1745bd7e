"""`python -m mpiml.report RUN [RUN ...]`: draws runs as one HTML page that opens from disk; no MPI."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mpiml.command import Parser, run_command
from mpiml.errors import ConfigError
from mpiml.pages.drawing import check_matplotlib, save
from mpiml.report.document import document, problems
from mpiml.report.runs import read_runs
from mpiml.run.directory import named_errors, write_atomically

PAGE = "report.html"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    return run_command("mpiml.report", lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    chosen = _parser().parse_args(arguments)
    if chosen.out and chosen.out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {chosen.out}: must end with .html")
    check_matplotlib()
    runs = read_runs(chosen.runs)
    out: Path = chosen.out or (runs[0].path / PAGE if len(runs) == 1 else Path(PAGE))
    made = document(runs)
    for run in runs:
        for problem in problems(run, named=True):
            print(f"mpiml.report: {problem}", file=sys.stderr)
    write_atomically(out, made.html)
    print(out)
    if chosen.images:
        directory = out.with_name(f"{out.stem}-figures")
        with named_errors("create", directory):
            directory.mkdir(exist_ok=True)
        save(made.drawings, write_atomically, directory)
        print(f"{directory}/")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m mpiml.report",
        description="Draw runs, finished or going on, as one HTML page that opens from disk. Starts no MPI.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="directory of a run")
    add("--out", type=Path, metavar="FILE.html", help=f"the page (default: RUN/{PAGE}; of several runs {PAGE} here)")
    add("--images", action="store_true", help="also write each figure as PNG and SVG, into a directory beside the page")
    return parser


if __name__ == "__main__":
    sys.exit(main())
