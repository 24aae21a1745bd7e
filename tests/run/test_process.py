"""Settings of a process: the work area of BLAS, what is asked of malloc, and the signals that ask it to stop."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from mpiml.run import process
from mpiml.run.deadline import Deadline
from mpiml.run.process import DOUBLE, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, SIGNALS, StopRequest, keep_freed_memory
from tests.conftest import launch

FAULTS = """
import json, resource
import numpy as np
from mpiml.run.process import prepare_process

prepare_process({threads})
counts = []
for dtype in ("float32", "float64"):
    x, w, y = (np.ones(shape, dtype) for shape in ((32, 256), (256, 256), (32, 256)))
    resource.getrusage(resource.RUSAGE_SELF)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.matmul(x, w, out=y)
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps(counts))
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_the_first_product_finds_the_pages_of_blas(threads: int) -> None:
    """Without them it makes some dozens of page faults, and on some processors it is slow each time."""
    done = launch(0, "-c", FAULTS.format(threads=threads))
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout)) < 10


class Malloc:
    """The mallopt of a C library that takes an M_MMAP_THRESHOLD up to `most`."""

    def __init__(self, most: int):
        self.most = most
        self.settings: dict[int, int] = {}

    def __call__(self, option: int, size: int) -> int:
        if option == M_MMAP_THRESHOLD and size > self.most:
            return 0
        self.settings[option] = size
        return 1


def test_freed_memory_stays_whatever_the_c_library_takes() -> None:
    new, old, other = Malloc(1 << 40), Malloc(32 << 20), Malloc(0)  # glibc from 2.35 on, glibc before, another library
    for malloc in (new, old, other):
        keep_freed_memory(malloc)
    assert new.settings == {M_MMAP_THRESHOLD: process.KEEP, M_TRIM_THRESHOLD: process.KEEP}
    assert old.settings == {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: process.KEEP}
    assert other.settings == {}  # a trim threshold alone would have every large array mapped anew


@pytest.mark.parametrize("loaded", [object(), None], ids=["without mallopt", "not there"])
def test_a_c_library_that_is_not_glibc_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch, loaded: object) -> None:
    def load(name: None) -> object:
        if loaded is None:
            raise OSError("no such library")
        return loaded

    def limit(limits: int) -> None:
        seen.append(limits)

    seen: list[int] = []
    monkeypatch.setattr(process, "thread_pools", lambda: SimpleNamespace(limit=limit))
    monkeypatch.setattr(process, "ctypes", SimpleNamespace(CDLL=load))
    process.prepare_process(3)
    assert seen == [3]


def send(number: int) -> None:
    """To this process, whose main thread handles it at once."""
    os.kill(os.getpid(), number)


def test_a_stop_request_that_another_rank_passes_on_counts_at_any_time() -> None:
    for look in (StopRequest.now, StopRequest.at_once):
        stop = StopRequest()
        assert not look(stop)
        stop.others = lambda: True
        assert look(stop)
        assert stop.reason() == "asked to stop by a signal"


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("look", [StopRequest.now, StopRequest.at_once])
def test_each_of_the_signals_asks_to_stop(number: int, look: Callable[[StopRequest], bool]) -> None:
    with StopRequest() as stop:
        assert not look(stop)
        send(number)
        assert look(stop)
        assert stop.reason() == "asked to stop by a signal"


def test_after_the_block_signals_do_what_they_did() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def interrupts(number: int) -> bool:
    """Whether a signal interrupts this process at once."""
    try:
        send(number)
    except KeyboardInterrupt:
        return True
    return False


def test_one_ctrl_c_may_come_twice_and_a_second_one_interrupts() -> None:
    with StopRequest() as stop:
        both = [interrupts(signal.SIGINT) for _ in range(2)]  # from the terminal and from the launcher
        assert (both, stop.asked) == ([False, False], True)
        stop._asked_at -= DOUBLE
        assert [interrupts(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == [
            False,
            False,
            True,
        ]


def test_a_block_inside_anothers_takes_over_what_that_one_was_asked() -> None:
    with StopRequest() as outer:
        with StopRequest() as inner:
            assert not inner.asked
        send(signal.SIGUSR1)
        with StopRequest() as inner:
            assert inner.now()
        assert outer.now()


def test_in_a_thread_no_signals_are_taken() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    seen = []

    def act() -> None:
        with StopRequest() as stop:
            seen.append([signal.getsignal(number) for number in SIGNALS])
            seen.append(stop.now())

    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    assert seen == [before, False]


def test_a_process_with_nothing_left_to_stop_ignores_signals() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        process.ignore_signals()
        assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_IGN] * len(SIGNALS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_an_evaluation_is_left_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stop = StopRequest(Deadline(600.0))
    assert not stop.now()
    now += 300
    assert not stop.at_once()
    now += 271
    assert stop.at_once()
    assert stop.reason() == "time is nearly up"


def test_a_second_ctrl_c_at_once_interrupts_nothing_after_the_block_either() -> None:
    """Nor one that comes when another rank has asked."""
    with StopRequest() as outer:
        with StopRequest():
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        with StopRequest() as inner:
            os.kill(os.getpid(), signal.SIGINT)
            assert inner.asked
    assert outer.asked
    with StopRequest() as request:
        request.others = lambda: True
        assert request.now()
        os.kill(os.getpid(), signal.SIGINT)
