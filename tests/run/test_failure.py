"""A failure is written down and said, each by itself, and in time, whatever hangs or cannot be written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpiml.clock import Clock
from mpiml.errors import DataError, RunError, StallError
from mpiml.run import directory, failure
from mpiml.run.directory import FAILED, RESULT
from mpiml.run.failure import Guard
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


def test_a_reason_without_its_traceback_is_better_than_half_of_both(run: Path) -> None:
    """The disk is full: the file has the block that it has, and may not become longer."""
    script = f"""
import resource
from pathlib import Path
from mpiml.run.result import update_result
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
update_result(Path({str(run)!r}), {{"status": "failed", "reason": "the loss", "traceback": "x" * 8000}})
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_result(run) == {"status": "failed", "ranks": 1, "reason": "the loss"}


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
