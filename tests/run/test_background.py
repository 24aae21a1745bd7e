"""Work in a thread: what ends it is known, and its progress is that of who waits for it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable

import pytest

from mpiml.clock import Clock
from mpiml.errors import NotFiniteError, OutputError
from mpiml.run.background import NICE, Work
from mpiml.run.verified import Progress


def raising(error: BaseException) -> Callable[[Progress], object]:
    def action(progress: Progress) -> object:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (NotFiniteError("w is not finite"), NotFiniteError, "w is not finite"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OutputError, "cannot write f: No space left on device"),
        (MemoryError(), OutputError, "cannot write f: MemoryError"),
        (ValueError("odd"), OutputError, "cannot write f: odd"),
        (SystemExit(0), OutputError, "cannot write f: 0"),
    ],
)
def test_whatever_ends_it_is_known(error: BaseException, kind: type[Exception], said: str) -> None:
    work = Work(raising(error), "cannot write f", yields=False)
    work.finish(Clock())
    assert work.done
    assert type(work.error) is kind
    assert str(work.error) == said


def test_its_progress_is_that_of_who_waits() -> None:
    stop, moves = threading.Event(), list[int]()

    class Seen(Clock):
        def progress(self) -> None:
            super().progress()
            moves.append(1)
            stop.set()

    def action(progress: Progress) -> None:
        for _ in range(2000):
            progress()
            if stop.wait(0.001):
                return

    work = Work(action, "", yields=False)
    assert not work.done
    work.finish(Seen())
    assert (work.done, work.error) == (True, None)
    assert moves


def test_it_has_a_stop_without_progress_where_the_work_has() -> None:
    stop, clock = threading.Event(), Clock()
    work = Work(lambda progress: stop.wait(0.2), "", yields=False)
    before = clock.moves
    work.finish(clock)
    assert clock.moves == before


@pytest.mark.parametrize("yields", [True, False])
def test_it_leaves_cores_to_others_if_nobody_waits(yields: bool) -> None:
    found: list[int] = []

    def action(progress: Progress) -> None:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    Work(action, "", yields).finish(Clock())
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert found == [max(NICE, own) if yields else own]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own
