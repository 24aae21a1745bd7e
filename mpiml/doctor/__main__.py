"""`mpirun -n 4 python -m mpiml.doctor`: examines the job that it runs in, and prints problems and advice."""

from __future__ import annotations

if __name__ == "__main__":
    from mpiml.run import start

    start.begin("mpiml.doctor")

import argparse
import sys
from collections.abc import Sequence

from mpiml.command import Parser, run_command, whole
from mpiml.devices.choice import KINDS, check_sharing
from mpiml.errors import ConfigError


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The parsed command line. Raises ConfigError for what is wrong in it; `--help` prints and raises SystemExit."""
    parser = Parser(
        prog="python -m mpiml.doctor",
        usage="[mpirun -n RANKS] python -m mpiml.doctor [--threads N] [--device cuda [--share-devices]] [--json]",
        description="Examine the MPI job that runs it: where its ranks are, how fast they compute, copy and send. "
        "Print what is wrong and what to do; exit code 1 if there is a problem.",
        allow_abbrev=False,
    )
    help = "BLAS threads of each rank (default: 1)"
    parser.add_argument("--threads", type=whole(), default=1, metavar="N", help=help)
    help = "also look at the GPU of each rank, and measure how fast vectors get there and back; fake: a pretended one"
    parser.add_argument("--device", choices=KINDS, default="auto", help=help)
    parser.add_argument("--share-devices", action="store_true", help="several ranks may use one GPU")
    parser.add_argument("--json", action="store_true", help="print facts and findings as JSON")
    chosen = parser.parse_args(arguments)
    check_sharing(chosen.device, chosen.share_devices)
    return chosen


if __name__ == "__main__":
    start.answer_help(parse)
    start.start_mpi()

from dataclasses import asdict

from mpi4py import MPI

import mpiml
from mpiml.clock import Clock
from mpiml.doctor import probes
from mpiml.doctor.facts import examine
from mpiml.doctor.judge import judge, screen
from mpiml.doctor.judge_devices import judge_devices
from mpiml.documents import to_json
from mpiml.run import alarm, one_job
from mpiml.run.failure import Guard, exit_code
from mpiml.run.process import prepare_process
from mpiml.team import Team

if __name__ == "__main__":
    start.begun()

PROGRAM = "mpiml.doctor"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 1 if there is a problem, or the exit code of an error."""
    age = probes.seconds_since_start()
    given = sys.argv[1:] if arguments is None else arguments
    return run_command(PROGRAM, lambda: _examine(given, age))


def _examine(arguments: Sequence[str], age: float) -> int:
    comm = MPI.COMM_WORLD
    team = Team(comm, Clock())
    silent, wrong = comm.rank > 0, ""
    try:
        one_job.check_size(comm.size)
    except ConfigError as error:
        silent, wrong = silent or error.silent, str(error)
    if silent and comm.size == 1:  # another process prints the problem; an exit code here may have it killed before
        return 0
    try:
        with Guard(team, PROGRAM):
            chosen = team.on_rank_0(lambda: parse(arguments))
    except ConfigError as error:  # the guard has reported it
        return exit_code(error)
    alarm.during("examining the job")
    prepare_process(chosen.threads)
    facts = examine(comm, age, chosen.threads, wrong, chosen.device, chosen.share_devices)
    findings = [*judge(facts), *judge_devices(facts)]
    if chosen.json and not silent:
        content = {"mpiml": mpiml.__version__, "facts": asdict(facts), "findings": [asdict(f) for f in findings]}
        print(to_json(content, indent=2), flush=True)
    elif not silent:
        print(screen(findings), flush=True)
    return int(any(finding.verdict == "problem" for finding in findings))


if __name__ == "__main__":
    start.end(main())
