"""The alarm ends a process that is stuck where nobody watches it: in Python, in C, and at Python's own end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from mpiml.run import alarm

SOON = "from mpiml.run import alarm; alarm.LEAST = 0.2; alarm.GRACE = 0.1; alarm.TURN = 0.0; import sys, time, ctypes\n"


def ended(script: str) -> subprocess.CompletedProcess[str]:
    """What became of a program whose alarm waits for a moment only."""
    start = "alarm.start('a.program', ['--stall-timeout', '0.1'])\n"
    command = [sys.executable, "-c", SOON + start + script]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)


@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [
        ("", 600.0),
        ("--steps 3", 600.0),
        ("--stall-timeout 30", 30.0),
        ("--steps 3 --stall-timeout=30 --quiet", 30.0),
        ("--stall-timeout 0", 0.0),
        ("--stall-timeout 5 --stall-timeout 7", 7.0),
        ("--stall-timeout", 600.0),
        ("--stall-timeout soon", 600.0),
        ("--stall-timeout nan", 600.0),
        ("--stall-timeout inf", 600.0),
        ("--stall-timeout -3", 600.0),
    ],
)
def test_its_length_is_that_of_the_command_line(arguments: str, seconds: float) -> None:
    assert alarm.timeout_in(arguments.split()) == seconds


def test_process_that_gets_stuck_ends_with_a_line_that_says_where() -> None:
    done = ended("alarm.during('reading its settings'); time.sleep(60)")
    assert done.returncode == 70
    assert done.stderr.startswith(
        "a.program: rank 0 has been reading its settings for 0.2 s: it hangs, or another rank"
    )
    assert "<string>" in done.stderr  # where in the program


def test_process_that_is_stuck_in_c_ends_too_and_shows_the_reason() -> None:
    lines = ["@alarm.shown_as('MPI_Init, where one has not come')", "def begin():", "    ctypes.PyDLL(None).sleep(60)"]
    done = ended("\n".join([*lines, "alarm.during('starting MPI')", "begin()"]))
    assert done.returncode == 1
    assert "in MPI_Init, where one has not come" in done.stderr


def test_process_that_is_stuck_while_python_ends_is_ended_by_the_kernel() -> None:
    lines = ["class Last:", "    def __del__(self):", "        while True: pass", "last = Last()", "alarm.guard_exit()"]
    assert ended("\n".join(lines)).returncode == -14


def test_whoever_says_what_comes_next_has_the_whole_time_again() -> None:
    done = ended("for _ in range(4): alarm.during('one thing after the other'); time.sleep(0.1)\nalarm.off()")
    assert (done.returncode, done.stderr) == (0, "")


def test_process_that_reads_is_not_stuck() -> None:
    lines = ["alarm.during('reading a checkpoint')", "for _ in range(8):", "    open('/dev/zero', 'rb').read(1 << 20)"]
    done = ended("\n".join([*lines, "    time.sleep(0.05)"]))
    assert (done.returncode, done.stderr) == (0, "")


def test_it_is_off_while_others_watch() -> None:
    done = ended("alarm.during('starting'); alarm.off(); time.sleep(0.4)")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_program_without_one_is_left_alone() -> None:
    alarm.during("nothing")
    alarm.off()
    assert not [thread for thread in threading.enumerate() if thread.name == "mpiml-alarm"]


def test_within_returns_what_there_is_in_time() -> None:
    assert alarm.within(5.0, lambda: 3, 0) == 3
    assert alarm.within(5.0, lambda: 1 // 0, 7) == 7
    began = time.monotonic()
    assert alarm.within(0.05, lambda: time.sleep(20), None) is None  # type: ignore[func-returns-value]
    assert time.monotonic() - began < 10
