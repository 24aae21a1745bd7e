"""One job at a time holds a run directory: with the kernel's locks, without them, and when the lock file is removed."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpiml.errors import DirectoryError, OutputError
from mpiml.run import lock
from mpiml.run.lock import Lock, Owner, check

HOLD = (
    "import sys, pathlib, mpiml.run.lock as l; held = l.Lock(pathlib.Path(sys.argv[1])); print(held.token, flush=True)"
)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the directory."""
    command = [sys.executable, "-c", f"{HOLD}; input()", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline().strip()
        yield process
        process.kill()


@pytest.fixture
def no_locks(monkeypatch: Any) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_second_job_is_refused_though_the_lock_file_is_removed(tmp_path: Path, other: Any) -> None:
    for _ in range(2):
        with pytest.raises(DirectoryError, match="in use by another job"):
            Lock(tmp_path)
        (tmp_path / ".lock").unlink()
    other.kill()
    other.wait()
    Lock(tmp_path).release()


def test_without_locks_a_living_process_keeps_its_directory(tmp_path: Path, other: Any, no_locks: None) -> None:
    with pytest.raises(DirectoryError, match="in use by another job"):
        Lock(tmp_path)
    other.send_signal(signal.SIGKILL)
    other.wait()
    mine = Lock(tmp_path)
    assert not mine.kernel_locks
    check(tmp_path, mine.token)
    mine.release()
    assert (tmp_path / ".lock").read_bytes() == b""


@pytest.mark.parametrize("how", ["another machine", "an earlier boot", "a number that is another's now"])
def test_who_cannot_be_seen_loses_the_directory_and_notices(tmp_path: Path, no_locks: None, how: str) -> None:
    theirs = Lock(tmp_path)
    me = Owner.this_process(theirs.token)
    changed = {"another machine": {"kernel": "k2", "host": "n2"}, "an earlier boot": {"kernel": "k2"}}
    seen = Owner(**(vars(me) | changed.get(how, {"started": "1"})))
    (tmp_path / ".lock").write_bytes(seen.line())
    mine = Lock(tmp_path)
    with pytest.raises(
        DirectoryError, match=rf"taken over by another job \(process {os.getpid()} on .*\): nothing more"
    ):
        check(tmp_path, theirs.token)
    theirs.release()
    check(tmp_path, mine.token)


def test_a_lock_file_that_was_removed_is_written_again(tmp_path: Path) -> None:
    mine = Lock(tmp_path)
    (tmp_path / ".lock").unlink()
    check(tmp_path, mine.token)
    owner = Owner.parse((tmp_path / ".lock").read_bytes())
    assert owner == Owner.this_process(mine.token)
    mine.release()
    Lock(tmp_path).release()  # the same process may come again


def test_a_lock_file_of_another_program_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("theirs\n")
    mine = Lock(tmp_path)
    check(tmp_path, mine.token)
    mine.release()
    assert (tmp_path / ".lock").read_text() == "theirs\n"


def test_a_refused_or_released_lock_leaves_nothing_open(tmp_path: Path, other: Any) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(DirectoryError):
        Lock(tmp_path)
    other.kill()
    other.wait()
    Lock(tmp_path).release()
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("call", range(1, 11))
def test_a_lock_that_cannot_be_had_leaves_nothing(tmp_path: Path, monkeypatch: Any, call: int) -> None:
    """Whichever call to the system fails: nothing stays open, and the next one gets the lock."""
    before, calls = set(os.listdir("/proc/self/fd")), list[str]()

    def failing(name: str) -> Any:
        real = getattr(os, name)

        def called(*arguments: Any) -> Any:
            result = real(*arguments) if name == "close" else None
            calls.append(name)
            if len(calls) == call:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return result if name == "close" else real(*arguments)

        return called

    for name in ("open", "read", "pwrite", "ftruncate", "close"):
        monkeypatch.setattr(os, name, failing(name))
    with pytest.raises(OutputError, match=r"cannot open the run directory .*: Input/output error"):
        Lock(tmp_path)
    monkeypatch.undo()
    assert set(os.listdir("/proc/self/fd")) == before
    Lock(tmp_path).release()


def test_a_process_that_has_ended_is_not_alive(tmp_path: Path) -> None:
    """Nor one that nobody has waited for yet."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    me = Owner.this_process("t")
    alive = Owner(**(vars(me) | {"pid": str(child.pid), "started": lock._started(str(child.pid))}))
    assert alive.lives()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not alive.lives()
    child.wait()
    assert not alive.lives()
