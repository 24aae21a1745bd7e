"""What the watch takes for progress, whom it names, and how it begins and ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from mpi4py import MPI

from mpiml.clock import ACTIVITIES, Clock
from mpiml.errors import DataError, RunError, StallError
from mpiml.run import alarm
from mpiml.run import watch as module
from mpiml.run.node import Process
from mpiml.run.watch import LEFT, LOOKS, Sign, Watch, _places, neighbour

TIMEOUT = 5.0


@pytest.fixture
def watch() -> Iterator[Watch]:
    """A watch that looks only when it is told to, with its errors in `errors`."""
    made = Watch(MPI.COMM_SELF.Dup(), Clock(), TIMEOUT, lambda error: None)
    errors: list[RunError] = []
    made.fail = errors.append
    made.errors = errors  # type: ignore[attr-defined]
    made._launched = [0, 1, 2, 3]  # there are more, in these tests
    yield made
    made._end()


def look(watch: Watch, seconds: float) -> list[RunError]:
    """What it makes of a look so many seconds from now."""
    now = time.monotonic() + seconds
    watch._look_at_own(now)
    watch._look_at_others(now)
    return watch.errors  # type: ignore[attr-defined, no-any-return]


def test_rank_that_works_and_does_not_move_is_named(watch: Watch) -> None:
    watch.clock("data")
    look(watch, 0)
    (error,) = look(watch, TIMEOUT + 1)
    assert str(error) == "rank 0 has made no progress for 5 s, in step 0 (data)"
    assert error.rank == 0


def test_long_work_of_a_programs_own_gets_a_hint(watch: Watch) -> None:
    watch.hint = "say that it is alive"
    for activity in ("compute", "checkpoint"):
        watch.clock(activity)  # type: ignore[arg-type]
        look(watch, 0)
        look(watch, TIMEOUT + 1)
    said = [str(error).partition(", in ")[2] for error in watch.errors]  # type: ignore[attr-defined]
    assert said == ["step 0 (compute); say that it is alive", "step 0 (checkpoint)"]


def test_where_all_wait_nobody_is_named(watch: Watch) -> None:
    watch.clock("joining")
    look(watch, 0)
    assert not look(watch, 2 * TIMEOUT - 1)
    (error,) = look(watch, 2 * TIMEOUT + 1)
    assert str(error) == "all ranks wait for each other for 10 s: 1 in step 0 (joining), as rank 0"
    assert error.rank is None


def test_places_of_many_ranks_are_few_words() -> None:
    signs = {rank: Sign(0, 0, 0, 7 if rank % 3 else 6, "joining") for rank in range(1000)}
    assert _places(signs) == "334 in step 6 (joining), as rank 0; 666 in step 7 (joining), as rank 1"
    assert len(_places({rank: Sign(0, 0, 0, rank) for rank in range(1000)})) < 200


@pytest.mark.parametrize(("ranks", "progress"), [(1, True), (1000, False)])
def test_what_the_watch_itself_moves_is_no_progress(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, ranks: int, progress: bool
) -> None:
    """Signs of life of a thousand ranks are some hundred kilobytes."""
    watch._quiet = module.QUIET + module.QUIET_EACH * (ranks - 1)
    total = 0

    def moved() -> int:
        nonlocal total
        total += 300_000
        return total

    monkeypatch.setattr(module, "bytes_moved", moved)
    watch.clock("joining")
    for seconds in range(20):
        look(watch, seconds)
    assert (not watch.errors) == progress  # type: ignore[attr-defined]


def test_every_activity_can_be_sent(watch: Watch) -> None:
    for activity in ACTIVITIES:
        watch.clock(activity)
        watch._send(0.0)


def test_long_work_that_moves_is_no_stall(watch: Watch) -> None:
    watch.clock("data")
    for seconds in range(0, 60, 3):
        watch.clock.progress()
        assert not look(watch, seconds)
    assert look(watch, 57 + TIMEOUT + 1)


def test_whoever_waits_for_others_may_stand_still(watch: Watch) -> None:
    for activity in ("waiting", "communication", "joining"):
        watch.clock(activity)
        look(watch, 0)
        assert not look(watch, TIMEOUT + 1)


def test_a_process_that_has_ended_ends_the_job_after_some_looks(watch: Watch) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        watch._processes = {"rank 3 has ended without a word": (3, Process(child.pid))}
        watch._ended = dict.fromkeys(watch._processes, 0)
        for _ in range(2 * LOOKS):
            watch._look_at_processes()
        assert not watch.errors  # type: ignore[attr-defined]
        child.kill()
        child.wait()
        for _ in range(LOOKS):
            watch._look_at_processes()
        assert not watch.errors  # type: ignore[attr-defined]
        watch._look_at_processes()
    (error,) = watch.errors  # type: ignore[attr-defined]
    assert isinstance(error, StallError)
    assert (str(error), error.rank) == ("rank 3 has ended without a word", 3)


def test_alone_on_its_node_a_rank_has_no_neighbour() -> None:
    rank, process = neighbour(MPI.COMM_SELF)
    assert (rank, process.ended, process._descriptor) == (0, False, -1)


def test_it_looks_a_few_times_before_the_time_is_up() -> None:
    intervals = []
    for timeout in (0.0, 5.0, 60.0, 600.0):
        made = Watch(MPI.COMM_SELF.Dup(), Clock(), timeout, lambda error: None)
        intervals.append(made.interval)
        made._end()
    assert intervals == [30.0, 1.0, 12.0, 30.0]


@pytest.mark.parametrize("gone", [False, True])
def test_a_rank_that_has_said_goodbye_may_be_silent(watch: Watch, gone: bool) -> None:
    now = time.monotonic()
    watch._signs = {1: Sign(now, now, 3.0, 7, "compute", gone)}
    watch._look_at_others(now + TIMEOUT + 1)
    said = [str(error) for error in watch.errors]  # type: ignore[attr-defined]
    assert said == ([] if gone else ["rank 1 has given no sign of life for 5 s; the last one was in step 7 (compute)"])


class Looks:
    """Time as it passes for a watch: so many seconds at each pause; then its block ends."""

    def __init__(self, *pauses: float):
        self.now, self.pauses = time.monotonic(), list(pauses)

    def monotonic(self) -> float:
        return self.now

    def wait(self, pause: float) -> bool:
        if not self.pauses:
            return True
        self.now += self.pauses.pop(0)
        return False

    def set(self) -> None:
        """The end of the block."""


def watched(watch: Watch, monkeypatch: pytest.MonkeyPatch, *pauses: float) -> list[RunError]:
    """What a watch says whose thread has run through such pauses."""
    looks = Looks(*pauses)
    watch._own.heard = watch._own.moved = looks.now
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=looks.monotonic, sleep=time.sleep))
    monkeypatch.setattr(watch, "_ending", looks)
    monkeypatch.setattr(module, "bytes_moved", int)
    watch.clock("data")
    watch.run()
    monkeypatch.undo()
    return watch.errors  # type: ignore[attr-defined, no-any-return]


def test_a_thread_looks_until_the_block_ends(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = watched(watch, monkeypatch, *[1.0] * 7)  # it moves once, and then no more for six seconds
    assert [str(error) for error in errors] == ["rank 0 has made no progress for 5 s, in step 0 (data)"]


def test_a_process_that_was_stopped_itself_judges_nobody_by_the_time_before(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not watched(watch, monkeypatch, 1.0, 3600.0, 1.0, 1.0)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "mpiml-watch"]


def test_it_runs_for_the_length_of_a_block_also_if_that_ends_by_an_error() -> None:
    def fail() -> None:
        with Watch(MPI.COMM_SELF.Dup(), Clock(), 600.0, lambda error: None):
            assert threads() == ["mpiml-watch"]
            raise DataError("row 3 is bad")

    with pytest.raises(DataError):
        fail()
    assert not threads()


def test_without_a_timeout_only_ends_are_noticed(watch: Watch) -> None:
    with Watch(MPI.COMM_SELF.Dup(), Clock(), 0.0, lambda error: None) as made:
        assert threads() == ["mpiml-watch"]
        assert made.notes == []
    watch.timeout = made.timeout
    watch.clock("data")
    look(watch, 0)
    assert not look(watch, 1e6)
    watch.clock("joining")
    assert not look(watch, 1e6)
    watch._signs = {1: Sign(1e6, 0, gone=True)}
    watch._look_at_all(2e6)
    assert "rank 1 has left the block" in str(watch.errors)  # type: ignore[attr-defined]


def test_ranks_are_named_as_they_were_launched(watch: Watch) -> None:
    watch._launched, late = [4, 6, 8], time.monotonic() + 1e3
    watch.clock("data")
    look(watch, 0)
    watch._signs = {1: Sign(0, 0, step=3), 2: Sign(late, 0, activity="joining")}
    errors = look(watch, TIMEOUT + 1)
    watch._signs[1].gone = True
    watch._own.activity = "joining"
    watch._look_at_all(late)
    assert [(error.rank, str(error)[:40]) for error in errors] == [
        (4, "rank 4 has made no progress for 5 s, in "),
        (6, "rank 6 has given no sign of life for 5 s"),
        (None, "all ranks wait for each other for 10 s: "),
        (6, "rank 6 has left the block in step 3, and"),
    ]


def test_while_it_watches_the_alarm_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    on = iter([True, False])

    def off() -> bool:
        said.append("off")
        return next(on)

    monkeypatch.setattr(alarm, "off", off)
    monkeypatch.setattr(alarm, "during", said.append)
    with Watch(MPI.COMM_SELF.Dup(), Clock(), 600.0, lambda error: None):
        assert said == ["off"]
        with Watch(MPI.COMM_SELF.Dup(), Clock(), 600.0, lambda error: None):
            assert said == ["off", "off"]
        assert said == ["off", "off"]  # the outer watch goes on
    assert said == ["off", "off", "ending"]


def test_of_watches_within_each_other_the_innermost_judges(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = SimpleNamespace()
    watch.clock("data")
    monkeypatch.setattr(module, "_watches", [watch, inner])
    assert not look(watch, TIMEOUT + 1)
    monkeypatch.setattr(module, "_watches", [watch])
    assert not look(watch, 2 * TIMEOUT)
    assert look(watch, 2 * TIMEOUT + 2)


def test_a_rank_that_leaves_while_the_others_wait_is_named(watch: Watch) -> None:
    """Soon: without it, all others wait for ever; but not before signs that are on their way have come."""
    watch._signs = {1: Sign(0, 0, step=4, gone=True), 2: Sign(0, 0, activity="communication")}
    watch.clock("joining")
    now = time.monotonic()
    watch._look_at_own(now)
    for sign in watch._signs.values():
        sign.moved = now
    late = now + LEFT * watch.interval + 0.5
    watch._signs[2].heard = late - 2 * watch.interval - 0.1
    watch._look_at_all(late)
    assert not watch.errors  # type: ignore[attr-defined] # rank 2 may have been stopped
    watch._signs[2].heard = late - watch.interval
    watch._look_at_all(now + LEFT * watch.interval - 0.5)
    assert not watch.errors  # type: ignore[attr-defined]
    watch._look_at_all(now + LEFT * watch.interval + 0.5)
    (error,) = watch.errors  # type: ignore[attr-defined]
    left = "rank 1 has left the block in step 4, and the others wait for it"
    assert (str(error), error.rank) == (
        f"{left}: 1 in step 0 (joining), as rank 0; 1 in step 0 (communication), as rank 2",
        1,
    )


def test_a_rank_that_may_wait_in_a_call_of_its_own_says_who_has_left(watch: Watch) -> None:
    watch._signs = {1: Sign(0, 0, gone=True), 2: Sign(0, 0)}
    watch.clock("compute")
    now = time.monotonic()
    watch._look_at_own(now)
    watch._look_at_own(now + TIMEOUT + 1)
    (error,) = watch.errors  # type: ignore[attr-defined]
    said = "rank 0 has made no progress for 5 s, in step 0 (compute)"
    assert str(error) == f"{said}; rank 1, which it may wait for, has left the block"


@pytest.mark.parametrize("busy", ["own", "other"])
def test_a_rank_may_leave_while_another_works(watch: Watch, busy: str) -> None:
    watch._signs = {1: Sign(0, 0, gone=True), 2: Sign(0, 0, activity="data" if busy == "other" else "joining")}
    watch.clock("data" if busy == "own" else "joining")
    now = time.monotonic()
    watch._look_at_own(now)
    for sign in watch._signs.values():
        sign.moved, sign.heard = now, now + 2 * TIMEOUT - 1
    watch._look_at_all(now + 2 * TIMEOUT - 1)
    assert not watch.errors  # type: ignore[attr-defined]


WORLD = MPI.COMM_WORLD
LAST = WORLD.size - 1


@pytest.mark.mpi
def test_the_neighbour_is_the_next_rank_of_the_node() -> None:
    rank, process = neighbour(WORLD)
    assert rank == (WORLD.rank + 1) % WORLD.size
    assert not process.ended
    pids = WORLD.allgather(os.getpid())
    if WORLD.size > 1:
        about = Path(f"/proc/self/fdinfo/{process._descriptor}").read_text()
        assert f"\nPid:\t{pids[rank]}\n" in about
    process.close()


@pytest.mark.mpi
def test_a_rank_that_gives_no_sign_of_life_is_named_by_rank_0_and_the_next_one() -> None:
    """The others are where they said that they were."""
    watch = Watch(WORLD.Dup(), Clock(), TIMEOUT, lambda error: None)
    errors: list[RunError] = []
    watch.fail = errors.append
    watch.run = lambda: None  # type: ignore[method-assign] # it looks only when it is told to
    watch.start()
    watch.clock.step = 7
    watch.clock("evaluation")
    watch.clock.call = "Sum." + "0123456789" * 3 + "()"
    if WORLD.rank != LAST:
        watch._send(1.0)
    WORLD.Barrier()
    late = time.monotonic() + TIMEOUT + 1
    limit = time.monotonic() + 20
    heard = {rank for rank in watch._signs if rank != LAST}
    while any(watch._signs[rank].heard < late for rank in heard) and time.monotonic() < limit:
        watch._listen(late)
    watch._look_at_others(late)
    WORLD.Barrier()
    watch._end()
    watchers = {0, LAST and (LAST + 1) % WORLD.size} - {LAST} if LAST else set()
    said = [f"rank {LAST} has given no sign of life for 5 s"]
    assert [str(error) for error in errors] == (said if WORLD.rank in watchers else [])
    assert [error.rank for error in errors] == [LAST] * len(errors)
    assert {watch._signs[rank].place for rank in heard} <= {"in step 7, Sum.01234567890123456789 (evaluation)"}
