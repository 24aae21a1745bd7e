"""Waiting leaves cores to ranks that work, messages of any length arrive whole, and all ranks raise the same error."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
from mpi4py import MPI

from mpiml import team
from mpiml.clock import BLOCKED_ON_OTHERS, Clock
from mpiml.errors import ConfigError, DataError, RunError
from mpiml.team import ENVELOPE, Team, allgather, broadcast, reduced, until

WORLD = MPI.COMM_WORLD
LAST, MIDDLE = WORLD.size - 1, WORLD.size // 2


@pytest.mark.mpi
@pytest.mark.parametrize("root", [0, -1])
@pytest.mark.parametrize("longest", [40, team.MESSAGE])
def test_broadcast_of_every_length(root: int, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Around the length at which a second message is needed, too, and where this is cut."""
    monkeypatch.setattr(team, "MESSAGE", longest)
    root %= WORLD.size
    for length in (0, 1, *range(ENVELOPE - 100, ENVELOPE + 20), 100_000):
        text = bytes(index % 251 for index in range(length))
        assert broadcast(WORLD, text if WORLD.rank == root else None, root) == text


@pytest.mark.mpi
def test_allgather_of_values_of_all_lengths() -> None:
    found = allgather(WORLD, ["x" * WORLD.rank * 5000, WORLD.rank, None])
    assert found == [["x" * rank * 5000, rank, None] for rank in range(WORLD.size)]


@pytest.mark.mpi
def test_reduced_joins_all_values_in_the_order_of_ranks_and_no_rank_many() -> None:
    joins = list[int]()

    def join(one: list[int], other: list[int]) -> list[int]:
        joins.append(1)
        return one + other

    value = reduced(WORLD, [WORLD.rank], join)
    assert value[0] == WORLD.rank
    assert len(joins) <= (WORLD.size - 1).bit_length()
    if WORLD.rank == 0:
        assert value == list(range(WORLD.size))


def test_a_long_wait_asks_seldom_and_a_short_one_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """What naps add to a wait is a small part of it; they never are longer than the longest."""
    monkeypatch.setattr(team, "_yields", 0)
    naps: list[float] = []
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        naps.append(seconds)
        now += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: 1000 + now)
    until(lambda: now > 1.0)
    assert naps == sorted(naps)
    assert (naps[0], naps[-1]) == (team.NAP, team.LONGEST)
    waited = [sum(naps[:index]) for index in range(len(naps))]
    assert all(nap <= max(team.NAP, before / 16 + 1e-9) for nap, before in zip(naps, waited, strict=True))
    assert len(naps) < 700


def of_all() -> Team:
    return Team(WORLD, Clock())


def fail_on(*ranks: int) -> str:
    """What an action does that fails on these ranks, each in its own way."""
    if WORLD.rank in ranks:
        raise (DataError if WORLD.rank % 2 else ConfigError)(f"rank {WORLD.rank} of {WORLD.size} fails")
    return f"result of {WORLD.rank}"


def check(error: RunError, rank: int) -> None:
    """It is the error of `rank`, wherever it is raised."""
    assert type(error) is (DataError if rank % 2 else ConfigError)
    assert str(error) == f"rank {rank} of {WORLD.size} fails"
    assert error.rank == rank
    assert error.everywhere


@pytest.mark.mpi
def test_together_every_rank_has_its_own_result() -> None:
    assert of_all().together(fail_on) == f"result of {WORLD.rank}"


@pytest.mark.mpi
@pytest.mark.parametrize("result", [None, 0, False, [], ()])
def test_results_that_are_false(result: object) -> None:
    assert of_all().together(lambda: result) == result
    assert of_all().on_rank_0(lambda: result) == result


@pytest.mark.mpi
@pytest.mark.parametrize("rank", sorted({0, MIDDLE, LAST}))
def test_together_one_rank_fails(rank: int) -> None:
    with pytest.raises(RunError) as caught:
        of_all().together(lambda: fail_on(rank))
    check(caught.value, rank)


@pytest.mark.mpi
@pytest.mark.parametrize("lowest", sorted({0, MIDDLE, LAST}))
def test_together_the_lowest_rank_is_named(lowest: int) -> None:
    with pytest.raises(RunError) as caught:
        of_all().together(lambda: fail_on(*range(lowest, WORLD.size)))
    check(caught.value, lowest)


@pytest.mark.mpi
def test_on_rank_0_calls_nobody_else() -> None:
    calls: list[int] = []

    def act() -> str:
        calls.append(WORLD.rank)
        return fail_on()

    assert of_all().on_rank_0(act) == "result of 0"
    assert calls == ([0] if WORLD.rank == 0 else [])


@pytest.mark.mpi
def test_on_rank_0_fails_everywhere() -> None:
    with pytest.raises(RunError) as caught:
        of_all().on_rank_0(lambda: fail_on(0))
    check(caught.value, 0)


@pytest.mark.mpi
def test_work_goes_on_after_a_failure() -> None:
    """All ranks have made the same calls, so the next collective ones match."""
    for rank in (0, LAST):
        with pytest.raises(RunError):
            of_all().together(lambda rank=rank: fail_on(rank))
    assert of_all().on_rank_0(lambda: WORLD.size) == WORLD.size
    assert WORLD.allreduce(1) == WORLD.size


@pytest.mark.mpi
@pytest.mark.parametrize("before", ["joining", "communication", "data"])
def test_whoever_acts_waits_for_nobody_by_the_clock(before: str) -> None:
    """Else the watch names no rank that is stuck in what it does."""
    for act in (Team.together, Team.on_rank_0):
        clock, seen = Clock(), []
        clock(before)
        act(Team(WORLD, clock), lambda seen=seen, clock=clock: seen.append(clock.activity))
        assert not set(seen) & BLOCKED_ON_OTHERS
        assert clock.activity == before


@pytest.mark.mpi
def test_exit_codes_survive() -> None:
    with pytest.raises(RunError) as caught:
        of_all().together(lambda: fail_on(LAST))
    assert caught.value.exit_code == (DataError if LAST % 2 else ConfigError).exit_code


@pytest.mark.mpi
def test_ranks_are_named_as_the_launcher_numbers_them() -> None:
    """A grid numbers its ranks by node, so that its rank 0 may be another than the user's."""
    turned = MPI.Intracomm(WORLD.Split(0, -WORLD.rank))
    team = Team(turned, Clock())
    assert team.name == WORLD.rank
    with pytest.raises(RunError) as caught:
        team.together(lambda: fail_on(0))
    check(caught.value, 0)
    if WORLD.size > 1:
        values = {"cards": "one" if WORLD.rank == 0 else "none"}
        with pytest.raises(ConfigError, match=rf"ranks differ in cards: one \(rank 0 on .*\), none \(rank {LAST}\)"):
            team.check_alike(values)
    turned.Free()
    part = MPI.Intracomm(WORLD.Split(WORLD.rank % 2, WORLD.rank))
    assert Team(part, Clock()).launched == list(range(WORLD.rank % 2, WORLD.size, 2))
    part.Free()


@pytest.mark.mpi
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 50)])
def test_broadcast_of_an_array_in_parts(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "MESSAGE", 64)
    array = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape) * (WORLD.rank + 1)
    of_all().broadcast_array(array, LAST)
    np.testing.assert_array_equal(array, np.arange(array.size, dtype=np.float32).reshape(shape) * WORLD.size)


@pytest.mark.mpi
def test_ranks_that_are_alike_may_begin() -> None:
    everyone = of_all()
    everyone.check_alike({"NumPy": "2.4.0"}, "install it")
    assert everyone.clock.activity == "start"


@pytest.mark.mpi
@pytest.mark.parametrize("hint", ["", "install the same everywhere"])
@pytest.mark.parametrize("version", ["2.5.0", None])
def test_a_rank_that_differs_is_named_on_all_ranks(version: str | None, hint: str) -> None:
    here = {"mpiml": "0.1.0", "NumPy": "2.4.0"}
    if WORLD.rank == LAST and version:
        here["NumPy"] = version
    elif WORLD.rank == LAST:
        del here["NumPy"]
    if WORLD.size == 1:
        of_all().check_alike(here, hint)
        return
    with pytest.raises(ConfigError) as caught:
        of_all().check_alike(here, hint)
    where = f"rank {LAST} on {os.uname().nodename}"
    text = f"ranks differ in NumPy: {version or 'none'} ({where}), 2.4.0 (rank 0)"
    assert str(caught.value) == (f"{text}; {hint}" if hint else text)
    assert (caught.value.everywhere, caught.value.rank) == (True, LAST)


@pytest.mark.mpi
def test_what_rank_0_lacks_is_a_difference_too() -> None:
    here = {"NumPy": "2.4.0"} if WORLD.rank == LAST else {}
    if LAST == 0:
        of_all().check_alike(here)
        return
    with pytest.raises(ConfigError, match=r"ranks differ in NumPy: 2.4.0 \(rank \d+ on .*\), none \(rank 0\)"):
        of_all().check_alike(here)
