"""How wide a terminal is, under a launcher too, and that nothing fails where there is none."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpiml.run import console
from mpiml.run.console import say, width

COLUMNS = 97


@pytest.fixture
def pseudo() -> Iterator[int]:
    """A terminal of so many columns that somebody watches."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    yield slave
    os.close(slave)
    os.close(master)


def test_width_is_that_of_the_terminal(pseudo: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.dup(pseudo), "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert width() == COLUMNS


@pytest.mark.parametrize("stream", [None, io.StringIO()], ids=["closed", "no file"])
def test_what_is_no_terminal_has_no_width(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "launchers", lambda: iter(()))
    monkeypatch.setattr(sys, "stderr", stream)
    assert width() is None


def under_a_launcher(path: Path, stderr: int) -> str:
    """The width that a process finds whose own standard error is a pipe, and its launcher's is `stderr`."""
    shell = path / "mpirun"
    shutil.copy("/bin/sh", shell)
    script = "from mpiml.run.console import width; print(width())"
    command = [str(shell), "-c", f"{sys.executable} -c '{script}' 2>&1 | cat"]
    return subprocess.run(
        command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=60
    ).stdout.strip()


def test_under_a_launcher_it_is_the_launchers_terminal(tmp_path: Path, pseudo: int) -> None:
    assert under_a_launcher(tmp_path, pseudo) == str(COLUMNS)


def test_a_file_that_a_launchers_errors_go_to_stays_as_it_is(tmp_path: Path) -> None:
    with open(tmp_path / "errors", "w+") as file:
        file.write("what was said before\n")
        file.flush()
        assert under_a_launcher(tmp_path, file.fileno()) == "None"
    assert (tmp_path / "errors").read_text() == "what was said before\n"


def test_what_is_said_is_there_at_once(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w") as stream:
        say("a line", stream)
        assert (tmp_path / "out").read_text() == "a line\n"


class Full:
    """A stream whose disk is full, or whose reader is gone."""

    def __init__(self, error: OSError):
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize(
    "stream",
    [None, closed(), Full(OSError(errno.ENOSPC, "no space left")), Full(BrokenPipeError())],
    ids=["none", "closed", "full", "no reader"],
)
def test_what_nobody_can_read_ends_no_run(stream: Any) -> None:
    say("a line", stream)
