"""What the watch takes for progress, and whom it names."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from mpi4py import MPI

from mpiml.clock import ACTIVITIES, Clock
from mpiml.errors import RunError
from mpiml.run import watch as module
from mpiml.run.watch import Sign, Watch, _places

TIMEOUT = 5.0


@pytest.fixture
def watch() -> Iterator[Watch]:
    """A watch that looks only when it is told to, with its errors in `errors`."""
    made = Watch(MPI.COMM_SELF.Dup(), Clock(), TIMEOUT, lambda error: None)
    errors: list[RunError] = []
    made.fail = errors.append
    made.errors = errors  # type: ignore[attr-defined]
    yield made
    made.timeout = 0  # it has not been started
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
