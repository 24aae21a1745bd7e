"""A failure is written down and said, each by itself, and in time, whatever hangs or cannot be written."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpiml.clock import Clock
from mpiml.errors import ConfigError, DataError, DirectoryError, NotFiniteError, OutputError, RunError, StallError
from mpiml.run import alarm, directory, failure
from mpiml.run.directory import FAILED, RESULT
from mpiml.run.failure import ABORT_GRACE, Guard, describe, exit_code
from mpiml.run.lock import LOCK, Owner
from mpiml.run.result import read_result, write_result
from mpiml.team import Team


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A directory in which a job is running."""
    write_result(tmp_path, {"status": "running", "ranks": 1})
    return tmp_path


def guard(path: Path) -> Guard:
    made = Guard(Team(MPI.COMM_SELF, Clock()), "a.program")
    made.run, made.token = path, "here"
    return made


def fails(path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), guard(path):
        raise error


class Closed:
    """Standard error as it is on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "no space left")


@pytest.mark.parametrize("stream", [None, Closed()])
def test_reason_is_written_where_it_cannot_be_said(run: Path, monkeypatch: pytest.MonkeyPatch, stream: Any) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    fails(run, DataError("row 3 is bad"))
    result = read_result(run)
    assert (result["status"], result["exit_code"], result["reason"]) == ("failed", 65, "row 3 is bad")
    assert result["ranks"] == 1


def test_reason_is_said_where_the_file_system_does_not_answer(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(failure, "WRITING", 0.2)
    monkeypatch.setattr(os, "fsync", lambda descriptor: time.sleep(30))
    began = time.monotonic()
    fails(run, StallError("rank 2 has made no progress"))
    assert time.monotonic() - began < 10
    assert capsys.readouterr().err.splitlines() == [
        "a.program: rank 2 has made no progress",
        "a.program: and result.json could not be written: its file system does not answer",
    ]


def test_reason_is_written_where_there_is_no_room_for_a_second_file(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(directory.os, "replace", full)
    fails(run, RunError("short"))
    assert read_result(run)["reason"] == "short"
    assert {path.name for path in run.iterdir()} == {LOCK, RESULT}


def test_the_result_of_a_job_that_has_taken_the_directory_stays(run: Path) -> None:
    (run / LOCK).write_bytes(Owner("another", "node7", "k2", "17", "18").line())
    fails(run, RunError("mine"))
    assert read_result(run) == {"status": "running", "ranks": 1}


def test_error_that_cannot_be_shown_is_reported_all_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class UnspeakableError(Exception):
        def __str__(self) -> str:
            raise ValueError("no")

    fails(run, UnspeakableError())
    assert read_result(run)["reason"].startswith("UnspeakableError: (its message cannot be shown")
    assert "UnspeakableError" in capsys.readouterr().err


def test_rank_that_fails_second_waits_until_the_first_has_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end ends the job, and with it the first one's writing."""
    (run / f"{FAILED}here").touch()
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 5:
            write_result(run, {"status": "failed", "reason": "the first one's"})

    monkeypatch.setattr(failure.time, "sleep", sleep)
    assert guard(run)._write({"status": "failed", "reason": "the second one's"}, alone=True) is None
    assert len(waits) == 5
    assert read_result(run)["reason"] == "the first one's"


def test_rank_that_fails_second_writes_if_the_first_never_does(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / f"{FAILED}here").touch()
    monkeypatch.setattr(failure.time, "sleep", lambda seconds: None)
    assert guard(run)._write({"status": "failed", "reason": "the second one's"}, alone=True) == ""
    assert read_result(run)["reason"] == "the second one's"


@pytest.mark.parametrize(
    ("error", "reason", "code"),
    [
        (ConfigError("no such model"), "no such model", 78),
        (DataError("row 3 is bad"), "row 3 is bad", 65),
        (NotFiniteError("the loss is not finite"), "the loss is not finite", 70),
        (OutputError("the disk is full"), "the disk is full", 74),
        (DirectoryError("another has it"), "another has it", 73),
        (StallError("rank 2 hangs"), "rank 2 hangs", 70),
        (KeyError("weight"), "KeyError: 'weight'", 70),
        (ValueError("one\ntwo"), "ValueError: one", 70),
        (KeyboardInterrupt(), "interrupted", 70),
        (SystemExit(0), "sys.exit(0) in the middle of the run", 70),
        (SystemExit("bye"), "sys.exit('bye') in the middle of the run", 70),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_error_is_a_line_and_an_exit_code(error: BaseException, reason: str, code: int) -> None:
    assert (describe(error), exit_code(error)) == (reason, code)


def test_an_error_of_mpi_says_that_a_rank_may_be_gone() -> None:
    error = MPI.Exception(MPI.ERR_TRUNCATE)
    assert describe(error).startswith("an MPI call failed; another rank may have been killed (")
    assert "\n" not in describe(error)
    assert exit_code(error) == 70


def test_what_is_written_of_an_error_that_a_person_can_mend(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = guard(run)
    made.clock.step = 7
    with pytest.raises(DataError), made:
        raise DataError("row 3 is bad")
    assert read_result(run) == {
        "status": "failed", "ranks": 1, "exit_code": 65, "reason": "row 3 is bad", "rank": 0, "step": 7,
    }  # fmt: skip
    assert capsys.readouterr() == ("", "a.program: row 3 is bad\n")


def test_of_any_other_error_there_is_a_traceback(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(run, KeyError("weight"))
    result = read_result(run)
    assert result["traceback"].startswith("Traceback (most recent call last)")
    assert __file__ in result["traceback"]
    assert "step" not in result  # it has not begun
    assert capsys.readouterr().err == f"a.program: KeyError: 'weight'\n{result['traceback']}"


def test_an_interruption_has_none(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(run, KeyboardInterrupt())
    assert "traceback" not in read_result(run)
    assert capsys.readouterr().err == "a.program: interrupted\n"


@pytest.mark.parametrize("rank", [2, None])
def test_whom_an_error_blames_is_written_down(run: Path, rank: int | None) -> None:
    error = StallError("rank 2 has made no progress" if rank else "all ranks wait for each other")
    error.rank = rank
    fails(run, error)
    assert read_result(run)["rank"] == rank


def test_what_another_process_says_is_not_said_twice(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = ConfigError("4 processes were started")
    error.everywhere = error.silent = True
    fails(run, error)
    assert read_result(run) == {"status": "running", "ranks": 1}
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("gone", [False, True])
def test_without_a_run_directory_the_reason_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gone: bool
) -> None:
    made = guard(tmp_path / "gone")
    if not gone:
        made.run = None
    with pytest.raises(DataError), made:
        raise DataError("row 3 is bad")
    assert capsys.readouterr().err == "a.program: row 3 is bad\n"
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_another_jobs_stays_as_it_is(run: Path) -> None:
    fails(run, DirectoryError(f"{run} is in use"))
    assert read_result(run) == {"status": "running", "ranks": 1}
    assert [path.name for path in run.iterdir()] == [RESULT]


def test_a_result_that_cannot_be_written_is_said_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / RESULT).mkdir()
    fails(tmp_path, DataError("row 3 is bad"))
    first, second = capsys.readouterr().err.splitlines()
    assert first == "a.program: row 3 is bad"
    assert (
        second == f"a.program: and result.json could not be written: cannot write {tmp_path / RESULT}: Is a directory"
    )


def test_a_block_that_ends_well_leaves_nothing_behind(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = threading.excepthook
    with guard(run) as made:
        assert threading.excepthook == made._thread_failed
    assert threading.excepthook is before
    assert read_result(run) == {"status": "running", "ranks": 1}
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """What would end this process, in order: timers in C, by their seconds, and the job's end, by its exit code."""
    calls: list[tuple[str, float]] = []
    monkeypatch.setattr(alarm, "end_for_certain", lambda seconds: calls.append(("timer", seconds)))
    monkeypatch.setattr(failure, "end_job", lambda code: calls.append(("job", code)))
    return calls


def test_an_error_in_a_thread_ends_the_job(
    run: Path, ends: list[tuple[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    def read() -> None:
        raise OutputError("the disk is gone")

    with guard(run):
        thread = threading.Thread(target=read, name="a-reader")
        thread.start()
        thread.join()
    assert ends == [("timer", ABORT_GRACE), ("job", 74)]
    assert read_result(run)["reason"] == "the disk is gone"
    assert "the disk is gone" in capsys.readouterr().err


def test_which_thread_it_was_is_in_the_traceback(run: Path, ends: list[tuple[str, float]]) -> None:
    with guard(run):
        thread = threading.Thread(target=lambda: {}["weight"], name="a-reader")
        thread.start()
        thread.join()
    assert read_result(run)["traceback"].splitlines()[-1] == "in a-reader"
    assert ends[-1] == ("job", 70)


def test_a_job_ends_though_its_reason_cannot_be_reported(
    run: Path, ends: list[tuple[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = guard(run)
    monkeypatch.setattr(made, "_report", lambda error: 1 / 0)
    made.fail(DataError("row 3 is bad"))
    assert ends == [("timer", ABORT_GRACE), ("job", 65)]


def test_who_fails_second_says_nothing_if_the_first_has_written(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(failure, "SAYING", 0.01)
    made = guard(run)
    monkeypatch.setattr(made, "_write", lambda outcome, alone: None)
    made._report(DataError("row 3 is bad"))
    assert capsys.readouterr() == ("", "")


def test_first_is_who_makes_the_file(run: Path) -> None:
    assert [guard(run)._is_first() for _ in range(3)] == [True, False, False]
    other = guard(run)
    other.token = "later"  # another job's file does not count
    assert other._is_first()
    assert guard(run / "gone")._is_first()  # where nothing can be written, better twice than not at all


WORLD = MPI.COMM_WORLD
LAST = WORLD.size - 1


def of_world(path: Path) -> Guard:
    made = guard(Path(WORLD.bcast(str(path))))
    made.team, made.comm = Team(WORLD, made.clock), WORLD
    made.clock.step = 3
    made.clock("data")
    return made


@pytest.mark.mpi
def test_an_error_of_one_rank_ends_the_job_and_says_where_it_was(
    run: Path, ends: list[tuple[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    made = of_world(run)
    assert made.run
    if WORLD.rank == LAST:
        with pytest.raises(DataError), made:
            raise DataError("row 3 is bad")
    WORLD.Barrier()
    alone = WORLD.size == 1  # then nobody waits
    assert ends == ([("timer", ABORT_GRACE), ("job", 65)] if WORLD.rank == LAST and not alone else [])
    where = "" if alone else f" (rank {LAST}, step 3, data)"
    assert capsys.readouterr().err == (f"a.program: row 3 is bad{where}\n" if WORLD.rank == LAST else "")
    assert (read_result(made.run)["rank"], read_result(made.run)["step"]) == (LAST, 3)


@pytest.mark.mpi
def test_an_error_of_all_ranks_is_reported_by_rank_0_and_passes(
    run: Path, ends: list[tuple[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    made = of_world(run)
    error = NotFiniteError("the loss is not finite")
    error.everywhere, error.rank = True, LAST
    with pytest.raises(NotFiniteError), made:
        raise error
    WORLD.Barrier()
    assert not ends
    assert capsys.readouterr().err == (f"a.program: {error}\n" if WORLD.rank == 0 else "")
    assert made.run
    assert read_result(made.run)["rank"] == LAST
