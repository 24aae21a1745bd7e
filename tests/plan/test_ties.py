"""What a plan says of arrays in several layers, beside what a run allocates and sends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.plan import costs, exchanges, ties
from mpiml.plan.sizing import plan
from mpiml.run.segments import size_of_copies
from mpiml.training.arrays import segments
from mpiml.training.job import Job, job_of
from mpiml.training.run import unsaved
from mpiml.vectors import bytes_of
from tests.plan.jobs import NOTHING

WORLD = MPI.COMM_WORLD
TOKENS = 3000  # times 16: three blocks


def tokens() -> Dataset:
    rows = np.random.default_rng(0).integers(0, TOKENS, (96, 5))
    rows[0] = TOKENS - 1
    return Dataset.from_arrays(rows, rows, rows[:1], rows[:1])


def tied(ranks: int, node_ranks: int, **settings: Any) -> Job:
    sizes: dict[str, Any] = {"model": "gpt", "width": 16, "heads": 2, "blocks": 1, "tie": True}
    return job_of(Config(**sizes | {"batch": 96, "microbatches": 32} | settings), ranks, node_ranks, tokens())


def test_parameters_are_counted_once_and_the_sums_of_places_are_sent() -> None:
    whole = plan(tied(1, 1), "t")
    assert [line.parameters for line in whole.layers if line.kind in ("Embedding", "Unembedding")] == [TOKENS * 16, 0]
    assert "gradients of arrays in several layers" not in {wire.what for wire in whole.wires}
    job = tied(4, 2, pipe=2)
    made = plan(job, "t")
    assert sum(stage.parameters for stage in made.stages) == sum(line.parameters for line in whole.layers)
    assert made.checkpoint == whole.checkpoint
    (wire,) = [wire for wire in made.wires if wire.what == "gradients of arrays in several layers"]
    assert (wire.between, wire.within) == (2 * 4 * TOKENS * 16, 0)  # from each of two stages, which are on two nodes


@pytest.mark.mpi
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pipe": 2},
        {"pipe": 4, "memory": "private"},
        {"pipe": 2, "allreduce": "mpi"},
        {"bucket": 0.02, "optimizer": "lamb"},
        {"pipe": 2, "rates": ("layers.0=0",)},
    ],
)
@pytest.mark.parametrize("node_ranks", [1, 3])
def test_a_run_allocates_and_sends_as_planned(
    settings: dict[str, Any], node_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if WORLD.size % settings.get("pipe", 1):
        return
    nodes = [min(node_ranks, WORLD.size - first) for first in range(0, WORLD.size, node_ranks)]
    monkeypatch.setenv("MPIML_NODES", ",".join(map(str, nodes)))
    made = tied(WORLD.size, node_ranks, **settings)
    run = unsaved(WORLD, made.config, tokens())
    stage, replica, sum_ = run.grid.stage, run.grid.replica, run.stage.sum
    traffic, held = exchanges.traffic(made, stage), costs.stage_memory(made, stage, NOTHING)
    assert sum(bytes_of(slot.size, slot.dtype) for slot in sum_.slots) == held.gradients[replica]
    assert sum(state.nbytes for state in run.update.states.values()) == held.state[replica]
    layout, state = run.model.layouts[stage], run.learning.saved_state
    every = state.parts.items()
    saved = [one for name, part in every for one in segments(layout, name, part.collected, once=True)]
    assert size_of_copies(saved) == held.copies[replica]
    run.step(1)
    if made.config.allreduce != "mpi":
        assert sum_.values.sent == traffic.gradients_out[replica] + traffic.values_out[replica]
    if adding := run.update.ties:
        assert sum(part.nbytes for part in adding.received) == ties.received(made, stage)[replica]
        everyones = run.grid.comm.allreduce(adding.bytes)
        assert everyones == sum(ties.sent(made))
    else:
        assert made.config.rates
    run.free()
