"""The guard around a program of one's own: what it writes, how it ends, and what it refuses."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.config import Config
from mpiml.errors import ConfigError, NotFiniteError, OutputError
from mpiml.loop.checkpoints import Checkpoints
from mpiml.loop.guard import clock, guard
from mpiml.loop.rows import Rows
from mpiml.loop.sums import Sum
from mpiml.run import alarm
from mpiml.run.deadline import SLOWEST_DISK
from mpiml.run.directory import RunDirectory
from mpiml.run.process import SIGNALS, action_of
from mpiml.run.result import read_result
from mpiml.train import train
from tests.conftest import eventually

WORLD = MPI.COMM_WORLD
FAST = 5.0  # seconds of stall_timeout: the alarm is on for moments only


def leave(error: BaseException, **settings: Any) -> int:
    """The exit code of a guard whose block raises an error on all ranks alike."""
    with pytest.raises(SystemExit) as left, guard(**settings):
        raise error
    return left.value.code  # type: ignore[return-value]


def refused(capsys: pytest.CaptureFixture[str], **settings: Any) -> str:
    """The line that a guard prints which cannot be entered."""
    with pytest.raises(SystemExit) as left, guard(**settings):
        raise AssertionError("it has been entered")
    (line,) = capsys.readouterr().err.splitlines()
    return f"{left.value.code} {line.partition(': ')[2]}"


def test_a_block_that_ends_well_is_done(tmp_path: Path) -> None:
    threads = threading.active_count()
    with guard(out=tmp_path / "new" / "one", stall_timeout=FAST) as job:
        assert read_result(tmp_path / "new" / "one")["status"] == "running"
        assert clock() is job.clock
        Rows(8, 4, 2).mine(3)
    assert clock() is not job.clock
    done = {"status": "done", "exit_code": 0, "reason": None, "rank": None, "ranks": 1, "step": 3}
    assert read_result(tmp_path / "new" / "one") == done
    assert eventually(lambda: threading.active_count() <= threads)


def test_of_an_error_there_is_a_line_a_traceback_and_a_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert leave(KeyError("weight"), out=tmp_path) == 70
    result = read_result(tmp_path)
    assert (result["status"], result["exit_code"], result["rank"]) == ("failed", 70, 0)
    assert result["reason"] == "KeyError: 'weight'"
    assert capsys.readouterr().err.count("Traceback") == 1
    with guard(out=tmp_path):  # the next job of the same program
        pass
    assert "traceback" not in read_result(tmp_path)
    assert read_result(tmp_path)["reason"] is None


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 78),
        (OutputError("x"), 74),
        (NotFiniteError("x"), 70),
        (SystemExit(0), 70),
        (KeyboardInterrupt(), 70),
    ],
)
def test_every_error_has_its_exit_code(error: BaseException, code: int) -> None:
    assert leave(error) == code


def test_what_is_to_be_done_at_the_end_is_not_done_after_an_error() -> None:
    calls: list[int] = []
    with guard() as job:
        job.at_end += [lambda: calls.append(1), lambda: calls.append(2)]
        assert calls == []
    assert calls == [1, 2]
    job = guard()
    with pytest.raises(SystemExit), job:
        raise NotFiniteError(str(job.at_end.append(lambda: calls.append(3)))).on_all_ranks()
    assert calls == [1, 2]


def test_what_is_caught_inside_does_not_leave(tmp_path: Path) -> None:
    with guard(out=tmp_path), pytest.raises(NotFiniteError):
        raise NotFiniteError("caught")
    assert read_result(tmp_path)["status"] == "done"


@pytest.mark.parametrize("stall_timeout", [-1, float("nan"), float("inf"), "long", None])
def test_a_time_that_is_none_is_refused(capsys: pytest.CaptureFixture[str], stall_timeout: Any) -> None:
    said = refused(capsys, stall_timeout=stall_timeout)
    assert said == f"78 stall_timeout {stall_timeout!r}: must be a number of seconds, 0 or more"


def test_other_settings_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, time_limit="soon").startswith("78 time_limit soon")
    assert refused(capsys, time_limit=60).startswith("78 time_limit 60: must be a text")
    for out in (3, "a\0b", ""):
        assert refused(capsys, out=out) == f"78 out {out!r}: must be a path"
    for one in (guard, Rows, Sum):
        with pytest.raises(ConfigError, match="comm is a str: must be a communicator"):
            one(comm="world", **({"count": 9, "batch": 3} if one is Rows else {}))
    (tmp_path / "file").touch()
    assert refused(capsys, out=tmp_path / "file").startswith(f"74 cannot create the run directory {tmp_path}/file")
    (tmp_path / "config.toml").touch()
    assert refused(capsys, out=tmp_path) == f"73 {tmp_path} holds a run of mpiml.train: choose another directory"
    assert not (tmp_path / "result.json").exists()


def test_a_directory_that_another_job_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = RunDirectory(str(tmp_path))
    assert refused(capsys, out=tmp_path) == f"73 {tmp_path} is in use by another job that is still running"
    held.close()
    with guard(out=tmp_path):
        pass


@pytest.mark.mpi
def test_a_guard_is_entered_once(capsys: pytest.CaptureFixture[str]) -> None:
    job = guard()
    with job, pytest.raises(ConfigError, match="make another one"), job:
        raise AssertionError("it has been entered")
    assert len(capsys.readouterr().err.splitlines()) == (WORLD.rank == 0)
    with pytest.raises(SystemExit) as left, job:
        raise AssertionError("it has been entered")
    assert left.value.code == 78
    said = capsys.readouterr().err
    assert said.partition(": ")[2] == "this guard has been entered before: make another one\n" * (WORLD.rank == 0)
    WORLD.Barrier()


def test_guards_one_after_the_other() -> None:
    for _ in range(2200):  # communicators are given back: MPICH has 2,048
        with guard(stall_timeout=0):
            pass


def test_a_guard_within_another_reports_to_the_same_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), guard(out=tmp_path) as outer:  # noqa: PT012
        with guard() as inner:
            assert clock() is inner.clock
        assert clock() is outer.clock
        with guard():
            raise KeyError("inside")
    assert read_result(tmp_path)["reason"] == "KeyError: 'inside'"
    assert capsys.readouterr().err.count("Traceback") == 1


def test_train_within_a_guard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its watch judges then, and afterwards no alarm is left that would end a program which goes on."""
    with guard(out=tmp_path / "mine", stall_timeout=FAST):
        train(Config(steps=2, quiet=True, out=str(tmp_path / "run")))
        assert not alarm.off()
    with pytest.raises(SystemExit), guard(out=tmp_path / "mine"):
        train(Config(steps=2, quiet=True, optimizer="none", out=str(tmp_path / "other")))
    assert "optimizer" in read_result(tmp_path / "mine")["reason"]
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not alarm.off()
    assert [read_result(tmp_path / name)["status"] for name in ("mine", "run")] == ["failed", "done"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_signals_are_requests_from_the_first_time_on_that_stop_is_asked(tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    with guard(out=tmp_path) as job:
        assert signal.getsignal(number) is before or number == signal.SIGUSR1
        assert not job.stop
        assert job.exit_code == 0
        os.kill(os.getpid(), number)
        assert job.stop
        assert job.stop
    assert signal.getsignal(number) is before
    assert job.exit_code == 75
    result = read_result(tmp_path)
    assert (result["status"], result["exit_code"]) == ("stopped", 75)
    assert result["reason"] == "asked to stop by a signal"


def handler_in_c(number: int) -> bytes:
    return bytes(action_of(number))[:8]  # a pointer; on Linux it comes first


def test_sigusr1_is_remembered_from_the_beginning_and_afterwards_c_has_its_handlers_again() -> None:
    before = [handler_in_c(number) for number in SIGNALS]
    with guard() as job:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert [handler_in_c(number) for number in SIGNALS[1:]] == before[1:]
        assert job.stop
        assert [handler_in_c(number) for number in SIGNALS] != before
    assert [handler_in_c(number) for number in SIGNALS] == before
    with guard() as outer:
        with guard():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert outer.stop
    with pytest.raises(SystemExit), guard(time_limit="soon"):
        pass
    assert [handler_in_c(number) for number in SIGNALS] == before


def test_a_handler_of_the_programs_own_stays_until_stop_is_asked() -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: calls.append(number))
    try:
        with guard() as job:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert calls == [signal.SIGUSR1]
            assert not job.stop
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # set inside, it stays
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_time_that_is_nearly_up_is_a_request() -> None:
    with guard(time_limit="1") as job:
        job.stop  # noqa: B018 (the first step begins)
        job._stop.deadline.end = time.monotonic()  # type: ignore[union-attr]
        assert job.stop


def test_before_the_time_is_up_enough_is_left_for_a_save_as_long_as_the_longest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, MPI.COMM_SELF)
    with guard(MPI.COMM_SELF, time_limit="10") as outer, guard(MPI.COMM_SELF, time_limit="10") as inner:
        assert not outer.stop
        checkpoints.save(1, {"w": SlowArray()})
        for job in (outer, inner):
            assert job._stop
            job._stop.deadline.end = time.monotonic() + 1.5 * SlowArray.SECONDS
            assert job.stop
    with guard(MPI.COMM_SELF, time_limit="10") as job:
        assert not job.stop
        assert job._stop
        job._stop.deadline.end = time.monotonic() + 60
        assert not job.stop
        checkpoints.save(2, {"w": np.zeros(1 << 20)})
        checkpoints.newest()
        job._stop.deadline._save = 0.0  # as in a job that has read a checkpoint and has not saved one yet
        job._stop.deadline.end = time.monotonic() + (1 << 20) * 8 / SLOWEST_DISK
        assert job.stop


def test_alive_is_a_sign_of_life_or_a_block_of_them() -> None:
    with guard() as job:
        moves = job.clock.moves
        job.alive("a file")
        assert job.clock.moves > moves
        assert not job.clock.patient
        with job.alive("evaluation"):
            with job.alive("its first part"):
                assert job.clock.patient == "its first part"
            assert job.clock.patient == "evaluation"
        with pytest.raises(KeyError), job.alive("a block that fails"):
            raise KeyError
        assert not job.clock.patient


class SlowArray:
    """Takes a while to be written."""

    SECONDS = 0.2

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        time.sleep(self.SECONDS)
        return np.zeros(3)


def stalled(work: Callable[[guard], object]) -> bool:
    """Whether the watch of a guard takes this for a stall of 0.5 s."""
    job = guard(stall_timeout=0.5)
    reports: list[BaseException] = []
    job._failure.fail = reports.append  # type: ignore[method-assign, assignment]
    with job:
        work(job)
    return bool(reports)


def test_work_of_ones_own_is_no_stall_if_it_is_said_to_be_alive() -> None:
    assert stalled(lambda job: time.sleep(1.2))

    def patient(job: guard) -> None:
        with job.alive("sleeping"):
            time.sleep(1.2)

    assert not stalled(patient)
    assert not stalled(lambda job: [(job.alive("a nap"), time.sleep(0.05)) for _ in range(12)])


@pytest.mark.mpi
def test_any_rank_may_be_asked_to_stop() -> None:
    with guard() as job:
        assert not job.stop
        if WORLD.rank == WORLD.size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert job.stop
    assert WORLD.allgather(job.exit_code) == [75] * WORLD.size


@pytest.mark.mpi
def test_an_error_of_all_ranks_leaves_all_with_its_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = WORLD.bcast(tmp_path)
    out = path if WORLD.rank == 0 else tmp_path / "of-no-account"
    assert leave(ConfigError("all alike").on_all_ranks(), out=out) == 78
    WORLD.Barrier()
    assert read_result(path)["reason"] == "all alike"
    assert len(capsys.readouterr().err.splitlines()) == (WORLD.rank == 0)
    WORLD.Barrier()


@pytest.mark.mpi
@pytest.mark.skipif(WORLD.size == 1, reason="ranks must differ")
def test_ranks_that_differ_in_a_setting_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for settings, words in (
        ({"stall_timeout": FAST + WORLD.rank}, "stall_timeout: 6.0 (rank 1 on"),
        ({"time_limit": None if WORLD.rank == 0 else "90:00"}, "time_limit: 90:00 (rank 1 on"),
    ):
        with pytest.raises(SystemExit), guard(**settings):  # type: ignore[arg-type]
            raise AssertionError("it has been entered")
        assert (f"ranks differ in {words}" in capsys.readouterr().err) == (WORLD.rank == 0)


@pytest.mark.mpi
def test_on_a_part_of_the_ranks() -> None:
    comm = WORLD.Split(WORLD.rank % 2, WORLD.rank)
    with guard(comm) as job:
        assert (job.team.size, job.team.name, job.stop) == (comm.size, WORLD.rank, False)
        with guard(WORLD) as both:
            assert both.team.size == WORLD.size
    comm.Free()
