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
from mpiml.run.console import Console, Shown, say, width

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


LONG = Shown(12, 0.123456, "accuracy", 0.98765, 12_345.6)


def bar_of(columns: int, last: int, shown: Shown, monkeypatch: pytest.MonkeyPatch) -> str:
    """The bar of a run's second step on a terminal, after a second and a half."""
    monkeypatch.setattr(console, "width", lambda: columns)
    one = Console(1, last)
    one.progress(2, shown)
    assert one._bar is not None
    one._bar.close()
    return one._bar.format_meter(**one._bar.format_dict | {"elapsed": 1.5, "rate": 2.0})


@pytest.mark.parametrize(
    ("columns", "last", "line"),
    [
        (120, 720, "step 2/720 [" + " " * 43 + "] epoch 12 loss 0.1235 accuracy 0.988 12.3k samples/s 05:59 left"),
        (80, 720, "step 2/720 epoch 12 loss 0.1235 accuracy 0.988 12.3k samples/s 05:59 left"),
        (80, 90_000, "step 2/90000 epoch 12 loss 0.1235 accuracy 0.988 12.3k/s 12:29:59 left"),
        (60, 720, "step 2/720 [" + " " * 14 + "] epoch 12 loss 0.1235 05:59 left"),
        (20, 720, "step 2/720 05:59 le"),
    ],
)
def test_bar_says_as_much_as_fits(columns: int, last: int, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bar_of(columns, last, LONG, monkeypatch)
    assert len(made) < columns
    assert made == line


def test_bar_shows_any_name_of_a_metric_and_none_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    named = bar_of(100, 9, LONG._replace(metric="a{b}"), monkeypatch)
    assert named.endswith("] epoch 12 loss 0.1235 a{b} 0.988 12.3k samples/s 00:03 left")
    unknown = bar_of(100, 9, LONG._replace(score=None), monkeypatch)
    assert unknown.endswith("] epoch 12 loss 0.1235 12.3k samples/s 00:03 left")


def test_where_nobody_watches_a_line_says_how_much_time_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "width", lambda: None)
    times = iter([100.0, 108.0, 108.0, 109.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(times))
    lines = Console(101, 1000)
    lines.now_and_then(104, "step 104")  # 4 steps in 8 seconds
    lines.now_and_then(105, "step 105")
    assert capsys.readouterr().out == "step 104  0:29:52 left\n"
