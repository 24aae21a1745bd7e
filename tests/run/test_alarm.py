"""The alarm ends a process that is stuck where nobody watches it: in Python, in C, and at Python's own end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from mpiml.run import alarm
from tests.conftest import eventually

SOON = "from mpiml.run import alarm; alarm.GRACE = 0.1; alarm.TURN = 0.0; import sys, time, ctypes\n"
ALIVE = (
    0.6  # seconds of a program that gives signs of life at twelfths of it: a busy machine may delay one by ten times
)


def ended(script: str, after: float = 0.2) -> subprocess.CompletedProcess[str]:
    """What became of a program whose alarm waits so many seconds."""
    start = f"alarm.LEAST = {after}; alarm.start('a.program', ['--stall-timeout', '0.1'])\n"
    command = [sys.executable, "-c", SOON + start + script]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


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
    lines = ["for _ in range(12):", "    alarm.during('one thing after the other')", f"    time.sleep({ALIVE / 12})"]
    done = ended("\n".join([*lines, "alarm.off()"]), after=ALIVE - 0.1)
    assert (done.returncode, done.stderr) == (0, "")


def test_process_that_reads_is_not_stuck() -> None:
    lines = ["alarm.during('reading a checkpoint')", "for _ in range(12):", "    open('/dev/zero', 'rb').read(1 << 20)"]
    done = ended("\n".join([*lines, f"    time.sleep({ALIVE / 12})"]), after=ALIVE - 0.1)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_process_has_one_alarm_however_often_it_is_started() -> None:
    lines = ["first = alarm._alarm", "alarm.start('another', ['--stall-timeout', '0'])", "alarm.during('waiting')"]
    done = ended("\n".join([*lines, "print(alarm._alarm is first, alarm.off())", "time.sleep(0.5)"]))
    assert (done.returncode, done.stdout, done.stderr) == (0, "True False\n", "")


def test_it_waits_in_a_thread_only_while_it_is_on() -> None:
    lines = [
        "import threading",
        "for _ in range(3):",
        "    alarm.during('one thing')",
        "    alarm.off()",
        "for _ in range(500): threading.active_count() > 1 and time.sleep(0.01)",
    ]
    done = ended(
        "\n".join([*lines, "print(threading.active_count(), flush=True)", "alarm.during('another')", "time.sleep(9)"])
    )
    assert (done.returncode, done.stdout) == (70, "1\n")


def test_it_is_off_while_others_watch() -> None:
    done = ended("alarm.during('starting'); alarm.off(); time.sleep(0.3)")
    assert (done.returncode, done.stderr) == (0, "")


def waiting() -> list[threading.Thread]:
    """The threads of alarms in this process."""
    return [thread for thread in threading.enumerate() if thread.name == "mpiml-alarm"]


def test_a_program_without_one_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alarm, "_alarm", None)  # whatever other tests have given this process
    assert eventually(lambda: not waiting())
    alarm.during("nothing")
    assert not waiting()
    alarm.off()


def test_within_returns_what_there_is_in_time() -> None:
    assert alarm.within(5.0, lambda: 3, 0) == 3
    assert alarm.within(5.0, lambda: 1 // 0, 7) == 7
    began = time.monotonic()
    assert alarm.within(0.05, lambda: time.sleep(20), None) is None  # type: ignore[func-returns-value]
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"PMI_RANK": "3"}, 3),
        ({"PMIX_RANK": "4", "SLURM_PROCID": "0"}, 4),
        ({"OMPI_COMM_WORLD_RANK": "5"}, 5),
        ({"SLURM_PROCID": "6"}, 6),
        ({"PMI_RANK": "", "SLURM_PROCID": "7"}, 7),
    ],
    ids=str,
)
def test_the_rank_is_known_before_mpi_is(environment: dict[str, str], rank: int) -> None:
    assert alarm.rank_by_launcher(environment) == rank


def test_what_is_read_and_written_is_progress() -> None:
    before = alarm.bytes_moved()
    with open("/dev/zero", "rb") as file:
        file.read(1 << 20)
    read = alarm.bytes_moved()
    with open("/dev/null", "wb") as file:
        file.write(bytes(1 << 20))
    assert read - before >= 1 << 20
    assert alarm.bytes_moved() - read >= 1 << 20


def test_without_a_timeout_there_is_no_alarm() -> None:
    made = alarm.Alarm("a.program", 0.0)
    made.during("nothing in particular")
    assert made._thread is None


def test_within_acts_at_once_where_there_can_be_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", full)
    assert alarm.within(5.0, lambda: 3, 0) == 3
