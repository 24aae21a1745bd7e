"""Tests that an error of one rank becomes the same error on all."""

import os

import pytest
from mpi4py import MPI

from mpiml.clock import BLOCKED_ON_OTHERS, Clock
from mpiml.errors import ConfigError, DataError, RunError
from mpiml.team import Team

pytestmark = pytest.mark.mpi
WORLD = MPI.COMM_WORLD
LAST, MIDDLE = WORLD.size - 1, WORLD.size // 2


def team() -> Team:
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


def test_together_every_rank_has_its_own_result() -> None:
    assert team().together(fail_on) == f"result of {WORLD.rank}"


@pytest.mark.parametrize("result", [None, 0, False, [], ()])
def test_results_that_are_false(result: object) -> None:
    assert team().together(lambda: result) == result
    assert team().on_rank_0(lambda: result) == result


@pytest.mark.parametrize("rank", sorted({0, MIDDLE, LAST}))
def test_together_one_rank_fails(rank: int) -> None:
    with pytest.raises(RunError) as caught:
        team().together(lambda: fail_on(rank))
    check(caught.value, rank)


@pytest.mark.parametrize("lowest", sorted({0, MIDDLE, LAST}))
def test_together_the_lowest_rank_is_named(lowest: int) -> None:
    with pytest.raises(RunError) as caught:
        team().together(lambda: fail_on(*range(lowest, WORLD.size)))
    check(caught.value, lowest)


def test_on_rank_0_calls_nobody_else() -> None:
    calls: list[int] = []

    def act() -> str:
        calls.append(WORLD.rank)
        return fail_on()

    assert team().on_rank_0(act) == "result of 0"
    assert calls == ([0] if WORLD.rank == 0 else [])


def test_on_rank_0_fails_everywhere() -> None:
    with pytest.raises(RunError) as caught:
        team().on_rank_0(lambda: fail_on(0))
    check(caught.value, 0)


def test_work_goes_on_after_a_failure() -> None:
    """All ranks have made the same calls, so the next collective ones match."""
    for rank in (0, LAST):
        with pytest.raises(RunError):
            team().together(lambda rank=rank: fail_on(rank))
    assert team().on_rank_0(lambda: WORLD.size) == WORLD.size
    assert WORLD.allreduce(1) == WORLD.size


@pytest.mark.parametrize("before", ["joining", "communication", "data"])
def test_whoever_acts_waits_for_nobody_by_the_clock(before: str) -> None:
    """Else the watch names no rank that is stuck in what it does."""
    for act in (Team.together, Team.on_rank_0):
        clock, seen = Clock(), []
        clock(before)
        act(Team(WORLD, clock), lambda seen=seen, clock=clock: seen.append(clock.activity))
        assert not set(seen) & BLOCKED_ON_OTHERS
        assert clock.activity == before


def test_exit_codes_survive() -> None:
    with pytest.raises(RunError) as caught:
        team().together(lambda: fail_on(LAST))
    assert caught.value.exit_code == (DataError if LAST % 2 else ConfigError).exit_code


def test_ranks_are_named_as_the_launcher_numbers_them() -> None:
    """A grid numbers its ranks by node, so that its rank 0 may be another than the user's."""
    turned = MPI.Intracomm(WORLD.Split(0, -WORLD.rank))
    team = Team(turned, Clock(), turned.allgather(WORLD.rank))
    assert team.name == WORLD.rank
    with pytest.raises(RunError) as caught:
        team.together(lambda: fail_on(0))
    check(caught.value, 0)
    if WORLD.size > 1:
        values = {"cards": "one" if WORLD.rank == 0 else "none"}
        with pytest.raises(ConfigError, match=rf"ranks differ in cards: one \(rank 0 on .*\), none \(rank {LAST}\)"):
            team.check_alike(values)
    turned.Free()


def test_ranks_that_are_alike_may_begin() -> None:
    everyone = team()
    everyone.check_alike({"NumPy": "2.4.0"}, "install it")
    assert everyone.clock.activity == "start"


@pytest.mark.parametrize("hint", ["", "install the same everywhere"])
@pytest.mark.parametrize("version", ["2.5.0", None])
def test_a_rank_that_differs_is_named_on_all_ranks(version: str | None, hint: str) -> None:
    here = {"mpiml": "0.1.0", "NumPy": "2.4.0"}
    if WORLD.rank == LAST and version:
        here["NumPy"] = version
    elif WORLD.rank == LAST:
        del here["NumPy"]
    if WORLD.size == 1:
        team().check_alike(here, hint)
        return
    with pytest.raises(ConfigError) as caught:
        team().check_alike(here, hint)
    where = f"rank {LAST} on {os.uname().nodename}"
    text = f"ranks differ in NumPy: {version or 'none'} ({where}), 2.4.0 (rank 0)"
    assert str(caught.value) == (f"{text}; {hint}" if hint else text)
    assert (caught.value.everywhere, caught.value.rank) == (True, LAST)


def test_what_rank_0_lacks_is_a_difference_too() -> None:
    here = {"NumPy": "2.4.0"} if WORLD.rank == LAST else {}
    if LAST == 0:
        team().check_alike(here)
        return
    with pytest.raises(ConfigError, match=r"ranks differ in NumPy: 2.4.0 \(rank \d+ on .*\), none \(rank 0\)"):
        team().check_alike(here)
