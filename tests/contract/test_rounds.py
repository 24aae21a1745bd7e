"""Runs of workers that are stopped between their averages, on any layout, end as if they had never stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors import safe_open

from mpiml.config import Config
from mpiml.errors import OutputError
from mpiml.evaluate import evaluate
from mpiml.train import train
from mpiml.training.export import trained
from tests.conftest import Job, launch_all
from tests.contract.table import assert_same, interrupt

pytestmark = pytest.mark.contract

# In a step, trouble comes on the rank that has the first row of a micro-batch in its last stage.
OWN = """
import os, signal, time
import numpy as np
from mpiml.nn.layers import BatchNorm2d, Conv2d, Dropout, Flatten, Layer, Linear, Reshape, Tanh

def ask():
    os.kill(os.getpid(), signal.SIGUSR1)

class Trouble(Layer):
    def __call__(self, x, at):
        here = f"{at.step}:{at.microbatch}" if at.training else ""
        if here == os.environ.get("ASK"):
            ask()
        if here == os.environ.get("RAISE"):
            raise RuntimeError("trouble of one rank")
        if here == os.environ.get("STALL"):
            time.sleep(60)
        return x * np.float32("nan" if here == os.environ.get("BREAK") else 1), lambda dy, grads: dy

def model(shape, outputs):
    if os.environ.get("ASK") == "start":
        ask()
    first = [Reshape((8, 8, 1)), Conv2d(1, 3, 3), BatchNorm2d(3), Tanh(), Flatten()]
    return [*first, Linear(192, 16), Dropout(0.1), Linear(16, outputs), Trouble()]
"""
COMMON = (
    "--model rounds_own:model --microbatches 12 --batch 100 --clip 0.5 --save-every 5 --eval-every 6 --eval-rows 50 "
    "--keep 9"
)
RUNS = {
    "plain": f"{COMMON} --workers 4 --average-every 8 --log-every 3 --steps 20",  # rounds end with steps 8, 16 and 20
    # Steps 1 to 3, and then rounds that end with steps 12, 21 and 22.
    "outer": f"{COMMON} --workers 2 --average-every 9 --average-from 4 --outer-lr 0.7 --outer-momentum 0.9 --ema 0.8 "
    "--rates layers.1=0 --keep-best 1 --log-every 1 --steps 22",
}
AT_ONCE = "--stop-grace 0"


class Ended(NamedTuple):
    """How a job ended, what it left, and what it had said by then in result.json."""

    job: Job
    result: dict[str, Any]
    checkpoints: list[str]


class Trials:
    """Run directories, each of which some jobs go on with, one after another."""

    def __init__(self, path: Path):
        self.path = path
        (path / "rounds_own.py").write_text(OWN)

    def on(self, ranks: int, **commands: str) -> dict[str, Ended]:
        """Go on with these directories, all in one MPI job."""
        named = [(self.path / name, flags) for name, flags in commands.items()]
        jobs = launch_all(ranks, named, PYTHONPATH=str(self.path))
        return {
            job.run.name: Ended(job, job.result, sorted(file.name for file in (job.run / "checkpoints").iterdir()))
            for job in jobs
        }

    def copied(self, name: str, *copies: str) -> None:
        for copy in copies:
            shutil.copytree(self.path / name, self.path / copy)


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Ended]]:
    """What became of the jobs on one rank, then on four, on three, and on one again, by directory."""
    here, plain, outer = Trials(tmp_path_factory.mktemp("rounds")), RUNS["plain"], RUNS["outer"]
    broken = f"BREAK=11:4 {plain}"
    first = here.on(0, plain=plain, outer=outer, broken_1=broken)
    four = here.on(
        4,
        plain_cut=f"ASK=10:9 {plain} --pipe 2 {AT_ONCE}",
        outer_cut=f"ASK=6:9 MPIML_NODES=2,2 {outer} {AT_ONCE}",
        patient=f"ASK=10:9 {plain}",
        late=f"ASK=18:9 {plain} {AT_ONCE}",
        broken_4=f"{broken} --pipe 2",
        raising=f"RAISE=11:4 {plain} --pipe 2",  # the last one: it ends the job
    )
    here.copied("plain_cut", "fewer", "shorter", "at_start")
    here.copied("outer_cut", "left")
    here.copied("patient", "others")
    three = here.on(
        3,
        plain_cut="ASK=12:9 --resume --pipe 1 --memory private",
        outer_cut="ASK=9:9 --resume --memory private",
        patient="--resume",
        broken_3=broken,
        fewer="--resume --pipe 1 --workers 2",
        others="--resume --workers 2",
        shorter="--resume --pipe 1 --steps 13",
        late="--resume --steps 28",
        stalled=f"STALL=11:9 {plain} --stall-timeout 3",
    )
    here.copied("plain", "longer")
    interrupt(here.path / "plain", here.path / "killed")
    last = here.on(
        0,
        plain_cut="--resume",
        outer_cut="--resume",
        at_start="ASK=start --resume --pipe 1",
        fewer="--resume --pipe 1",
        longer="--resume --steps 28",
        killed="--resume --steps 28",
        fresh=f"--config {here.path}/longer/config.toml",
    )
    return {"first": first, "four": four, "three": three, "last": last}


@pytest.mark.parametrize(("run", "start", "asked"), [("plain", 8, (10, 12)), ("outer", 3, (6, 9))])
def test_stopped_twice_within_a_round_and_on_other_grids(
    trials: Any, run: str, start: int, asked: tuple[int, int]
) -> None:
    """The checkpoint is of the last step that all workers have done; those that do not ask may be further, or not."""
    whole, cut, before = trials["first"][run], f"{run}_cut", start
    for jobs, last in zip((trials["four"], trials["three"]), asked, strict=True):
        ended = jobs[cut]
        step = ended.result["step"]
        assert ended.job.code == 75, ended.job.err
        assert (ended.result["status"], ended.result["saved"]) == ("stopped", step)
        assert before < step <= last
        assert ended.checkpoints[-1] == f"step-{step:09d}.safetensors"
        before = step
    assert "going on within the round of steps" in trials["three"][cut].job.out
    assert_same(without_rounds(trials["last"][cut].job, whole), whole.job)


def without_rounds(job: Job, whole: Ended) -> Job:
    """A run whose checkpoints within rounds, which a `whole` one does not have, are taken away."""
    for file in (job.run / "checkpoints").iterdir():
        if file.name not in whole.checkpoints:
            file.unlink()
    return job


def test_a_checkpoint_within_a_round_has_all_that_each_worker_has(trials: Any) -> None:
    """And in the place of the model's weights those at the start of the round, which are hashed."""
    ended = trials["four"]["outer_cut"]
    with safe_open(ended.job.run.with_name("left") / "checkpoints" / ended.checkpoints[-1], "numpy") as file:
        names = set(file.keys())
    states = ("", "ema.", "optimizer.mean.", "optimizer.variance.")
    weights = {f"layers.{name}" for name in ("2.gain", "2.bias", "5.weight", "5.bias", "7.weight", "7.bias")}
    expected = {f"worker.{number}.{state}{weight}" for number in (0, 1) for state in states for weight in weights}
    averages = {f"worker.{number}.layers.2.running_{name}" for number in (0, 1) for name in ("mean", "variance")}
    assert {name for name in names if name.startswith("worker.")} == expected | averages
    assert not any(name.startswith(("ema.", "optimizer.")) for name in names)
    assert {"layers.1.weight", "outer.layers.7.weight"} < names


def test_a_round_is_finished_unless_that_takes_too_long(trials: Any) -> None:
    ended, whole = trials["four"]["patient"], trials["first"]["plain"]
    assert (ended.job.code, ended.result["step"], ended.checkpoints[-1]) == (75, 16, "step-000000016.safetensors")
    # Each worker's part of them is on one rank.
    assert "4 replicas; same bits on any grid: --workers 4 --microbatches 12\n" in ended.job.out
    assert_same(trials["three"]["patient"].job, whole.job)


def test_a_round_that_was_left_is_finished_by_as_many_workers(trials: Any) -> None:
    """Another number is refused, and nothing is lost; it may be had from the end of a round on."""
    cut, refused, done = trials["four"]["plain_cut"], trials["three"]["fewer"], trials["last"]["fewer"]
    assert refused.job.code == 78
    assert refused.job.err.startswith("mpiml.train: --workers 2: ")
    assert "was saved within a round of 4 workers" in refused.job.err
    assert refused.job.err.count("\n") == 1
    assert refused.checkpoints == cut.checkpoints
    assert_same(without_rounds(done.job, trials["first"]["plain"]), trials["first"]["plain"].job)
    others = trials["three"]["others"]
    assert others.job.code == 0, others.job.err
    assert others.result["weights_sha256"] != trials["first"]["plain"].result["weights_sha256"]


def test_a_round_that_was_left_is_not_cut_short(trials: Any) -> None:
    cut, refused = trials["four"]["plain_cut"], trials["three"]["shorter"]
    assert refused.job.code == 78
    assert refused.job.err.startswith("mpiml.train: --steps 13: ")
    assert "was saved within the round of steps 9 to 16, which workers must finish; at least 16" in refused.job.err
    assert refused.job.err.count("\n") == 1
    assert refused.checkpoints == cut.checkpoints


def test_a_run_that_is_extended_keeps_the_end_of_its_last_round(trials: Any) -> None:
    """Wherever it goes on from: that end, the one before, or within the round; and its settings repeat it."""
    longer = trials["last"]["longer"]
    assert longer.job.code == 0, longer.job.err
    assert "averaged-at = [20]\n" in (longer.job.run / "config.toml").read_text()
    for ended in (trials["last"]["killed"], trials["last"]["fresh"], trials["three"]["late"]):
        assert_same(without_rounds(ended.job, longer), longer.job)


def test_asked_to_stop_before_the_rest_of_a_round(trials: Any) -> None:
    """It is as it was."""
    cut, ended = trials["four"]["plain_cut"], trials["last"]["at_start"]
    assert ended.job.code == 75, ended.job.err
    for key in ("status", "step", "saved", "weights_sha256"):
        assert ended.result[key] == cut.result[key], key
    assert ended.checkpoints == cut.checkpoints


def test_what_one_worker_cannot_go_on_with_ends_the_run_with_the_round(trials: Any) -> None:
    """The same words on every grid but for the rank."""
    said = set()
    for ended, rank in (
        (trials["first"]["broken_1"], 0),
        (trials["three"]["broken_3"], 0),
        (trials["four"]["broken_4"], 2),
    ):
        assert ended.job.code == 70
        assert ended.checkpoints == ["step-000000008.safetensors"]
        text = ended.result["reason"]
        assert text.startswith(f"worker 1: the loss is not finite in step 11 (micro-batch 4, rank {rank});")
        assert ended.job.err.count("\n") == 1
        said.add(text.replace(f"rank {rank}", "rank"))
    assert len(said) == 1


def test_what_one_rank_does_alone_ends_the_job_though_others_wait_for_the_end_of_the_round(trials: Any) -> None:
    raising, stalled = trials["four"]["raising"], trials["three"]["stalled"]
    for ended, rank, reason in (
        (raising, 2, "RuntimeError: trouble of one rank"),
        (stalled, 1, "rank 1 has made no progress for 3 s, in step 11 (compute)"),
    ):
        assert (ended.job.code, ended.result["status"]) == (70, "failed")
        assert (ended.result["rank"], ended.result["step"], ended.result["reason"]) == (rank, 11, reason)
        assert ended.checkpoints == ["step-000000008.safetensors"]


def test_time_that_is_nearly_up_ends_a_run_within_a_round(tmp_path: Path) -> None:
    """Which would take for ever."""
    settings: dict[str, Any] = {"microbatches": 2, "workers": 2, "average_every": 10**4, "hidden": (99,), "quiet": True}
    whole, run = settings | {"steps": 10**4, "batch": 1000, "eval_every": 0}, str(tmp_path / "run")
    ended = train(Config(**whole, out=run, time_limit="0:02"))
    assert (ended["exit_code"], ended["reason"]) == (75, "time is nearly up")
    assert 0 < ended["step"] == ended["saved"] < 10**4
    assert 1 < ended["seconds"] < 4


def test_programs_take_the_weights_before_the_round(trials: Any, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    """Of which there are no averages."""
    ended, outer = trials["last"]["at_start"], trials["four"]["outer_cut"].job.run.with_name("left")
    monkeypatch.syspath_prepend(outer.parent)
    within, before = (ended.job.run / "checkpoints" / ended.checkpoints[n] for n in (1, 0))
    model = "rounds_own:model"
    assert evaluate(checkpoint=str(within), model=model) == evaluate(checkpoint=str(before), model=model)
    assert "within a round of workers: the weights are those after step 8" in capsys.readouterr().err
    conv = trained(within, model)[0][1]
    assert (conv.weight.value == trained(before, model)[0][1].weight.value).all()
    with pytest.raises(OutputError, match=r"has no average of the weights: .* as they were after step 3; take these"):
        evaluate(str(outer))
    with pytest.raises(OutputError, match="has no average of the weights: "):
        trained(next((outer / "checkpoints").iterdir()), model, average=True)
    assert evaluate(str(outer), raw_weights=True)["step"] == 3
    train(Config(init=str(within), model=model, microbatches=1, steps=1, out=str(tmp_path / "run")))
    step = int(within.stem[-9:])  # that all workers have done
    assert f"(step {step}, within a round of workers: the weights at its start)" in capsys.readouterr().out
