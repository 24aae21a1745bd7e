"""The run directory is held in good time, tells of this job and no other, and is let go; nothing is left behind."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.config import Config, parse
from mpiml.data.dataset import Dataset
from mpiml.errors import ConfigError, DataError, DirectoryError, OutputError, RunError
from mpiml.evaluate import evaluate
from mpiml.run import directory, environment, step_files
from mpiml.train import train
from mpiml.training.hold import Hold, _check_nothing_vanished, _finished, settings
from mpiml.training.run import Run
from tests.conftest import eventually
from tests.forging import forge

WORLD = MPI.COMM_WORLD


def rows(salt: float = 0.0) -> Dataset:
    x, y = np.arange(80.0).reshape(40, 2) + salt, np.arange(40) % 2
    return Dataset.from_arrays(x, y, x[:8], y[:8])


def run(path: Path, flags: str = "", data: Dataset | None = None) -> dict[str, Any]:
    length = "" if "--epochs" in flags else "--steps 2"
    config = parse(f"--out {path} --hidden 4 --quiet {length} {flags}".split())
    return train(config, MPI.COMM_SELF, data=data or rows())


def result(path: Path) -> dict[str, Any]:
    return json.loads((path / "result.json").read_text())


@pytest.fixture
def done(tmp_path: Path) -> Path:
    """A run that is done."""
    run(tmp_path / "run")
    assert result(tmp_path / "run")["status"] == "done"
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("flags", "salt", "kind"),
    [
        ("--resume --steps 3", 1.0, DataError),
        ("--resume --steps 3 --batch 7", 0.0, ConfigError),
        ("--resume --steps 3 --pipe 2", 0.0, ConfigError),
        ("--resume --steps 3 --trace X/config.toml", 0.0, ConfigError),
    ],
)
def test_job_that_is_refused_leaves_no_result_of_the_last(done: Path, flags: str, salt: float, kind: type) -> None:
    with pytest.raises(kind) as caught:
        run(done, flags.replace("X", str(done)), rows(salt))
    told = result(done)
    assert (told["status"], told["exit_code"]) == ("failed", caught.value.exit_code)
    assert told["reason"] == str(caught.value)
    assert run(done, "--resume --steps 3")["status"] == "done"


def test_job_that_cannot_write_leaves_no_result_of_the_last(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes | str) -> None:
        raise OutputError(f"cannot write {path}: no space left on device")

    monkeypatch.setattr(directory, "write_atomically", full)
    monkeypatch.setattr("mpiml.training.hold.write_atomically", full)
    with pytest.raises(OutputError):
        run(done, "--resume --steps 3")
    assert (result(done)["status"], result(done)["exit_code"]) == ("failed", 74)


@pytest.mark.parametrize("more", ["--steps 3", "--epochs 9"])
def test_job_says_that_it_is_running_before_it_reads_the_data(done: Path, more: str) -> None:
    class Looking(Dataset):
        @property
        def fingerprint(self) -> Any:
            seen.append(result(done)["status"])
            return super().fingerprint

    seen: list[str] = []
    data = rows()
    run(done, f"--resume {more}", Looking(data.train, data.test, data.name))
    assert seen[0] == "running"


@pytest.mark.parametrize("flags", ["--resume", "--resume --epochs 1"])
def test_run_that_is_done_keeps_its_result(done: Path, flags: str) -> None:
    before = (done / "result.json").read_text()
    config = parse(f"--out {done} {flags} --quiet".split())
    assert train(config, MPI.COMM_SELF, data=rows()) == json.loads(before)
    assert (done / "result.json").read_text() == before


@pytest.mark.parametrize("flags", ["--lr 0.5", "--decay-steps 9", "--lr-floor 0.0001 --epochs 1"])
def test_another_learning_rate_of_a_run_that_is_done_is_refused(tmp_path: Path, flags: str) -> None:
    """It is not left out without a word."""
    run(tmp_path / "run", "--decay linear")
    with pytest.raises(ConfigError, match=rf"^{flags.split()[0]} .*: the run in {tmp_path}/run has "):
        run(tmp_path / "run", f"--resume {flags}")
    assert run(tmp_path / "run", "--resume --lr 0.001 --decay-steps 2")["status"] == "done"  # as it has been


def test_directory_in_use_is_refused_before_the_data_are_read(done: Path) -> None:
    held = directory.RunDirectory(str(done))
    try:
        with pytest.raises(DirectoryError, match="in use by another job"):
            run(done, "--resume --steps 3", rows(1.0))
    finally:
        held.close()
    assert result(done)["status"] == "done"


def not_finite(path: Path) -> None:
    data = Dataset.from_arrays(*(np.full((9, 2), 1e30), np.full(9, 1e30)) * 2)
    run(path / f"n{len(list(path.iterdir()))}", "--optimizer sgd --prefetch 2", data)


def taken(path: Path) -> None:
    run(path / "run", "--steps 5")


def refused(path: Path) -> None:
    run(path / "run", "--steps 5 --resume --batch 9")


def bad_data(path: Path) -> None:
    run(path / "bad", "", Dataset.from_arrays(*(np.full((9, 2), np.nan), np.arange(9) % 2) * 2))


def unwritable(path: Path) -> None:
    (path / "odd").mkdir(exist_ok=True)
    (path / "odd" / "checkpoints").touch()
    run(path / "odd")


def not_scored(path: Path) -> None:
    x, y = np.arange(80.0).reshape(40, 2), np.arange(40) % 2
    evaluate(str(path / "run"), data=Dataset.from_arrays(x, y, x[:8] * np.nan, y[:8]), comm=MPI.COMM_SELF)


@pytest.mark.parametrize("fails", [not_finite, taken, refused, bad_data, unwritable, not_scored])
def test_runs_that_fail_leave_nothing_behind(done: Path, fails: Callable[[Path], None]) -> None:
    def tried(times: int) -> tuple[set[str], int, int]:
        """What there is after so many runs: descriptors, threads, and how many communicators can still be made."""
        for _ in range(times):
            with contextlib.suppress(RunError):
                fails(done.parent)
                pytest.fail("it should have failed")
        gc.collect()
        return set(os.listdir("/proc/self/fd")), threading.active_count(), communicators()

    descriptors, threads, free = tried(2)
    *_, free_later = tried(5)
    assert free_later >= free
    # Threads may take a moment to end; what earlier tests have left may go meanwhile.
    assert eventually(lambda: threading.active_count() <= threads)
    assert eventually(lambda: set(os.listdir("/proc/self/fd")) <= descriptors)


def communicators() -> int:
    """How many the library has left: MPICH some 2000, others more than we count."""
    made: list[MPI.Comm] = []
    with contextlib.suppress(MPI.Exception):
        while len(made) < 3000:
            made.append(MPI.COMM_SELF.Dup())
    for comm in made:
        comm.Free()
    return len(made)


@pytest.mark.mpi
@pytest.mark.skipif(WORLD.size < 2, reason="somebody has to wait")
def test_rank_0_waits_where_nobody_takes_it_for_stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For another rank that is slow to describe its environment."""
    begun, of_rank, waited = Hold.begun, environment.of_rank, list[float]()

    def slow(threads: int, device: str) -> dict[str, Any]:
        if WORLD.rank == 1:
            time.sleep(0.5)
        return of_rank(threads, device)

    def timed(self: Hold, of: Run, after: int) -> list[str]:
        clock = of.grid.team.clock
        before = clock.seconds.get("joining", 0.0)
        notes = begun(self, of, after)
        waited.append(clock.seconds["joining"] - before)
        return notes

    monkeypatch.setattr(environment, "of_rank", slow)
    monkeypatch.setattr(Hold, "begun", timed)
    train(parse(f"--out {WORLD.bcast(str(tmp_path / 'run'))} --hidden 4 --quiet --steps 1".split()), WORLD, data=rows())
    assert WORLD.rank or waited[0] > 0.3


@pytest.mark.parametrize(
    ("result", "gone"),
    [
        ({"status": "running", "step": 50, "saved": 50}, True),
        ({"status": "done", "step": 99, "saved": 99}, True),
        ({"status": "failed", "step": 50, "saved": 50}, True),  # a job that went on, and was refused
        ({"status": "failed", "step": 99, "saved": 0}, False),  # before its first save
        ({"status": "stopped", "step": 0, "saved": 0}, False),  # before its first step
        ({}, False),
    ],
)
def test_a_run_whose_checkpoints_are_gone_does_not_start_anew(tmp_path: Path, result: Any, gone: bool) -> None:
    (tmp_path / "checkpoints").mkdir()
    if gone:
        step = result["saved"]
        with pytest.raises(OutputError, match=rf"are gone, of which the last was of step {step}: put them back"):
            _check_nothing_vanished(tmp_path, result)
        (tmp_path / "checkpoints" / "step-000000050.safetensors").write_text("")
    _check_nothing_vanished(tmp_path, result)


def test_a_run_without_config_toml_takes_settings_from_its_checkpoint_and_code_from_flags(tmp_path: Path) -> None:
    config = 'model = "my:net"\nloss = "my:loss"\nbatch = 7\nhidden = []\n'
    forge(tmp_path / "checkpoints" / step_files.file_name(6), config)
    asked = parse(["--resume", "--out", str(tmp_path)])
    with pytest.raises(ConfigError, match=r"names code, .*: repeat --model my:net --loss my:loss$"):
        settings(asked)
    named = parse(["--resume", "--out", str(tmp_path), "--model", "my:net", "--loss", "my:loss"])
    going_on, stored = settings(named)
    assert stored is not None
    assert (going_on.model, going_on.batch, stored.batch) == ("my:net", 7, 7)
    (tmp_path / "config.toml").write_text(config)  # which the user points at
    assert settings(asked)[0].loss == "my:loss"


def test_a_damaged_config_of_a_run_is_one_line(tmp_path: Path) -> None:
    asked = parse(["--resume", "--out", str(tmp_path)])
    for text in ("]]]", "a = " + "[" * 100_000):
        (tmp_path / "config.toml").write_text(text)
        with pytest.raises(OutputError, match=rf"^{tmp_path}/config.toml is damaged: "):
            settings(asked)
    for text in ("nonsense = 1", "batch = 0", 'batch = "x"'):
        (tmp_path / "config.toml").write_text(text)
        with pytest.raises(ConfigError, match=rf"^{tmp_path}/config.toml: "):
            settings(asked)


def test_a_done_result_needs_no_more(tmp_path: Path) -> None:
    config = Config(resume=True, out=str(tmp_path), steps=8, quiet=True)
    assert _finished(config, {}) is None
    for text, done in (('{"status": "done", "step": 8}', True), ('{"status": "done"}', False)):
        assert bool(_finished(config, json.loads(text))) is done
    assert (_finished(config, {"status": "done", "step": 9, "exit_code": None}) or {})["exit_code"] == 0
