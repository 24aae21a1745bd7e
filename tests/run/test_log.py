"""What a run says on a terminal, and that a terminal that goes away is no reason to end it."""

from __future__ import annotations

import os
import pty
import sys

import pytest

from mpiml.run.console import Console, width


def test_terminal_that_is_closed_ends_the_bar_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, ours = pty.openpty()
    with open(ours, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(os, "get_terminal_size", lambda descriptor: os.terminal_size((80, 24)))
        console = Console(1, 100)
        assert console._bar is not None
        os.close(terminal)
        for step in range(2, 40):
            console.progress(step, 0.5, 1000.0)
            console._last_line = 0.0
            console.line("an evaluation")
            console.now_and_then("a step")
        console.close()
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), ours)  # for what the stream still holds


def test_standard_error_that_is_closed_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert width() is None
    console = Console(1, 10)
    monkeypatch.setattr(sys, "stdout", None)
    console.line("nobody reads it")
