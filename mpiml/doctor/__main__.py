"""`mpirun -n 4 python -m mpiml.doctor`: looks at the job it runs in and says what is well, what is not, what to do."""

from __future__ import annotations

if __name__ == "__main__":
    from mpiml.run import start

    start.begin("mpiml.doctor")

import argparse
import sys
from collections.abc import Sequence

from mpiml.command import Parser, ended, whole


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
    start.answer_help(parse)
    start.start_mpi()

from collections.abc import Callable
from dataclasses import asdict

from mpi4py import MPI

import mpiml
from mpiml.clock import Clock
from mpiml.doctor import probes
from mpiml.doctor.facts import examine
from mpiml.doctor.judge import judge, screen
from mpiml.documents import to_json
from mpiml.errors import ConfigError
from mpiml.run import alarm, one_job
from mpiml.run.failure import Guard, exit_code
from mpiml.run.process import prepare_process
from mpiml.team import Team

if __name__ == "__main__":
    start.begun()

PROGRAM = "mpiml.doctor"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 1 if there is a problem."""
    age = probes.seconds_since_start()
    given = sys.argv[1:] if arguments is None else arguments
    return ended(PROGRAM, lambda: _look(lambda: parse(given), age))


def _look(parse: Callable[[], argparse.Namespace], age: float) -> int:
    comm = MPI.COMM_WORLD
    team = Team(comm, Clock())
    silent, wrong = comm.rank > 0, ""
    try:
        one_job.check_size(comm.size)
    except ConfigError as error:
        silent, wrong = silent or error.silent, str(error)
    if silent and comm.size == 1:  # another process tells, with its exit code too; some launchers kill it for mine
        return 0
    try:
        with Guard(team, PROGRAM):
            chosen = team.on_rank_0(parse)
    except ConfigError as error:  # reported already
        return exit_code(error)
    alarm.during("looking at the job")
    prepare_process(chosen.threads)
    facts = examine(comm, age, chosen.threads, wrong)
    findings = judge(facts)
    if chosen.json and not silent:
        found = {"mpiml": mpiml.__version__, "facts": asdict(facts), "findings": [asdict(f) for f in findings]}
        print(to_json(found, indent=2), flush=True)
    elif not silent:
        print(screen(findings), flush=True)
    return int(any(finding.verdict == "problem" for finding in findings))


if __name__ == "__main__":
    start.end(main())
