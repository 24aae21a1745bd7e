"""Processes that ranks start: they are no ranks, whether they are forked or begin anew."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mpiml.loop.guard import guard
from tests.conftest import launch

PROGRAM = r"""
import multiprocessing
from mpiml.api import Rows, guard


def ask(kind):
    try:
        return Rows(8, 4).own
    except Exception as error:
        return f"{kind}: {error}"


if __name__ == "__main__":
    with guard():
        for kind in ("spawn", "forkserver"):
            with multiprocessing.get_context(kind).Pool(1) as pool:
                print(f"{pool.apply(ask, [kind])}\n", end="", flush=True)
        print(f"{ask('rank')}\n", end="", flush=True)
"""


@pytest.mark.contract
def test_workers_that_import_the_program_start_no_mpi(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = launch(2, str(tmp_path / "program.py"), limit=60)
    assert done.returncode == 0, done.stderr
    *refused, first, second = sorted(done.stdout.splitlines(), key=lambda line: ("range" in line, line))
    assert (first, second) == ("range(0, 1)", "range(1, 2)")
    assert [line.split(":")[0] for line in refused] == ["forkserver"] * 2 + ["spawn"] * 2
    assert all("MPI does not run in this process" in line for line in refused)


def fail_in_a_thread() -> None:
    thread = threading.Thread(target=divmod, args=(1, 0))
    thread.start()
    thread.join()
    raise SystemExit(3)


def sleep(ready: Any) -> None:
    ready.set()
    time.sleep(60)


@pytest.mark.mpi
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_workers_leave_the_guard_to_their_rank() -> None:
    fork = multiprocessing.get_context("fork")
    with guard(stall_timeout=60) as job:
        assert not job.stop  # from here on SIGTERM asks this rank to stop
        ready = fork.Event()
        failing, sleeping = fork.Process(target=fail_in_a_thread), fork.Process(target=sleep, args=[ready])
        for process in (failing, sleeping):
            process.start()
        ready.wait(20)
        sleeping.terminate()
        for process in (failing, sleeping):
            process.join(20)
            process.kill()
        stopped = job.stop
    assert (failing.exitcode, sleeping.exitcode, stopped) == (3, -signal.SIGTERM, False)
