"""Ranks that meet at a sum: at the same calls, in its middle, and when it is closed."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.errors import ConfigError, RunError
from mpiml.loop.guard import guard
from mpiml.loop.rows import Rows
from mpiml.loop.sums import Sum

WORLD = MPI.COMM_WORLD
LAST = WORLD.size - 1
needs_others = pytest.mark.skipif(WORLD.size == 1, reason="needs other ranks")


@pytest.mark.mpi
@needs_others
@pytest.mark.parametrize("nodes", [False, True])
@pytest.mark.parametrize("first", ["mean", "close", "drop"])
def test_a_rank_at_another_call_is_named_at_once(monkeypatch: pytest.MonkeyPatch, nodes: bool, first: str) -> None:
    """As one that leaves the loop early, in the middle of a step or not."""
    if nodes:
        monkeypatch.setenv("MPIML_NODES", ",".join("1" * WORLD.size))
    with guard(stall_timeout=0):
        one = Sum(like=0.0, microbatches=2 * WORLD.size)
        Rows(99, 20, WORLD.size).mine(5 if WORLD.rank == LAST else 6)
        for m in one.own[: 1 if first != "mean" and WORLD.rank == LAST else 2]:
            one.put(m, 1)
        with pytest.raises(RunError) as error, one:
            getattr(one, first if WORLD.rank == LAST else "sum")()
        odd, other = (LAST, 0) if WORLD.size > 2 else (0, 1)

        def place(rank: int) -> str:
            return f"rank {rank} is at " + (f"{first}() in step 5" if rank == LAST else "sum() in step 6")

        assert str(error.value) == f"{place(odd)}, but {place(other)}: all ranks sum the same steps"
        assert (error.value.everywhere, error.value.rank) == (True, odd)
        one.close()


@pytest.mark.mpi
def test_ranks_that_meet_agree_on_losses_weights_and_numbers(made: Callable[..., Sum]) -> None:
    one = made(like=0.0, microbatches=2 * WORLD.size, numbers=2)
    for step in range(2):
        for m in one.own:
            one.put(m, 1.0, weight=2, loss=0.5 if step else np.nan)
        assert one.meet((WORLD.rank, 1)) == [sum(range(WORLD.size)), WORLD.size]
        assert (one.weight, one.bad_loss) == (4 * WORLD.size, None if step else 0)
        if step:
            assert one.loss == WORLD.size
            assert one.mean() == 1
        else:
            one.drop()
    assert one.node_ranks == WORLD.size
    assert one.cores == len(set[int]().union(*WORLD.allgather(os.sched_getaffinity(0))))


@pytest.mark.mpi
@pytest.mark.parametrize("nodes", [False, True])
def test_ranks_that_meet_before_all_is_put(
    made: Callable[..., Sum], monkeypatch: pytest.MonkeyPatch, nodes: bool
) -> None:
    """What only some have put can be dropped, or the rest be put: then all of it counts."""
    if nodes:
        monkeypatch.setenv("MPIML_NODES", ",".join("1" * WORLD.size))
    one = made(like=np.zeros(3), microbatches=2 * WORLD.size, numbers=1)
    for step in range(4):
        early = len(one.own) if WORLD.rank == LAST and step else 0
        for m in one.own[:early]:
            one.put(m, np.full(3, np.nan if step == 1 else 1.0), weight=step)
        assert one.meet([step]) == [step * WORLD.size]
        assert one.weight == 2 * step
        if step == 1:
            one.drop()
            early = 0
        for m in one.own[early:]:
            one.put(m, np.ones(3), weight=step, loss=0.5)
        np.testing.assert_array_equal(one.mean(), np.full(3, step > 0, float))
        assert one.weight == 2 * WORLD.size * step


@pytest.mark.mpi
def test_many_sums_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the MPI library holds is given back: it has some 2,000 communicators, and a Sum of two types takes 7."""
    monkeypatch.setenv("MPIML_NODES", ",".join("1" * WORLD.size))
    for _ in range(330 if WORLD.size <= 2 else 10):  # with more ranks than cores it takes long
        with Sum(like=[np.zeros(3), np.zeros(3, np.float32)]) as one:
            one.put(WORLD.rank, [np.ones(3), np.ones(3, np.float32)])
            total = one.sum(copy=False)
        assert total[0].tolist() == [WORLD.size] * 3
        assert one.weight == WORLD.size
    one.close()
    for call in (lambda: one.put(WORLD.rank, 1.0), one.mean, one.meet, one.drop):
        with pytest.raises(ConfigError, match="the sum is closed"):
            call()


@pytest.mark.mpi
@pytest.mark.parametrize("who", ["most", "all", "one"])  # in this order: what "one" would leave behind helps "most"
def test_a_sum_is_closed_in_the_middle_of_a_step(monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    monkeypatch.setenv("MPIML_NODES", ",".join("1" * WORLD.size))
    with Sum(like=np.zeros(3), microbatches=2 * WORLD.size) as one:
        if who == "all" or (WORLD.rank == LAST) == (who == "one"):
            one.put(one.own[0], np.ones(3))


@pytest.mark.mpi
@pytest.mark.parametrize("nodes", [False, True])
def test_a_sum_of_some_of_the_ranks(monkeypatch: pytest.MonkeyPatch, nodes: bool) -> None:
    """In another order, at the same time as a sum of the others."""
    if nodes and WORLD.size > 1:
        monkeypatch.setenv("MPIML_NODES", f"{WORLD.size - WORLD.size // 2},{WORLD.size // 2}")
    some = MPI.Intracomm(WORLD.Split(WORLD.rank % 2, -WORLD.rank))
    with Sum(some, like=np.zeros(3), microbatches=10) as one:
        assert one.own == Rows(20, 10, 10, comm=some).own
        for m in one.own:
            one.put(m, np.full(3, 10.0**m))
        assert one.sum().tolist() == [1111111111.0] * 3
    some.Free()
