"""Output that is diverted: Python's, C's and that of programs; it ends where it began, in the order of its lines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import ctypes, os, subprocess, sys
from mpiml.run.console import say
from mpiml.run.streams import Diverted

C = ctypes.CDLL(None)
print("before")
C.puts(b"C before")
one = Diverted(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND))
print("within")
C.puts(b"C within")
print("error", file=sys.stderr)
subprocess.run(["echo", "program"])
say("said", sys.stdout)
say("failed", sys.stderr)
if sys.argv[2] == "killed":
    print("last")
    C.puts(b"C last")
    os.kill(os.getpid(), 9)
one.close()
print("after")
C.puts(b"C after")
"""


def run(file: Path, end: str) -> tuple[list[str], str]:
    """The lines of standard output, and standard error."""
    command = [sys.executable, "-c", SCRIPT, str(file), end]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    return done.stdout.splitlines(), done.stderr


def test_all_output_is_diverted_and_what_is_said_reaches_both(tmp_path: Path) -> None:
    out, err = run(tmp_path / "log", "closed")
    assert sorted(out) == ["C after", "C before", "after", "before", "said"]
    assert err == "failed\n"
    assert (tmp_path / "log").read_text().splitlines() == ["within", "C within", "error", "program", "said", "failed"]


def test_lines_of_a_process_that_is_killed_are_there(tmp_path: Path) -> None:
    run(tmp_path / "log", "killed")
    assert (tmp_path / "log").read_text().splitlines()[-2:] == ["last", "C last"]
