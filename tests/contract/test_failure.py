"""Whatever one rank does, the whole job ends in time and says why."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Job, eventually, launch, launch_all, mpirun

pytestmark = pytest.mark.contract

SCRIPT = str(Path(__file__).with_name("trouble.py"))
LIMIT = 15.0  # seconds: 10 that are promised, and the start
PHASES = ("start", "data", "forward", "backward", "evaluation")


def trouble(path: Path, rank: int | str, phase: str, kind: str, flags: str = "", limit: float = LIMIT) -> Job:
    arguments = [SCRIPT, str(rank), phase, kind, "--out", str(path / "run"), "--pipe", "2", "--steps", "20"]
    done = launch(4, *arguments, *flags.split(), limit=limit)
    return Job(done.returncode, done.stdout, done.stderr, path / "run")


def alone(path: Path, kind: str, flags: str) -> Job:
    """The same program on one rank, where nothing happens to it."""
    done = launch(0, SCRIPT, "0", "never", kind, "--out", str(path / "run"), *flags.split(), limit=2 * LIMIT)
    return Job(done.returncode, done.stdout, done.stderr, path / "run")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("kind", ["raise", "exit0", "exit1", "exit-text", "thread-raise", "thread-exit"])
def test_ways_out_of_one_rank_end_the_job_with_its_reason(tmp_path: Path, phase: str, kind: str) -> None:
    rank = {"start": 1, "data": 0, "forward": 3, "backward": 2, "evaluation": 1}[phase]
    job = trouble(tmp_path, rank, phase, kind)
    assert job.code == 70
    why = "this rank is in trouble" if "raise" in kind else "sys.exit"
    assert job.err.count("Traceback (most recent call last)") == 1
    assert why in job.err
    assert f"rank {rank}" in job.err
    if phase != "start":  # nothing is written before the data are known to be good
        result = job.result
        assert (result["status"], result["exit_code"], result["rank"]) == ("failed", 70, rank)
        assert why in result["reason"]
        assert "Traceback" in result["traceback"]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("kind", ["kill", "segv", "os-exit0", "os-exit3"])
def test_ways_out_that_cannot_be_seen_end_the_job_too(tmp_path: Path, phase: str, kind: str) -> None:
    job = trouble(tmp_path, 1, phase, kind)
    if phase != "start":
        assert job.result["status"] == "running"
        again = alone(tmp_path, kind, "--resume --steps 20 --pipe 1")
        assert again.code == 0
        assert "ended without a word" in again.out


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("kind", "what"), [("stop", "has given no sign of life"), ("sleep", "has made no progress")])
def test_stalled_rank_is_named(tmp_path: Path, phase: str, kind: str, what: str) -> None:
    rank = (PHASES.index(phase) + (kind == "stop")) % 2  # rank 0 is watched by rank 1, all others by rank 0
    job = trouble(tmp_path, rank, phase, kind, "--stall-timeout 3")
    assert job.code == 70
    assert f"rank {rank} {what} for 3 s" + (", in step" if kind == "sleep" else "") in job.err
    if phase != "start":
        assert job.result["rank"] == rank


def test_two_neighbours_that_stop_together_are_noticed(tmp_path: Path) -> None:
    job = trouble(tmp_path, "0,1", "forward", "stop", "--stall-timeout 3")
    assert job.code == 70
    assert "has given no sign of life" in job.err


def test_rank_that_stops_after_the_last_step_is_noticed(tmp_path: Path) -> None:
    job = trouble(tmp_path, 1, "end", "stop", "--stall-timeout 3")
    assert job.code == 70
    assert "rank 1 has given no sign of life" in job.err


def test_rank_that_ends_while_the_launcher_is_stopped_is_noticed(tmp_path: Path) -> None:
    """One after the other, the rest ends by itself: nobody is left to end it."""
    out = tmp_path / "run"
    command = [*mpirun(4), sys.executable, SCRIPT, "1", "backward", "unnoticed", "--out", str(out), "--steps", "20"]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert eventually(lambda: result_of(out).get("status") == "failed" and not ranks(out), 60)
    for process in {*stopped(job.pid), job.pid}:
        os.kill(process, signal.SIGKILL)
    job.wait(20)
    assert result_of(out)["rank"] == 1
    assert "rank 1 has ended without a word" in result_of(out)["reason"]


def test_ranks_whose_launcher_is_killed_end_and_say_so(tmp_path: Path) -> None:
    job = trouble(tmp_path, 1, "forward", "kill-launcher", "--steps 100000 --quiet", limit=30)
    assert eventually(lambda: not ranks(job.run), 15)
    assert (job.result["status"], job.result["rank"]) == ("failed", None)
    assert job.result["reason"].startswith("the launcher is gone")


def test_of_two_ranks_that_fail_together_one_is_waited_for(tmp_path: Path) -> None:
    job = trouble(tmp_path, "0,1", "forward", "raise-slowly")
    assert (job.code, job.result["status"]) == (70, "failed")
    assert "this rank is in trouble" in job.result["reason"]
    assert job.err.count("Traceback") == 1


def result_of(run: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads((run / "result.json").read_text()))
    return {}


def ranks(run: Path) -> list[int]:
    """The ranks of a job that are still there."""
    return [rank["pid"] for rank in json.loads((run / "environment.json").read_text())["ranks"] if alive(rank["pid"])]


def stopped(process: int) -> set[int]:
    """A process, and its children and theirs, as far as they are stopped."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    mine = {process} if state(process) == "T" else set()
    return mine.union(*(stopped(int(child)) for child in children))


def test_report_that_fails_does_not_keep_the_job(tmp_path: Path) -> None:
    assert trouble(tmp_path, 2, "forward", "raise-unspeakable").code != 0


def test_slow_start_of_one_rank_is_no_stall_of_the_others(tmp_path: Path) -> None:
    """One reads for longer than the timeout, moving all the while; the others rightly wait."""
    job = trouble(tmp_path, 1, "start", "read-slowly", "--stall-timeout 2", limit=60)
    assert job.code == 0, job.err


def test_slow_but_moving_job_is_not_ended(tmp_path: Path) -> None:
    job = trouble(tmp_path, 2, "evaluation", "slow", "--stall-timeout 2", limit=60)
    assert job.code == 0, job.err


def test_stall_timeout_0_watches_nothing(tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        trouble(tmp_path, 1, "forward", "sleep", "--stall-timeout 0", limit=8)


def test_loss_that_is_not_finite_stops_in_that_step(train_all: Any) -> None:
    """Even if the sum has begun."""
    flags = "--optimizer sgd --lr 1e30 --steps 50 --save-every 1"
    for job in train_all(4, f"{flags} --pipe 2", f"MPIML_NODES=2,2 {flags} --bucket 0.001"):
        assert job.code == 70
        assert "not finite" in job.result["reason"]
        assert job.err.count("\n") == 1
        good = sorted((job.run / "checkpoints").glob("step-*"))
        assert len(good) <= job.result["step"] - 1
        text = (job.run / "metrics.jsonl").read_text() if (job.run / "metrics.jsonl").exists() else ""
        assert "NaN" not in text
        assert "Infinity" not in text


def test_gradient_that_is_not_finite_stops_though_the_loss_is_finite(train_all: Any, tmp_path: Path) -> None:
    """The loss adds up squares of 1e20 in float64; the gradient has products of such numbers in float32."""
    rng = np.random.default_rng(0)
    x, y = np.full((64, 4), 1e20, np.float32), rng.normal(size=64).astype(np.float32)
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    flags = f"--data {tmp_path}/d.npz --hidden 16 --steps 4 --optimizer sgd --lr 1 --log-every"
    logged, unlogged = train_all(2, f"{flags} 1", f"{flags} 9")
    for job, reason in ((logged, "the gradient is not finite in step 1"), (unlogged, "after step 1;")):
        assert job.code == 70, job.out
        assert reason in job.err
        assert not list((job.run / "checkpoints").glob("step-*"))


LAYERS = """
import os
import random

from mpi4py import MPI
from mpiml.nn.layers import Flatten, Layer, Linear, Tanh
from mpiml.nn.parameters import Parameter

class Half(Layer):
    def __call__(self, x, at):
        return x[:, ::2], lambda dy, grads: dy

class Mute(Layer):
    def __call__(self, x, at):
        return x, lambda dy, grads: None

class Scale(Layer):
    def __init__(self):
        self.by = Parameter((32,), lambda rng, count: drawn)
    def __call__(self, x, at):
        return x, lambda dy, grads: dy

drawn = [random.Random(os.getpid()).random() for _ in range(32)]

def half(shape, outputs):
    return [Flatten(), Linear(64, 32), Half(), Tanh(), Linear(32, outputs)]

def mute(shape, outputs):
    return [Flatten(), Linear(64, 32), Mute(), Linear(32, outputs)]

def other_layers(shape, outputs):
    first = [Flatten(), Tanh()]
    return [*(first[::-1] if MPI.COMM_WORLD.rank else first), Linear(64, outputs)]

def other_values(shape, outputs):
    return [Flatten(), Linear(64, 32), Scale(), Linear(32, outputs)]
"""


@pytest.mark.parametrize(
    ("model", "cut", "words"),
    [
        ("half", 3, "layers.2, Half, gives outputs of shape (16,) for a row, but its output_shape says (32,)"),
        ("mute", 2, "layers.2, Mute, gives no gradient to the layers before it"),
    ],
)
def test_a_layer_that_is_wrong_at_the_border_of_a_stage_is_named_at_once(
    train: Any, tmp_path: Path, model: str, words: str, cut: int
) -> None:
    (tmp_path / "own.py").write_text(LAYERS)
    job = train(2, f"--model own:{model} --pipe 2 --cuts {cut}", limit=LIMIT, PYTHONPATH=str(tmp_path))
    assert job.code == 78
    assert f"mpiml.train: {words} (rank " in job.err
    assert job.result["reason"] == words


def test_ranks_that_build_different_models_are_refused(train_all: Any, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(LAYERS)
    flags = ("--model own:other_layers", "--model own:other_values --pipe 2")
    layers, values = train_all(2, *flags, PYTHONPATH=str(tmp_path))
    for job, words in (
        (layers, "ranks differ in the model, layers.0: Tanh() (rank 1 on "),
        (values, "ranks differ in first values of the model, layers.2.by: (32,), checksum "),
    ):
        assert job.code == 78
        assert words in job.err
        assert job.err.count("\n") == 1
        assert not job.run.exists()


BAD_SETTINGS = {
    "--pipe 4": ["6 ranks do not divide into pipelines of 4 stages; --pipe 1, 2, 3, 6 would work"],
    "--microbatches 2": ["--microbatches 2: 6 replicas need at least one each"],
    "--microbatches 2000": ["--microbatches 2000: the data set has only 1437 rows to share out"],
    "--hidden 8 --pipe 6": ["layers", "6 stages"],
    "--optimizer adamx": ["adamx", "adamw"],
    "--cuts 1,2 --pipe 2": ["--cuts 1,2: 2 given, but 1 needed for --pipe 2"],
    "--loss mse --metric accuracy": ["--metric accuracy"],
    "--lrr 3": ["--lrr", "--lr"],
}


def test_bad_settings_are_one_line_from_one_rank(train_all: Any) -> None:
    for job, words in zip(train_all(6, *BAD_SETTINGS), BAD_SETTINGS.values(), strict=True):
        assert job.code == 78
        assert len(job.err.strip().splitlines()) == 1
        assert job.err.startswith("mpiml.train: ")
        for word in words:
            assert word in job.err
        assert not job.run.exists()


def test_directory_of_a_run_or_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run, other = tmp_path / "run", tmp_path / "file" / "run"
    first, second, impossible = launch_all(2, [(run, "--steps 2"), (run, "--steps 2"), (other, "--steps 2")])
    assert (first.code, second.code, impossible.code) == (0, 73, 74)
    assert "--resume" in second.err
    assert "file/run" in impossible.err
    assert impossible.err.count("\n") == 1


def test_of_two_jobs_on_one_directory_one_wins(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "0", "evaluation", "sleep", "--out", str(tmp_path / "run")]
    first = subprocess.Popen([*command, "--steps", "3"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert eventually((tmp_path / "run" / "metrics.jsonl").exists)
        second = launch(2, "-m", "mpiml.train", "--out", str(tmp_path / "run"), "--resume")
    finally:
        (rank,) = json.loads((tmp_path / "run" / "environment.json").read_text())["ranks"]
        os.kill(rank["pid"], signal.SIGKILL)
        first.wait(20)
    assert second.returncode == 73
    assert "in use by another job" in second.stderr


OWN_LOSSES = """
def loss(y, labels):
    return 1.0, -1.0 if labels.any() else 1.0, y

def broken(y, labels):
    if labels.any():
        raise KeyError("my own trouble")
    return 1.0, 1.0, y
"""


def test_loss_of_ones_own_that_returns_what_is_none_ends_the_job_with_a_line(train: Any, tmp_path: Path) -> None:
    """Of the rows that are trained on; labels of 0 alone, with which a loss is tried, are no trouble."""
    (tmp_path / "my_loss.py").write_text(OWN_LOSSES)
    path = f"{tmp_path}:{Path(__file__).parents[2]}"
    job = train(3, "--loss my_loss:loss --steps 2 --quiet", PYTHONPATH=path)
    assert (job.code, job.result["exit_code"], job.result["step"]) == (78, 78, 1)
    assert job.result["reason"].startswith("--loss my_loss:loss: returns -1 as sum of weights")
    assert job.err.startswith(f"mpiml.train: {job.result['reason']} (rank {job.result['rank']}, step 1, compute)\n")
    assert job.err.count("mpiml.train: ") == 1
    assert "Traceback" not in job.err
    job = train(2, "--loss my_loss:broken --steps 2 --quiet", out="broken", PYTHONPATH=path)
    assert (job.code, job.result["reason"]) == (70, "KeyError: 'my own trouble'")
    assert "my_loss.py" in job.result["traceback"]


def test_full_disk_is_everybodys_error_and_old_checkpoints_stay(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the write fails in the same place."""
    flags = "--microbatches 4 --save-every 2 --eval-every 4"
    before = alone(tmp_path, "small-files", f"--steps 4 {flags}")
    kept = {path.name: path.read_bytes() for path in (before.run / "checkpoints").glob("step-*")}
    job = trouble(tmp_path, 0, "forward", "small-files", "--resume")
    assert job.code == 74, job.err
    assert "cannot write the checkpoint" in job.err
    left = {path.name: path.read_bytes() for path in (job.run / "checkpoints").glob("step-*")}
    assert kept.items() <= left.items()
    assert job.result["exit_code"] == 74
    assert alone(tmp_path, "small-files", "--resume --steps 20 --pipe 1").code == 0


def test_killed_from_outside(tmp_path: Path) -> None:
    command = [*mpirun(3), sys.executable, "-m", "mpiml.train", "--out", str(tmp_path / "run"), "--steps", "100000"]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert eventually((tmp_path / "run" / "metrics.jsonl").exists)
    pids = [rank["pid"] for rank in json.loads((tmp_path / "run" / "environment.json").read_text())["ranks"]]
    os.kill(pids[2], signal.SIGKILL)
    job.wait(10)
    assert eventually(lambda: not any(alive(pid) for pid in pids), 5)


def alive(pid: int) -> bool:
    return state(pid) not in "ZX"


def state(pid: int) -> str:
    """What the kernel calls the state of a process; X if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "X"
