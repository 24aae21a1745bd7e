"""The job of a benchmark row: makes one measurement on its ranks; rank 0 prints the result as JSON.

`python -m mpiml.bench.measurements NAME ARGUMENTS...`, under mpirun where a row has more than one rank.
"""

from __future__ import annotations

if __name__ == "__main__":
    from mpiml.run import start

    start.begin("mpiml.bench.measurements")
    start.start_mpi()

import json
import sys
from collections.abc import Callable
from dataclasses import asdict

from mpiml.bench import formats, layers, modules, processes, saving, steps, sums
from mpiml.bench.rows import Ratio
from mpiml.run.failure import run_job
from mpiml.run.process import prepare_process
from mpiml.team import Team, quiet_barrier

if __name__ == "__main__":
    start.begun()

FUNCTIONS: list[Callable[..., Ratio]] = [
    *(
        steps.by_hand,
        steps.hand_checked,
        steps.page_faults,
        steps.traced,
        steps.torch_ddp,
        steps.torch_pipeline,
        steps.pipeline,
    ),
    *(steps.schedules, steps.simulated),
    *(steps.weak_scaling, steps.oversubscribed, steps.workers, sums.allreduce, sums.bandwidth, sums.own_sum),
    *(sums.sum_by_hand, sums.passes, sums.record, sums.record_milliseconds),
    *(saving.save, saving.save_stall, saving.save_beside, saving.resume),
    *(
        layers.torch_step,
        layers.recomputed,
        layers.torch_products,
        layers.torch_memory,
        modules.torch_module,
        modules.torch_own_loop,
        modules.torch_flat,
        formats.from_file,
        processes.memory,
        processes.small_product,
    ),
]
AS_USERS_HAVE_THEM = {"own_sum", "torch_own_loop"}  # in processes that are not prepared as those of a run are
MEASUREMENTS = {function.__name__: function for function in FUNCTIONS}


def measure(team: Team, name: str, *arguments: str) -> None:
    """Make a measurement and print it; collective."""
    if name not in AS_USERS_HAVE_THEM:
        prepare_process(1)
    result = MEASUREMENTS[name](*arguments)
    quiet_barrier(team.comm)
    if team.rank == 0:
        print(json.dumps(asdict(result)), flush=True)


def main() -> int:
    """The job. Returns the exit code."""
    return run_job("mpiml.bench.measurements", lambda team: measure(team, *sys.argv[1:]))


if __name__ == "__main__":
    start.end(main())
