"""The job of a repeat: trains for some steps and writes down how long each took.

`mpirun -n RANKS python -m mpiml.scaling.timing FILE WARM_UP STEPS [settings of mpiml.train]`. Timed are the steps of
mpiml.train, without log, evaluation and checkpoints; of workers, whole rounds, of which a step has an equal part.
"""

from __future__ import annotations

if __name__ == "__main__":
    from mpiml.run import start

    start.begin("mpiml.scaling.timing")
    start.start_mpi()

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

import mpiml
from mpiml.clock import SHARES
from mpiml.config import Config, parse
from mpiml.partition import check_ranks
from mpiml.run import environment
from mpiml.run.directory import write_atomically
from mpiml.run.failure import run_job
from mpiml.run.one_job import mpi_library
from mpiml.run.process import prepare_process
from mpiml.team import Team
from mpiml.training.data import open_data
from mpiml.training.run import Run, unsaved

if __name__ == "__main__":
    start.begun()


def time_steps(run: Run, warm_up: int, steps: int) -> dict[str, Any]:
    """Train for `warm_up` steps, then time `steps` steps; collective.

    Returns the seconds of each step on its slowest rank, and the mean seconds of a step that ranks spent on each of
    clock.SHARES.
    """
    team = run.grid.team
    _train(run, range(1, warm_up + 1))
    before = np.array(team.clock.shares())
    seconds = np.array(_train(run, range(warm_up + 1, warm_up + steps + 1)))
    team.clock("joining")
    shares = (np.array(team.clock.shares()) - before) / (steps * team.size)
    team.comm.Allreduce(MPI.IN_PLACE, seconds, MPI.MAX)
    team.comm.Allreduce(MPI.IN_PLACE, shares)
    return {"step_seconds": seconds.tolist(), "shares": dict(zip(SHARES, shares.tolist(), strict=True))}


def _train(run: Run, steps: range) -> list[float]:
    """The seconds of each of these steps, which are whole rounds if workers take them."""
    if not run.config.average_every:
        return [run.step(step).seconds for step in steps]
    rounds = (run.advance(step).steps for step in steps[:: run.config.average_every])
    return [step.seconds for steps in rounds for step in steps]


def timed(config: Config, warm_up: int, steps: int) -> tuple[Config, int, int]:
    """The settings with which steps are timed, and how many there are to warm up and to time: of workers, who learn
    apart from the first step on, whole rounds before the last step, which is logged."""
    every = config.average_every
    if every:
        warm_up, steps = (-(-count // every) * every for count in (warm_up, steps))
        config = config.replace(average_from=0, log_every=warm_up + steps + 1)
    return config.replace(steps=warm_up + steps + (every > 0), epochs=None), warm_up, steps


def time_point(team: Team, path: Path, warm_up: int, steps: int, config: Config) -> None:
    """Time a point; rank 0 writes the times, and all that they depend on, to `path`. Collective."""
    comm = team.comm
    check_ranks(comm.size, config.pipe)
    prepare_process(config.threads)
    data = open_data(config, team, None)
    config, warm_up, steps = timed(config, warm_up, steps)
    run = unsaved(comm, config, data)
    with run.data.ahead:
        times = time_steps(run, warm_up, steps)
    ranks = comm.gather(environment.of_rank(config.threads))
    if comm.rank == 0:
        assert ranks, "rank 0 gathers"
        about = {
            "mpiml": mpiml.__version__,
            "ranks": comm.size,
            "nodes": len({rank["host"] for rank in ranks}),
            "cores": run.grid.cores,
            "stages": run.grid.stages,
            "replicas": run.grid.replicas,
            "threads": config.threads,
            "microbatches": run.config.microbatches,
            "rows": run.data.shards.rows_per_step,
            "settings": run.config.to_toml(),
            "environment": environment.of_job(ranks, mpi_library(), data.fingerprint),
        }
        write_atomically(path, json.dumps(times | about, indent=1) + "\n")


def main() -> int:
    """The job. Returns the exit code."""
    path, warm_up, steps, *settings = sys.argv[1:]
    program = "mpiml.scaling.timing"
    return run_job(program, lambda team: time_point(team, Path(path), int(warm_up), int(steps), parse(settings)))


if __name__ == "__main__":
    start.end(main())
