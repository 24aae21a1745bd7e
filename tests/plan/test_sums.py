"""The messages and the memory of sums and averages: those of the tree, and those of real runs."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.config import Config
from mpiml.parallel import grid as grids
from mpiml.parallel import halving, slices, tree
from mpiml.parallel.memory import SharedMemory
from mpiml.parallel.values import TAGS
from mpiml.plan import costs, exchanges, sums
from mpiml.plan.exchanges import exchange_text
from mpiml.plan.screen import screen
from mpiml.plan.sizing import plan
from mpiml.run.segments import Segment, size_of_copies
from mpiml.team import Team
from mpiml.training.arrays import segments
from mpiml.training.job import Job, sharers
from mpiml.training.run import Run, unsaved
from mpiml.training.sharing import busy
from mpiml.vectors import bytes_of
from tests.plan.jobs import NOTHING, arrays, job

WORLD = MPI.COMM_WORLD


GRIDS = [(ranks, node) for ranks in (1, 2, 3, 4, 5, 7, 8) for node in (1, 2, 3, 4) if node <= ranks]


@pytest.mark.parametrize(("ranks", "node_ranks"), GRIDS)
@pytest.mark.parametrize("microbatches", [8, 12, 37])
def test_messages_are_those_of_the_tree(ranks: int, node_ranks: int, microbatches: int) -> None:
    """For any grid, from the plans that replicas really follow."""
    made = job(ranks, node_ranks, microbatches=microbatches)
    traffic, nodes = exchanges.traffic(made, 0), sharers(made.homes(0), made.shared)
    sizes = traffic.slices
    assert sizes.sum() == bytes_of(made.stages[0].layout.size, "float32") - padding(made)
    for replica in range(ranks):
        own = tree.sum_plan(replica, nodes, microbatches)
        assert traffic.gradients_out[replica] == sum(sizes[message.owner] for message in own.messages)
        assert traffic.packed[replica] == sum(sizes[m.owner] for m in own.messages if len(m.contributions) > 1)
        assert traffic.gradients_in[replica] == sizes[replica] * sum(c.node is not None for c in own.contributions)
        partners, owners = tree.links(replica, nodes)
        assert traffic.values_in[replica] == sum(sizes[owner] for owner in owners)
        assert traffic.values_out[replica] == sizes[replica] * len(partners)
    homes = made.homes(0)
    for node in set(homes):
        assert traffic.gradients_abroad[node] == traffic.gradients_out[homes == node].sum()
        assert traffic.gradients_received[node] == traffic.gradients_in[homes == node].sum()
        assert traffic.values_abroad[node] == traffic.values_out[homes == node].sum()
        assert traffic.values_received[node] == traffic.values_in[homes == node].sum()


def padding(made: Job) -> int:
    """Bytes between slices, which nobody owns."""
    owned = slices.owned(made.stages[0].layout.blocks(), made.replicas)
    ends = [slices.bounds(run) for run in owned if run]
    between = sum(after[0] - before[1] for before, after in itertools.pairwise(ends))
    return 4 * (between + made.stages[0].layout.size - ends[-1][1])


def test_nodes_that_halve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets less than one block of all others, in few messages; a lane packs its part where ranks share memory."""
    assert ("directly" in exchange_text(job(4, 2)), exchange_text(job(4))) == (True, "")
    monkeypatch.setattr(halving, "FEWEST", 8)
    pairs, single, odd = (job(ranks, of_node, microbatches=ranks) for ranks, of_node in ((16, 2), (16, 1), (12, 1)))
    assert [exchanges.halved(made, 0) for made in (pairs, single, odd)] == [(8, 2), (16, 1), (12, 1)]
    assert exchanges.halved(job(16, 2, microbatches=24), 0) is None
    assert exchanges.halved(job(16, 2, microbatches=48, leaf=3), 0) == (8, 2)
    assert exchanges.halved(job(16, 2, allreduce="mpi"), 0) is None
    vector = 4 * made_of(pairs)
    for made, others, messages, packed in ((pairs, 7, 6, 8 * vector), (single, 15, 8, 0), (odd, 11, 8, 0)):
        traffic = exchanges.traffic(made, 0)
        sent = [traffic.gradients_out, traffic.gradients_in, traffic.values_out, traffic.values_in]
        assert len({each.sum() for each in [*sent, traffic.gradients_abroad, traffic.values_received]}) == 1
        assert max(traffic.gradients_abroad.max(), traffic.gradients_received.max()) < others * traffic.slices.max()
        assert traffic.messages.max() <= messages
        assert traffic.packed.sum() == pytest.approx(packed, rel=0.01)
        assert traffic.slices.sum() == pytest.approx(vector, rel=0.01)
    assert not exchanges.traffic(odd, 0).slices[8:].any()
    assert "nodes exchange sums by halving\n" in screen(plan(pairs, "arrays"))
    assert "by halving; 8 of 12 nodes hold optimizer state and update\n" in screen(plan(odd, "arrays"))


def made_of(made: Job) -> int:
    """The elements from the first block to the last."""
    return slices.bounds(made.stages[0].layout.blocks())[1]


def test_private_memory_sends_on_nodes_too() -> None:
    made = job(4, 2, memory="private", microbatches=4)
    traffic = exchanges.traffic(made, 0)
    assert traffic.gradients_out.sum() == 3 * traffic.slices.sum()
    assert traffic.gradients_abroad.sum() == 2 * traffic.slices.sum()
    assert traffic.values_abroad.sum() == 2 * traffic.slices.sum()
    assert exchanges.traffic(job(4, 2, allreduce="mpi"), 0).gradients_out.sum() == 0


def test_the_library_moves_at_least_this() -> None:
    wire = plan(job(6, 3, pipe=2, allreduce="mpi", hidden=(16,)), "arrays").wires[-1]
    one, two = 4 * 144, 4 * (16 + 64)
    assert (wire.between, wire.within) == (0, 2 * 2 * (one + two))  # each stage has a node for itself


def test_a_node_holds_one_copy_of_values() -> None:
    shared, private = (plan(job(4, memory=memory), "arrays") for memory in ("shared", "private"))
    assert private.node_bytes - shared.node_bytes > 2.5 * shared.stages[0].values  # and messages
    assert (
        shared.node_bytes
        == shared.stages[0].values
        + 4 * (shared.stages[0].gradients + shared.stages[0].activations)
        + 2 * int(exchanges.traffic(job(4), 0).slices.sum())
        + shared.checkpoint
    )  # of which all have copies


class Recording(MPI.Intracomm):
    """A communicator that also notes what is sent and received."""

    def __new__(cls, comm: MPI.Intracomm) -> Recording:
        made: Recording = super().__new__(cls, comm)
        made.notes = []
        return made

    notes: list[tuple[str, int, int]]

    def Send_init(self, buf: Any, dest: int, tag: int = 0) -> MPI.Prequest:
        self.notes.append(("values out" if tag % TAGS == 0 else "gradients out", dest, buf.nbytes))
        return super().Send_init(buf, dest, tag)

    def Recv_init(self, buf: Any, source: int = -1, tag: int = -1) -> MPI.Prequest:
        self.notes.append(("values in" if tag % TAGS == 0 else "gradients in", source, buf.nbytes))
        return super().Recv_init(buf, source, tag)

    def Isend(self, buf: Any, dest: int, tag: int = 0) -> MPI.Request:
        self.notes.append(("forward" if dest > self.rank else "backward", dest, buf.nbytes))
        return super().Isend(buf, dest, tag)

    def total(self, what: str) -> int:
        return sum(size for kind, _, size in self.notes if kind == what)


def saved_of(run: Run) -> list[Segment]:
    """What this rank saves of vectors."""
    layout, state = run.model.layouts[run.grid.stage], run.learning.saved_state
    return [one for name, part in state.parts.items() for one in segments(layout, name, part.collected)]


@pytest.mark.mpi
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pipe": 2, "microbatches": 11, "schedule": "gpipe"},
        {"pipe": 2, "optimizer": "sgd", "ema": 0.9},
        {"microbatches": 19, "bucket": 0.02},
        {"microbatches": 96, "leaf": 6},
        {"pipe": 4, "memory": "private", "dtype": "float64"},
        {"pipe": 2, "rates": ("layers.0=0",), "cuts": (1,)},
        {"microbatches": 19, "bucket": 0.02, "rates": ("layers.2=0",)},
    ],
)
@pytest.mark.parametrize(("node_ranks", "few"), [(1, True), (1, False), (2, True), (2, False), (3, False), (16, False)])
def test_a_real_run_allocates_and_sends_as_planned(
    settings: dict[str, Any], node_ranks: int, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where as few nodes as there are here halve."""
    if few:
        monkeypatch.setattr(halving, "FEWEST", 2)
        monkeypatch.setattr(halving, "CLEARLY", np.inf)
    if WORLD.size % settings.get("pipe", 1):
        return
    nodes = [min(node_ranks, WORLD.size - first) for first in range(0, WORLD.size, node_ranks)]
    monkeypatch.setenv("MPIML_NODES", ",".join(map(str, nodes)))
    build = grids.build

    def recording(team: Team, stages: int) -> grids.Grid:
        grid = build(team, stages)
        grid.data, grid.pipe = Recording(grid.data), Recording(grid.pipe)
        return grid

    monkeypatch.setattr(grids, "build", recording)
    made = job(WORLD.size, node_ranks, **settings)
    run = unsaved(WORLD, made.config, arrays(120))
    for step in range(1, made.steps_per_epoch + 1):
        run.step(step)
    stage, replica = run.grid.stage, run.grid.replica
    sum_, data, pipe = run.stage.sum, run.grid.data, run.grid.pipe
    assert isinstance(data, Recording)
    assert isinstance(pipe, Recording)

    traffic, held = exchanges.traffic(made, stage), costs.stage_memory(made, stage, NOTHING)
    assert data.total("gradients out") == traffic.gradients_out[replica]
    assert data.total("gradients in") == traffic.gradients_in[replica]
    assert data.total("values out") == traffic.values_out[replica]
    assert data.total("values in") == traffic.values_in[replica]
    assert bool(sum_.values.rounds) == bool(exchanges.halved(made, stage))
    assert sum(kind.endswith("out") for kind, *_ in data.notes) <= traffic.messages[replica]  # nothing is not sent
    assert sum(bytes_of(slot.size, slot.dtype) for slot in sum_.slots) == held.gradients[replica]
    assert bytes_of(sum_.values.vector.size, sum_.values.vector.dtype) == held.values
    assert sum(state.nbytes for state in run.update.states.values()) == held.state[replica]
    assert size_of_copies(saved_of(run)) == held.copies[replica]
    memory = sum_.values.memory
    if isinstance(memory, SharedMemory):
        planned = held.values + held.gradients[made.homes(stage) == made.homes(stage)[replica]].sum()
        assert planned <= len(memory._map) < planned + (2 + 3 * WORLD.size) * 4096

    sent = np.array([pipe.total("forward"), pipe.total("backward")])
    run.grid.data.Allreduce(MPI.IN_PLACE, sent)
    edges = [None, *costs.boundaries(made), None]
    before, after = edges[stage], edges[stage + 1]
    assert sent[0] == pytest.approx(made.steps_per_epoch * after.forward if after else 0)
    assert sent[1] == pytest.approx(made.steps_per_epoch * before.backward if before else 0)
    run.free()


@pytest.mark.mpi
@pytest.mark.parametrize(
    "settings",
    [
        {"workers": 2, "outer_momentum": 0.9},
        {"workers": 12, "memory": "private", "optimizer": "sgd", "ema": 0.9},
        {"workers": 2, "pipe": 2, "microbatches": 80, "leaf": 5, "dtype": "float64"},
        {"workers": 2, "microbatches": 20, "bucket": 0.02, "rates": ("layers.2=0",)},
        {"workers": 2, "allreduce": "mpi", "outer_lr": 0.7},
    ],
)
@pytest.mark.parametrize("node_ranks", [1, 3])
def test_workers_allocate_and_send_as_planned(
    settings: dict[str, Any], node_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"microbatches": 24, "average_every": 2} | settings
    if WORLD.size % settings.get("pipe", 1) or busy(Config(**settings), None, WORLD.size) < WORLD.size:
        return
    nodes = [min(node_ranks, WORLD.size - first) for first in range(0, WORLD.size, node_ranks)]
    monkeypatch.setenv("MPIML_NODES", ",".join(map(str, nodes)))
    made = job(WORLD.size, node_ranks, **settings)
    run = unsaved(WORLD, made.config, arrays(120))
    learners, stage, replica = run.learning.now, run.grid.stage, run.grid.replica
    average, traffic = learners.average, exchanges.traffic(made, stage)
    planned, held = sums.averaging(made, stage), costs.stage_memory(made, stage, NOTHING)
    assert average, "workers have one"

    def allocated(vector: np.ndarray) -> int:
        return bytes_of(vector.size, vector.dtype)

    assert len(learners.own) == made.copies
    assert {allocated(one.stage.sum.values.vector) for one in learners.own} == {held.values}
    assert sum(allocated(slot) for slot in run.stage.sum.slots) == held.gradients[replica]
    if settings.get("allreduce") != "mpi":  # else whole vectors, with their padding
        of_workers = [state.nbytes for one in learners.own for state in one.update.states.values()]
        assert sum(of_workers) == held.state[replica]
    assert allocated(average.values.vector) == planned.vector[replica]
    assert average.values.memory.ranks == planned.sharers[replica]
    slots = sum(allocated(slot) for slot in average.sum.slots)
    buffers = planned.mean.gradients_in[replica] + planned.mean.packed[replica]
    assert slots + average.start.nbytes * (2 if average.outer else 1) + buffers == planned.memory[replica]
    assert size_of_copies(saved_of(run)) == held.copies[replica]

    for step in (1, 3):
        run.advance(step)
    states, means = len(run.update.states), planned.mean
    in_a_round = (1 + states) * (means.gradients_out + means.values_out) + traffic.values_out
    in_a_round += bool(average.outer) * means.values_out
    assert learners.sent == (2 * in_a_round + 4 * (traffic.gradients_out + traffic.values_out))[replica]
    values, of_states = sums.of_averages(made)
    everyones = run.grid.comm.allreduce(int(in_a_round[replica]))
    assert values.total + of_states.total == everyones
    if made.shared:  # then ranks of a node send each other nothing
        assert values.abroad.sum() + of_states.abroad.sum() == everyones
    run.free()
