"""The plan of a job: against numbers worked out by hand, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.errors import ConfigError, DataError
from mpiml.plan import costs
from mpiml.plan.screen import screen
from mpiml.plan.sizing import plan
from mpiml.training.job import job_of, needs
from mpiml.training.task import Seen
from tests.plan.jobs import NOTHING, arrays, job


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
    assert made.even_bubble == pytest.approx(1 / 5)  # four micro-batches for each of two replicas
    split = plan(job(4, pipe=2, hidden=(16,), microbatches=8, schedule="zb-h1"), "arrays")
    assert split.even_bubble == pytest.approx(1 / 13)  # 4 x (F + I + W) + F + I - W
    # The first stage (256 + 512) is the slower one: it waits once, after two forward passes, for the first gradient.
    assert made.bubble == pytest.approx(1 - 4 * 3 * 400 / (2 * (4 * 768 + (256 + 3 * 144) - 2 * 256)))


def test_memory_by_hand() -> None:
    made = plan(job(4, pipe=2, hidden=(16,), microbatches=8), "arrays")
    first, second = made.stages
    assert (first.values, second.values) == (4 * 144, 64 * 2 + 4 * 64 - 64)  # 4 of a bias take a line of 16
    assert (first.gradient_vectors, first.gradients) == (3, 3 * first.values)  # a tree over four needs three
    assert plan(job(4, pipe=2, hidden=(16,), microbatches=8, leaf=4), "arrays").stages[0].gradient_vectors == 2
    assert first.state == 2 * 4 * 144  # AdamW; two replicas, but one block for each of the two parameters
    assert second.messages == first.messages == 0


def test_what_waits_for_w_by_hand() -> None:
    """The first stage holds inputs of 8 of two micro-batches in flight, or of one and, of another that waits for W, 8
    and the gradient by its 16 outputs."""
    whole, split = (plan(job(2, pipe=2, hidden=(16,), microbatches=4, schedule=s), "a") for s in ("1f1b", "zb-h1"))
    rows = whole.microbatch_rows
    assert whole.stages[0].activations == 4 * rows * 2 * 8
    assert split.stages[0].activations == 4 * rows * (8 + 8 + 16)


def test_blocks_that_are_computed_again_by_hand() -> None:
    """Four blocks of a gpt: a micro-batch in flight holds the input of each instead of all of it, and the operations of
    their forward passes are done twice."""
    rows = np.arange(12 * 6).reshape(12, 6) % 7
    tokens = Dataset.from_arrays(rows, rows, rows[:1], rows[:1])
    settings: dict[str, Any] = {"model": "gpt", "width": 8, "heads": 2, "blocks": 4, "batch": 6, "microbatches": 2}
    whole, again = (
        plan(job_of(Config(**settings, recompute=recompute), 1, 1, tokens), "t") for recompute in (False, True)
    )
    # Of each position a block holds (2 x 2 + 5 + 1 + 4 + 4) x 8 numbers and 2 + 2 of its norms and heads; in place of
    # four such blocks there are four inputs of 8, and one block beside its input.
    block = (2 * 2 + 5 + 1 + 4 + 4) * 8 + 2 + 2
    fewer = 4 * block - (4 * 8 + block - 8)
    assert whole.stages[0].activations - again.stages[0].activations == 3 * 6 * 4 * fewer
    assert [line.path for line in again.layers] == [line.path for line in whole.layers]
    blocks = sum(line.flops for line in whole.layers if line.kind.startswith("Residual"))
    assert again.flops - whole.flops == blocks * 6


def test_copies_of_what_is_saved_by_hand() -> None:
    """Each rank copies what it owns, and the first of a stage what nobody updates."""
    settings: dict[str, Any] = {"pipe": 2, "hidden": (16,), "microbatches": 8}
    made = plan(job(4, **settings), "arrays")
    first, second = made.stages
    assert (first.copy, second.copy) == (3 * 4 * 144, 3 * 4 * 80)  # values and two states; one replica owns all
    assert made.checkpoint == 3 * 4 * (144 + 80)
    assert f"{second.copy} B" in screen(made)
    assert "; copies: to go on while it is written" in screen(made)

    frozen = plan(job(2, rates=("layers.0=0",), **settings), "arrays")
    assert [stage.copy for stage in frozen.stages] == [4 * 144, 3 * 4 * 80]
    without: list[dict[str, Any]] = [{"save": "sync"}, {"save_every": 0}]
    for none in without:
        waits = plan(job(4, **settings, **none), "arrays")
        assert made.rank_bytes - waits.rank_bytes == first.copy
        assert "copies" not in screen(waits)


def test_workers_by_hand() -> None:
    """Four workers on two ranks: each has values and states, those of a rank have one set of gradient vectors."""
    settings = {"hidden": (16,), "microbatches": 8, "workers": 4, "average_every": 3, "outer_momentum": 0.5}
    apart = job(2, average_from=9, **settings)
    made, (together, _) = plan(apart, "arrays"), apart.phases()
    (stage,), whole, first = made.stages, 4 * 224, 4 * 160  # biases come first; rank 0 owns all but the last weights
    assert (stage.copies, stage.values, stage.gradient_vectors, stage.gradients) == (2, whole, 2, 2 * whole)
    assert stage.state == 2 * 2 * whole  # AdamW, two workers
    assert stage.average == 2 * whole + 2 * first  # slots; the start and the velocity of what rank 0 owns
    held = costs.stage_memory(apart, 0, NOTHING)
    assert held.common.tolist() == [2 * whole + whole / 2] * 2  # both have one mean
    assert made.node_bytes == round(held.held.sum()) + 2 * stage.activations
    assert costs.fullest_node(together, [costs.stage_memory(together, 0, NOTHING)]) < made.node_bytes
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


def plan_command(*arguments: str, blocked: bool = False) -> subprocess.CompletedProcess[str]:
    """What `python -m mpiml.plan` says; `blocked`: where mpi4py cannot be imported."""
    without = "import sys, runpy; sys.modules['mpi4py'] = None; runpy.run_module('mpiml.plan', run_name='__main__')"
    command = [sys.executable, *(["-c", without] if blocked else ["-m", "mpiml.plan"]), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def test_the_command_needs_no_mpi() -> None:
    done = plan_command("--ranks", "64", "--node-ranks", "16", "--pipe", "4", "--hidden", "128,128,128", blocked=True)
    assert done.returncode == 0, done.stderr
    assert "64 ranks = 4 stages x 16 replicas; same bits on any grid: --microbatches 128" in done.stdout
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
    assert "a node sends at most" in text
    heads = next(line for line in text.splitlines() if line.startswith("stage "))
    below = text.splitlines()[text.splitlines().index(heads) + 1]
    assert len(heads) == len(below)


def test_refused_grids() -> None:
    with pytest.raises(ConfigError, match="do not divide"):
        job(6, pipe=4)
