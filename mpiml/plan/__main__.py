"""`python -m mpiml.plan --ranks 64 --node-ranks 16 [settings of mpiml.train]`: prints the plan of a job; no MPI."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict

from mpiml.command import Parser, run_command, whole
from mpiml.config import parse
from mpiml.devices import choice
from mpiml.documents import to_json
from mpiml.errors import ConfigError
from mpiml.partition import check_ranks
from mpiml.plan.costs import most_passes, schedule_of
from mpiml.plan.drawing import draw
from mpiml.plan.screen import screen
from mpiml.plan.sizing import plan
from mpiml.training.job import job_of
from mpiml.training.resolve import open_data
from mpiml.training.sharing import busy, idle_text


def _parser() -> Parser:
    parser = Parser(
        prog="python -m mpiml.plan",
        description="Print what a training job would be on any grid: layers, stages, memory, messages. Starts no MPI.",
        usage="%(prog)s --ranks N [--node-ranks N] [--node-devices N] [--json] [settings of mpiml.train]",
        epilog="All other settings are those of mpiml.train; see python -m mpiml.train --help.",
        allow_abbrev=False,
    )
    parser.add_argument("--ranks", type=whole(), required=True, metavar="N", help="ranks of the job")
    parser.add_argument("--node-ranks", type=whole(), metavar="N", help="ranks on each node (default: all on one node)")
    parser.add_argument("--node-devices", type=whole(), metavar="N", help="GPUs of each node, with --device cuda")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the plan as JSON")
    form.add_argument("--draw", action="store_true", help="draw the passes of a step too: 1F0 is F of micro-batch 0")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code that mpiml.train would."""
    return run_command("mpiml.plan", lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    chosen, settings = _parser().parse_known_args(arguments)
    config = parse(settings, "mpiml.plan")
    check_ranks(chosen.ranks, config.pipe)
    if chosen.node_devices and choice.is_host(config.device):
        raise ConfigError(f"--node-devices {chosen.node_devices}: needs --device cuda")
    data = open_data(config)
    working = busy(config, None, chosen.ranks)
    job = job_of(config, working, chosen.node_ranks or chosen.ranks, data, chosen.node_devices)
    made = plan(job, data.name)
    idle = idle_text(working, chosen.ranks - working, made.microbatches, made.workers, config.leaf)
    print(to_json(asdict(made), indent=2) if chosen.json else "\n".join([*idle, screen(made)]))
    if chosen.draw:
        print(f"\n{draw(schedule_of(job.config.schedule, job.splits), len(job.stages), most_passes(job))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
