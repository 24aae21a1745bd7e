"""A run that was interrupted, at any step and on any layout, ends as if it had never stopped."""

from __future__ import annotations

import functools
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from mpiml.config import Config
from mpiml.errors import ConfigError
from mpiml.train import train
from tests.conftest import Job, eventually, launch, launch_all, mpirun

pytestmark = pytest.mark.contract

STEPS = 14  # an epoch has 12
BASE = (
    f"--steps {STEPS} --microbatches 12 --hidden 24,16 --dropout 0.1 --clip 1 --save-every 1 --keep 99 "
    "--log-every 2 --eval-every 4"
)
TIMES = ("seconds", "samples_per_second", "time")


def comparable(job: Job) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in job.metrics]


def assert_same_end(job: Job, whole: Job) -> None:
    assert job.code == 0, job.err
    for key in ("status", "step", "loss", "accuracy", "test_loss", "weights_sha256"):
        assert job.result[key] == whole.result[key], key
    assert comparable(job) == comparable(whole)
    last = f"checkpoints/step-{STEPS:09d}.safetensors"
    one, other = load_file(job.run / last), load_file(whole.run / last)
    assert list(one) == list(other)
    assert all((one[name] == other[name]).all() for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Job:
    path = tmp_path_factory.mktemp("whole") / "run"
    done = launch(4, "-m", "mpiml.train", "--out", str(path), *BASE.split(), "--pipe", "2")
    assert done.returncode == 0, done.stderr
    return Job(done.returncode, done.stdout, done.stderr, path)


def interrupted(whole: Job, path: Path, step: int) -> Path:
    """The directory as a job leaves it that was killed some time after its checkpoint of `step`."""
    shutil.copytree(whole.run, path)
    for file in sorted((path / "checkpoints").iterdir())[step:]:
        file.unlink()
    result = json.loads((path / "result.json").read_text())
    (path / "result.json").write_text(json.dumps(result | {"status": "running", "saved": 0}))
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    if not step:  # before its first save, which comes after step 1
        lines.clear()
    (path / "metrics.jsonl").write_text("".join(lines) + '{"step": 15, "los')
    return path


LAYOUTS = [(0, "--pipe 1"), (3, "--pipe 1"), (2, "--pipe 2 --schedule gpipe"), (4, "--pipe 4 --schedule zb-h1")]


@pytest.fixture(scope="module")
def resumed(whole: Job, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[tuple[int, Job]]]:
    """`resumed(n)` goes on after every fourth step on layout n, all in one job: steps, and what became of the runs."""

    def on(number: int) -> list[tuple[int, Job]]:
        (ranks, layout), path = LAYOUTS[number], tmp_path_factory.mktemp("resumed")
        steps = range(number, STEPS + 1, len(LAYOUTS))
        runs = [interrupted(whole, path / str(step), step) for step in steps]
        return list(zip(steps, launch_all(ranks, [(run, f"--resume {layout}") for run in runs]), strict=True))

    return functools.cache(on)


@pytest.mark.parametrize("step", range(STEPS + 1))
def test_resumed_after_any_step_on_another_layout(whole: Job, resumed: Any, step: int) -> None:
    job = dict(resumed(step % len(LAYOUTS)))[step]
    assert f"after step {step}" in job.out or "starting at step 0" in job.out
    assert "ended without a word" in job.out
    assert_same_end(job, whole)


def test_more_ranks_than_the_run_has_micro_batches(train: Any) -> None:
    """Those without work wait, and the run says so: a job that is requeued gets the ranks that it gets."""
    flags = "--microbatches 2 --hidden 16 --steps"
    whole, _, job = train(0, f"{flags} 12", out="whole"), train(0, f"{flags} 4"), train(5, "--resume --steps 12")
    assert job.code == 0, job.err
    assert "5 ranks, but --microbatches 2 of the run keeps 2 busy: 3 ranks idle\n" in job.out
    assert (job.result["ranks"], job.result["status"]) == (2, "done")
    assert job.result["weights_sha256"] == whole.result["weights_sha256"]


def test_killed_in_full_flight(whole: Job, train: Any, tmp_path: Path) -> None:
    command = [*mpirun(4), sys.executable, "-m", "mpiml.train", "--out", str(tmp_path / "run"), *BASE.split()]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert eventually(lambda: checkpoints.is_dir() and len(list(checkpoints.glob("step-*"))) >= 3)
    pids = [rank["pid"] for rank in json.loads((tmp_path / "run" / "environment.json").read_text())["ranks"]]
    for pid in pids:
        try_kill(pid)
    job.wait(30)
    assert_same_end(train(0, "--resume"), whole)


def test_first_start_may_say_resume(train: Any) -> None:
    job = train(0, "--resume --steps 3")
    assert job.code == 0
    assert "starting at step 0" in job.out


def test_finished_run_is_left_alone(whole: Job, train: Any, tmp_path: Path) -> None:
    shutil.copytree(whole.run, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    job = train(0, "--resume")
    assert job.code == 0
    assert "nothing to do" in job.out
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.parametrize("model", ["--hidden 16", "--model resnet --norm batch --channels 2 --blocks 1 --batch 32"])
def test_longer_run_equals_one_that_was_long_from_the_start(train: Any, model: str) -> None:
    flags = f"--microbatches 4 {model} --log-every 1 --eval-every 5 --save-every 7"
    long = train(0, f"{flags} --steps 18", out="long")
    train(0, f"{flags} --steps 12", out="short")
    job = train(4, "--resume --steps 18", out="short")
    assert job.result["weights_sha256"] == long.result["weights_sha256"]
    assert comparable(job) == comparable(long)


FALLS: dict[str, Any] = {"steps": 6, "decay": "cosine", "lr_floor": 0.0001, "warmup_steps": 2, "microbatches": 4}
FALLS |= {"hidden": (8,), "save_every": 2, "keep": 9, "log_every": 1}
ANEW: dict[str, Any] = {"resume": True, "steps": 10, "decay_steps": 9, "lr": 0.002}
AGAIN: dict[str, Any] = {"resume": True, "steps": 14, "decay_steps": 14, "lr_floor": 0.0005}


def rate(step: int) -> float:
    """Of a run that was extended twice: with a warm-up, to a floor at step 6; to it at step 9; to another at 14."""
    if step <= 2:
        return 0.001 * step / 2
    begin, end, peak, floor = (2, 6, 0.001, 0.0001) if step <= 6 else (6, 9, 0.002, 0.0001)
    if step > 10:
        begin, end, peak, floor = 10, 14, 0.002, 0.0005
    return floor + (peak - floor) / 2 * (1 + math.cos(math.pi * min((step - begin) / (end - begin), 1)))


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run that was finished, extended, finished, and extended again."""
    run = tmp_path_factory.mktemp("extended") / "run"
    for settings in (FALLS, ANEW, AGAIN):
        train(Config(**settings, out=str(run), quiet=True))
    return Job(0, "", "", run)


@pytest.mark.parametrize(("begun", "killed"), [(6, 6), (6, 8), (4, 4), (2, 6)])
def test_a_run_whose_learning_rate_falls_anew_over_more_steps_may_be_killed(
    extended: Job, tmp_path: Path, begun: int, killed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it was finished or not, before its next checkpoint or after it; said again or not."""
    run, out = tmp_path / "run", {"out": str(tmp_path / "run")}
    train(Config(**FALLS, **out))
    kill(run, begun)
    with pytest.raises(ConfigError, match=r"^10 steps: .* --decay-steps 10 "):
        train(Config(**out, resume=True, steps=10))
    whole, phases = train(Config(**out, **ANEW)), "from 0.001 towards 0.0001 until step 6; after step 6 from 0.002"
    assert (
        f"the learning rate falls by --decay cosine {phases} towards 0.0001 until step 9\n" in capsys.readouterr().out
    )
    config = (run / "config.toml").read_text()
    for again in (ANEW, {"resume": True}):
        kill(run, killed)
        assert train(Config(**out, **again))["weights_sha256"] == whole["weights_sha256"]
        assert (run / "config.toml").read_text() == config
    kill(run, 8)
    assert train(Config(**out, **AGAIN))["weights_sha256"] == extended.result["weights_sha256"]


def test_a_run_that_was_extended_is_repeated_by_its_config(extended: Job, train: Any) -> None:
    rates = {line["step"]: line["learning_rate"] for line in extended.metrics if "learning_rate" in line}
    assert rates == pytest.approx({step: rate(step) for step in range(1, 15)}, abs=1e-12)
    fresh = train(4, f"--config {extended.run}/config.toml --pipe 2", out="fresh")
    assert fresh.code == 0, fresh.err
    assert fresh.result["weights_sha256"] == extended.result["weights_sha256"]
    assert comparable(fresh) == comparable(extended)
    assert (fresh.run / "config.toml").read_text() == (extended.run / "config.toml").read_text().replace(
        "pipe = 1\n", "pipe = 2\n"
    )


def test_steps_that_a_run_had_done_before_it_was_cut_short_keep_their_rate(extended: Job, tmp_path: Path) -> None:
    run, out = tmp_path / "run", {"out": str(tmp_path / "run"), "quiet": True}
    train(Config(**FALLS, **out))
    kill(run, 6)
    train(Config(**out, resume=True, steps=3))
    assert "steps = 3\n" in (run / "config.toml").read_text()
    train(Config(**out, **ANEW))
    train(Config(**out, **AGAIN))
    assert json.loads((run / "result.json").read_text())["weights_sha256"] == extended.result["weights_sha256"]


def kill(run: Path, step: int) -> None:
    """Leave the directory as a job does that is killed soon after its checkpoint of `step`."""
    for file in (run / "checkpoints").iterdir():
        if file.name > f"step-{step:09d}.safetensors":
            file.unlink()
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"status": "running", "step": 0}))


def test_damaged_newest_checkpoints_are_named_and_skipped_if_one_is_whole(whole: Job, tmp_path: Path) -> None:
    path, hopeless = interrupted(whole, tmp_path / "run", 6), interrupted(whole, tmp_path / "hopeless", 2)
    newest = path / "checkpoints" / "step-000000006.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    for file in (hopeless / "checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    job, failed = launch_all(2, [(path, "--resume"), (hopeless, "--resume")])
    assert "step-000000006.safetensors is damaged" in job.out
    assert "after step 5" in job.out
    assert_same_end(job, whole)
    assert failed.code == 74
    assert "no checkpoint" in failed.err
    assert "step-000000001" in failed.err


ARITHMETIC = ["--batch 64", "--lr 0.5", "--microbatches 6", "--seed 3", "--hidden 24", "--threads 2"]


def test_change_of_arithmetic_is_refused_by_name(whole: Job, tmp_path: Path) -> None:
    run = interrupted(whole, tmp_path / "run", 3)
    for flag, job in zip(ARITHMETIC, launch_all(2, [(run, f"--resume {flag}") for flag in ARITHMETIC]), strict=True):
        assert job.code == 78
        assert flag.split()[0] in job.err
        assert len(job.err.strip().splitlines()) == 1


STOPPED = "--steps 400 --microbatches 4 --hidden 32 --save-every 0"


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return launch_all(0, [(tmp_path_factory.mktemp("unstopped") / "run", STOPPED)])[0]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_saves_and_stops(train: Any, unstopped: Job, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    command = [*mpirun(3), sys.executable, "-m", "mpiml.train", "--out", str(run), *STOPPED.split()]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert eventually((run / "metrics.jsonl").exists)
    pid = json.loads((run / "environment.json").read_text())["ranks"][1]["pid"]
    subprocess.run(["kill", f"-{number.value}", str(pid)], check=True)
    job.communicate(timeout=30)
    result = json.loads((run / "result.json").read_text())
    assert (job.returncode, result["status"], result["exit_code"]) == (75, "stopped", 75)
    assert 0 < result["step"] < 400
    assert train(0, "--resume --steps 400").result["weights_sha256"] == unstopped.result["weights_sha256"]


TROUBLE = [str(Path(__file__).with_name("trouble.py")), "1"]
SIXTEEN = "--steps 16 --microbatches 4 --save-every 6"


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the weights of a run that nobody asks to stop."""
    run = tmp_path_factory.mktemp("sixteen") / "run"
    done = launch(0, *TROUBLE, "never", "term", "--out", str(run), *SIXTEEN.split())
    assert done.returncode == 0, done.stderr
    return str(json.loads((run / "result.json").read_text())["weights_sha256"])


@pytest.mark.parametrize(("phase", "step"), [("start", 0), ("save", 7), ("end", 16)])
def test_signal_in_the_start_in_a_save_or_at_the_end(tmp_path: Path, sixteen: str, phase: str, step: int) -> None:
    """It may come again and again; the run that goes on ends as one that nobody asked to stop."""
    out = ["--out", str(tmp_path / "run"), *SIXTEEN.split()]
    done = launch(2, *TROUBLE, phase, "term", *out)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    status, code = ("stopped", 75) if step < 16 else ("done", 0)
    assert (done.returncode, result["status"], result["exit_code"], result["step"]) == (code, status, code, step)
    resumed = launch(0, *TROUBLE, "never", "term", *out, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["weights_sha256"] == sixteen


EVALUATED = "--steps 10 --microbatches 4 --eval-every 4 --eval-rows 8 --log-every 2"


def evaluated(path: Path, ranks: int, phase: str, kind: str, flags: str) -> Job:
    done = launch(ranks, *TROUBLE, phase, kind, "--out", str(path), *EVALUATED.split(), *flags.split())
    return Job(done.returncode, done.stdout, done.stderr, path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return evaluated(tmp_path_factory.mktemp("undisturbed") / "run", 0, "never", "term", "")


@pytest.mark.parametrize(("kind", "save_every", "code"), [("term", 6, 75), ("raise", 4, 70)])
def test_what_ends_in_an_evaluation_is_saved_and_evaluated_later(
    tmp_path: Path, undisturbed: Job, kind: str, save_every: int, code: int
) -> None:
    """A stop soon after it is asked for, with a checkpoint of its own; a failure with the one that was due."""
    job = evaluated(tmp_path / "run", 4, "evaluation", kind, f"--pipe 2 --save-every {save_every}")
    assert job.code == code, job.err
    assert [path.name for path in (job.run / "checkpoints").iterdir()] == ["step-000000004.safetensors"]
    assert not any("evaluation" in line for line in job.metrics)
    assert (job.result["exit_code"], job.result["step"]) == (code, 4)
    again = evaluated(tmp_path / "run", 0, "never", kind, "--resume --pipe 1")
    assert again.code == 0, again.err
    assert comparable(again) == comparable(undisturbed)
    for key in ("status", "step", "loss", "accuracy", "test_loss", "weights_sha256"):
        assert again.result[key] == undisturbed.result[key], key


def test_signal_before_mpi_is_up_stops_too(tmp_path: Path) -> None:
    """Sent at once and again until the end: whatever is loading at the time, none of them kills."""
    command = [sys.executable, "-m", "mpiml.train", "--out", str(tmp_path / "run"), "--steps", "5000"]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    handled = 1 << (signal.SIGUSR1 - 1)
    status = Path(f"/proc/{job.pid}/status")
    assert eventually(lambda: int(status.read_text().split("SigCgt:")[1].split()[0], 16) & handled)
    mapped = Path(f"/proc/{job.pid}/maps").read_text()
    while job.poll() is None:
        job.send_signal(signal.SIGUSR1)
        time.sleep(0.02)
    assert "libmpi" not in mapped
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (job.returncode, result["status"], result["step"]) == (75, "stopped", 0)


SLOW = """
import os, time

def down(x, y, rng):
    time.sleep(float(os.environ.get("PAUSE", "0")))
    return x, y
"""


@pytest.mark.parametrize("limit", ["flag", "slurm"])
def test_time_limit_saves_and_stops_in_time(train: Any, tmp_path: Path, limit: str) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    flags, own = "--steps 100000 --microbatches 4 --hidden 32 --save-every 0 --transform slow:down", str(tmp_path)
    environment = {"SLURM_JOB_END_TIME": str(int(time.time()) + 8)} if limit == "slurm" else {}
    began = time.monotonic()
    more = " --time-limit 0:03" if limit == "flag" else ""
    job = train(2, flags + more, PAUSE="0.01", PYTHONPATH=own, **environment)
    assert time.monotonic() - began < 8
    assert (job.code, job.result["status"], job.result["reason"]) == (75, "stopped", "time is nearly up"), job.err
    step = job.result["step"]
    assert step > 10
    assert "time-limit" not in (job.run / "config.toml").read_text()
    whole = train(0, f"{flags} --steps {step}", out="whole", PYTHONPATH=own)
    assert job.result["weights_sha256"] == whole.result["weights_sha256"]


def try_kill(pid: int) -> None:
    subprocess.run(["kill", "-9", str(pid)], check=False, stderr=subprocess.DEVNULL)
