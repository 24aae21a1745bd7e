"""The plan of a job: against numbers worked out by hand, and against what a real run allocates and sends."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.errors import ConfigError, DataError
from mpiml.nn import base as nn
from mpiml.nn.layers import Conv2d, Flatten, Layer, Linear
from mpiml.parallel import grid as grids
from mpiml.parallel import slices, tree
from mpiml.parallel.memory import SharedMemory
from mpiml.parallel.values import TAGS
from mpiml.plan import activations, costs, sums
from mpiml.plan.sizing import plan, screen
from mpiml.team import Team
from mpiml.training.job import Job, job_of, needs, sharers
from mpiml.training.run import unsaved
from mpiml.training.sharing import busy
from mpiml.training.task import Seen
from mpiml.vectors import bytes_of
from tests.nn.cases import CASES

WORLD = MPI.COMM_WORLD
HIDDEN = (3000, 9)  # parameters of a few blocks, so that slices differ


def arrays(rows: int, features: int = 8, classes: int = 4) -> Dataset:
    x, y = np.ones((rows, features), np.float32), np.arange(rows) % classes
    return Dataset.from_arrays(x, y, x, y)


def job(ranks: int, node_ranks: int = 0, rows: int = 120, **settings: Any) -> Job:
    chosen = {"hidden": HIDDEN, "batch": 40} | settings
    return job_of(Config(**chosen), ranks, node_ranks or ranks, arrays(rows))


def test_layers_stages_and_work_by_hand() -> None:
    made = plan(job(4, pipe=2, hidden=(16,), microbatches=8), "arrays")
    assert [(line.kind, line.shape, line.parameters, line.flops, line.stage) for line in made.layers] == [
        ("Linear", (16,), 8 * 16 + 16, 2 * 8 * 16, 0),
        ("ReLU", (16,), 0, 16, 1),
        ("Linear", (4,), 16 * 4 + 4, 2 * 16 * 4, 1),
    ]
    assert [(s.first, s.last, s.parameters, s.in_flight) for s in made.stages] == [(0, 0, 144, 2), (1, 2, 68, 1)]
    assert made.stages[0].share == pytest.approx(256 / 400)
    assert (made.rows, made.microbatches, made.microbatch_rows, made.steps_per_epoch) == (40, 8, 5, 3)
    assert made.flops == 3 * 400 * 40
    assert made.even_bubble == 1 / 5  # four micro-batches for each of two replicas
    # The first stage (256 + 512) is the slower one: it waits once, after two forward passes, for the first gradient.
    assert made.bubble == pytest.approx(1 - 4 * 3 * 400 / (2 * (4 * 768 + (256 + 3 * 144) - 2 * 256)))


def test_memory_by_hand() -> None:
    made = plan(job(4, pipe=2, hidden=(16,), microbatches=8), "arrays")
    first, second = made.stages
    assert (first.values, second.values) == (4 * 144, 64 * 2 + 4 * 64 - 64)  # 4 of a bias take a line of 16
    assert (first.gradient_vectors, first.gradients) == (3, 3 * first.values)  # a tree over four needs three
    assert first.state == 2 * 4 * 144  # AdamW; two replicas, but one block for each of the two parameters
    assert second.messages == first.messages == 0


def test_workers_by_hand() -> None:
    """Four workers on two ranks: each has values and states, those of a rank have one set of gradient vectors."""
    settings = {"hidden": (16,), "microbatches": 8, "workers": 4, "average_every": 3, "outer_momentum": 0.5}
    apart = job(2, average_from=9, **settings)
    made, (together, _) = plan(apart, "arrays"), apart.phases()
    (stage,), whole, first = made.stages, 4 * 224, 4 * 160  # biases come first; rank 0 owns all but the last weights
    assert (stage.copies, stage.values, stage.gradient_vectors, stage.gradients) == (2, whole, 2, 2 * whole)
    assert stage.state == 2 * 2 * whole  # AdamW, two workers
    assert stage.average == 2 * whole + 2 * first  # slots; the start and the velocity of what rank 0 owns
    held = costs.stage_memory(apart, 0, 0.0)
    assert held.common.tolist() == [2 * whole + whole / 2] * 2  # both have one mean
    assert made.node_bytes == round(held.held.sum()) + 2 * stage.activations
    assert costs.fullest_node(together, [costs.stage_memory(together, 0, 0.0)]) < made.node_bytes
    assert (made.checkpoint, made.round_checkpoint) == (4 * whole, (1 + 1 + 4 * 3) * whole)
    assert max(map(len, screen(made).splitlines())) <= 120

    far = plan(job(2, 1, average_from=9, **settings), "arrays")
    assert [(wire.what, wire.between, wire.within) for wire in far.wires[2:]] == [
        ("partial sums of gradients", 0, 0),
        ("values", 0, 0),
        ("averages of values, every 3 steps", whole + 2 * whole, 0),  # means, and values after the outer step
        ("averages of optimizer states, every 3 steps", 2 * (whole + whole), 0),
        ("gradients and values, before step 9", whole + whole, 0),
    ]
    other = whole - first
    assert (far.node_out, far.round_out, far.workers) == (0, other + 2 * first + 2 * (other + first), 4)
    assert plan(job(2, average_from=9, steps=8, **settings), "arrays").workers == 0  # there will be none


def test_what_is_frozen_is_a_value_and_nothing_else() -> None:
    """No gradient is worked out, kept or sent before the first layer that is trained, nor activations for it."""
    made = plan(job(4, pipe=2, hidden=(16,), microbatches=8, rates=("layers.0=0",)), "arrays")
    first, second = made.stages
    assert (first.values, first.gradients, first.state, first.activations) == (4 * 144, 0, 0, 0)
    assert (second.values, second.gradients, second.state) == (4 * 80, 3 * 4 * 80, 2 * 4 * 80)
    assert made.flops == (400 + 2 * 128) * 40
    assert [wire.within for wire in made.wires] == [40 * 16 * 4, 0, 0, 0]


@pytest.mark.parametrize(
    ("layers", "shape", "numbers"),
    [
        ([Linear(8, 16), Linear(16, 4)], (8,), 8 + 16 + 4),  # inputs of both, gradient of the loss
        ([Flatten(), Linear(8, 4)], (2, 4), 8 + 4),
        ([Conv2d(2, 3), Flatten()], (5, 5, 2), 50 + 75 + 75),  # Flatten holds its input
    ],
)
def test_activations_by_hand(layers: list[Layer], shape: tuple[int, ...], numbers: int) -> None:
    assert activations.bytes_of_a_row(staged(layers, shape), last=True) == 4 * numbers


def staged(layers: list[Layer], shape: tuple[int, ...]) -> Any:
    from mpiml.training.stages import cut

    return cut(Config(), layers, shape)[0]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("frozen", [False, True])
def test_activations_are_those_of_a_pass(name: str, frozen: bool) -> None:
    """What each kind of layer keeps, in the table, is what NumPy allocates; also where the first layer is frozen."""
    make, shape = CASES[name]
    layers = make()
    if frozen:
        for parameter in nn.parameters(layers[:1]):
            parameter.rate = 0.0
        nn.skip_first_dx(layers)
    stage = staged(layers, shape)
    assert activations.bytes_of_a_row(stage, last=False) == activations._measured(stage)


class Doubled(Flatten):
    """Keeps its input twice, unlike the class that it is derived from."""

    def __call__(self, x: Any, at: Any) -> Any:
        y, backward = super().__call__(x, at)
        twice = x.copy()
        return y, lambda dy, grads: backward(dy, grads) + 0 * twice


def test_activations_of_other_layers_are_measured() -> None:
    stage = staged([Doubled(), Linear(8, 4)], (2, 4))
    assert activations.bytes_of_a_row(stage, last=True) == 4 * (8 + 8 + 4)


def test_activations_are_arrays_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other threads make meanwhile is counted for no layer."""
    stage, meanwhile = staged([Doubled(), Linear(8, 4)], (2, 4)), []
    forward = activations.nn.forward

    def busy(layers: list[Layer], x: np.ndarray, at: Any, learned: bool) -> Any:
        meanwhile.append(["of another thread"] * len(x) * 100)
        return forward(layers, x, at, learned)

    monkeypatch.setattr(activations.nn, "forward", busy)
    assert activations.bytes_of_a_row(stage, last=True) == 4 * (8 + 8 + 4)


def test_plan_of_a_large_model_runs_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gpt of 6.4 G parameters on rows of 2,048 tokens: a pass through it would take minutes and tens of GB."""
    monkeypatch.delattr(activations.nn, "forward")
    monkeypatch.setattr(activations.nn.Layer, "__call__", None)
    large = Config(model="gpt", width=4096, heads=32, blocks=32, context=2048, batch=1024, pipe=8, data="text")
    x = np.broadcast_to(np.arange(2048) % 200, (1024, 2048))
    made = plan(job_of(large, 1024, 64, Dataset.from_arrays(x, x, x[:1], x[:1])), "text")
    # A block keeps of each position: two norms' inputs and normal values; of attention input, Q, K, V and result; of
    # the perceptron its input, and four times as wide the slope of GELU and its output; a number per head and norm.
    block = (2 * 2 + 5 + 1 + 4 + 4) * 4096 + 32 + 2
    assert made.stages[1].activations == made.stages[1].in_flight * 4 * 2048 * 4 * block


GRIDS = [(ranks, node) for ranks in (1, 2, 3, 4, 5, 7, 8) for node in (1, 2, 3, 4) if node <= ranks]


@pytest.mark.parametrize(("ranks", "node_ranks"), GRIDS)
@pytest.mark.parametrize("microbatches", [8, 12, 37])
def test_messages_are_those_of_the_tree(ranks: int, node_ranks: int, microbatches: int) -> None:
    """For any grid, from the plans that replicas really follow."""
    made = job(ranks, node_ranks, microbatches=microbatches)
    traffic, nodes = sums.traffic(made, 0), sharers(made.homes(0), made.shared)
    sizes = traffic.slices
    assert sizes.sum() == bytes_of(made.stages[0].layout.size, "float32") - padding(made)
    for replica in range(ranks):
        own = tree.sum_plan(replica, nodes, microbatches)
        assert traffic.gradients_out[replica] == sum(sizes[message.owner] for message in own.messages)
        assert traffic.packed[replica] == sum(sizes[m.owner] for m in own.messages if len(m.contributions) > 1)
        assert traffic.gradients_in[replica] == sizes[replica] * sum(c.node is not None for c in own.contributions)
        partners, _ = tree.links(replica, nodes)
        assert traffic.values_out[replica] == sizes[replica] * len(partners)
    homes = made.homes(0)
    for node in set(homes):
        assert traffic.gradients_abroad[node] == traffic.gradients_out[homes == node].sum()
        assert traffic.values_abroad[node] == traffic.values_out[homes == node].sum()


def padding(made: Job) -> int:
    """Bytes between slices, which nobody owns."""
    owned = slices.owned(made.stages[0].layout.blocks(), made.replicas)
    ends = [slices.bounds(run) for run in owned if run]
    between = sum(after[0] - before[1] for before, after in itertools.pairwise(ends))
    return 4 * (between + made.stages[0].layout.size - ends[-1][1])


def test_private_memory_sends_on_nodes_too() -> None:
    made = job(4, 2, memory="private", microbatches=4)
    traffic = sums.traffic(made, 0)
    assert traffic.gradients_out.sum() == 3 * traffic.slices.sum()
    assert traffic.gradients_abroad.sum() == 2 * traffic.slices.sum()
    assert traffic.values_abroad.sum() == 2 * traffic.slices.sum()
    assert sums.traffic(job(4, 2, allreduce="mpi"), 0).gradients_out.sum() == 0


def test_the_library_moves_at_least_this() -> None:
    wire = plan(job(6, 3, pipe=2, allreduce="mpi", hidden=(16,)), "arrays").wires[-1]
    one, two = 4 * 144, 4 * (16 + 64)
    assert (wire.between, wire.within) == (0, 2 * 2 * (one + two))  # each stage has a node for itself


def test_a_node_holds_one_copy_of_values() -> None:
    shared, private = (plan(job(4, memory=memory), "arrays") for memory in ("shared", "private"))
    assert private.node_bytes - shared.node_bytes > 2.5 * shared.stages[0].values  # and messages
    assert shared.node_bytes == shared.stages[0].values + 4 * (
        shared.stages[0].gradients + shared.stages[0].activations
    ) + 2 * int(sums.traffic(job(4), 0).slices.sum())


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


@pytest.mark.mpi
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pipe": 2, "microbatches": 11, "schedule": "gpipe"},
        {"pipe": 2, "optimizer": "sgd", "ema": 0.9},
        {"microbatches": 19, "bucket": 0.02},
        {"pipe": 4, "memory": "private", "dtype": "float64"},
        {"pipe": 2, "rates": ("layers.0=0",), "cuts": (1,)},
        {"microbatches": 19, "bucket": 0.02, "rates": ("layers.2=0",)},
    ],
)
@pytest.mark.parametrize("node_ranks", [1, 2, 3, 16])
def test_a_real_run_allocates_and_sends_as_planned(
    settings: dict[str, Any], node_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
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

    traffic, held = sums.traffic(made, stage), costs.stage_memory(made, stage, 0.0)
    assert data.total("gradients out") == traffic.gradients_out[replica]
    assert data.total("gradients in") == traffic.gradients_in[replica]
    assert data.total("values out") == traffic.values_out[replica]
    owners = tree.links(replica, sharers(made.homes(stage), made.shared))[1]
    assert data.total("values in") == sum(traffic.slices[owner] for owner in owners)
    assert sum(kind.endswith("out") for kind, *_ in data.notes) <= traffic.messages[replica]  # nothing is not sent
    assert sum(bytes_of(slot.size, slot.dtype) for slot in sum_.slots) == held.gradients[replica]
    assert bytes_of(sum_.values.vector.size, sum_.values.vector.dtype) == held.values
    assert sum(state.nbytes for state in run.update.states.values()) == held.state[replica]
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
        {"workers": 2, "pipe": 2, "microbatches": 20, "dtype": "float64"},
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
    average, traffic = learners.average, sums.traffic(made, stage)
    planned, held = sums.averaging(made, stage), costs.stage_memory(made, stage, 0.0)
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


def plan_command(*arguments: str, blocked: bool = False) -> subprocess.CompletedProcess[str]:
    """What `python -m mpiml.plan` says; `blocked`: where mpi4py cannot be imported."""
    without = "import sys, runpy; sys.modules['mpi4py'] = None; runpy.run_module('mpiml.plan', run_name='__main__')"
    command = [sys.executable, *(["-c", without] if blocked else ["-m", "mpiml.plan"]), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def test_the_command_needs_no_mpi() -> None:
    done = plan_command("--ranks", "64", "--node-ranks", "16", "--pipe", "4", "--hidden", "128,128,128", blocked=True)
    assert done.returncode == 0, done.stderr
    assert "64 ranks = 4 stages x 16 replicas; --microbatches 128 repeats these bits" in done.stdout
    assert "4 nodes of 16 ranks" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
    content = json.loads(plan_command("--ranks", "6", "--json", "--batch", "60").stdout)
    assert (content["nodes"], content["microbatches"], len(content["stages"])) == (1, 6, 1)


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--ranks", "6", "--pipe", "4"], 78, "6 ranks do not divide into pipelines of 4 stages"),
        (["--ranks", "8", "--microbatches", "4"], 78, "8 replicas need at least one each"),
        (["--ranks", "8", "--pipe", "8"], 78, "6 layers cannot be cut into 8 stages"),
        (["--ranks", "0"], 78, "--ranks: must be a whole number, at least 1"),
        (["--ranks", "4", "--node-ranks", "-1"], 78, "--node-ranks: must be a whole number, at least 1"),
        (["--ranks", "4", "--hiden", "3"], 78, "did you mean --hidden"),
        (["--pipe", "4"], 78, "--ranks"),
        (["--ranks", "4", "--data", "nowhere.npz"], 65, "nowhere.npz"),
    ],
)
def test_refusals_are_those_of_training(
    arguments: list[str], code: int, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from mpiml.plan.__main__ import main

    assert main(arguments) == code
    assert named in capsys.readouterr().err


def test_code_of_ones_own_is_looked_at_as_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mpiml.plan.__main__ import main

    (tmp_path / "my_plan.py").write_text("def fails(shape, outputs): raise KeyError('my own trouble')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["--ranks", "2", "--loss", "my_plan:none"]) == 78
    assert "--loss my_plan:none" in capsys.readouterr().err
    assert main(["--ranks", "2", "--model", "my_plan:fails"]) == 70
    errors = capsys.readouterr().err
    assert "my_plan.py" in errors
    assert "KeyError: 'my own trouble'" in errors


def test_embedding_that_is_too_small_for_the_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mpiml.plan.__main__ import main

    code = "from mpiml.nn.layers import Embedding, Linear\n"
    code += "def small(shape, outputs): return [Embedding(100, 4), Linear(4, outputs)]\n"
    (tmp_path / "my_tokens.py").write_text(code)
    (tmp_path / "t.txt").write_text("so it goes " * 100)
    monkeypatch.syspath_prepend(tmp_path)
    flags = f"--ranks 2 --data {tmp_path / 't.txt'} --context 8 --model my_tokens:small".split()
    assert main(flags) == 78
    assert "no vector for token ids above 99; they go up to 255" in capsys.readouterr().err


def test_only_what_is_needed_is_read() -> None:
    class Unreadable(np.ndarray):
        def take(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("inputs are read")

    data = arrays(10)
    x = np.ones((10, 8), np.float32).view(Unreadable)
    y = np.arange(10) % 4
    assert needs(Dataset.from_arrays(x, y, x, y), None) == Seen(4, 0, [])
    assert needs(Dataset.from_arrays(x, y.view(Unreadable), x, y.view(Unreadable)), 7) == Seen(7, 0, [])
    assert needs(Dataset.from_arrays(x, y / 2, x, y / 2), None) == Seen(1, 0, [])
    with pytest.raises(DataError, match="label -2 is below 0"):
        needs(Dataset.from_arrays(x, y - 2, x, y), None)
    assert data.classification


def test_a_screen_is_aligned() -> None:
    text = screen(plan(job(12, 3, pipe=3, hidden=(16, 16)), "arrays"))
    assert "the busiest node sends" in text
    heads = next(line for line in text.splitlines() if line.startswith("stage "))
    below = text.splitlines()[text.splitlines().index(heads) + 1]
    assert len(heads) == len(below)


def test_refused_grids() -> None:
    with pytest.raises(ConfigError, match="do not divide"):
        job(6, pipe=4)
