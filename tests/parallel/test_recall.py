"""One rank calls all others to meet, whoever it is and whenever it asks; nothing is left of it afterwards."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from mpi4py import MPI

from mpiml.parallel.recall import Recall
from mpiml.team import allgather

pytestmark = pytest.mark.mpi
WORLD = MPI.COMM_WORLD
LIMIT = 20  # seconds


@pytest.fixture
def recall() -> Iterator[Recall]:
    made = Recall(WORLD)
    yield made
    assert not made.comm.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG)  # no message is left for the next one
    made.free()


def waited(recall: Recall) -> bool:
    """Whether this rank hears the call in time."""
    end = time.monotonic() + LIMIT
    while not recall.heard():
        if time.monotonic() > end:
            return False
        time.sleep(0.0005)
    return True


def meet(recall: Recall) -> list[bool]:
    """As at the end of a round. Returns which ranks spoke."""
    spoke = allgather(WORLD, recall.spoke)
    recall.settle(sum(spoke[1:]), spoke[0])
    heard = recall.heard() or recall.spoke
    assert not any(allgather(WORLD, heard))  # before anybody asks again
    return spoke


def test_nobody_asks(recall: Recall) -> None:
    for _ in range(3):
        assert not recall.heard()
        assert meet(recall) == [False] * WORLD.size


@pytest.mark.parametrize("asks", [0, 1, WORLD.size - 1])
def test_one_rank_asks_and_all_hear_it(recall: Recall, asks: int) -> None:
    """Again and again; whoever asks twice has asked once."""
    for _ in range(3):
        if WORLD.rank == asks % WORLD.size:
            recall.ask()
            recall.ask()
            assert recall.heard()
        assert waited(recall)
        spoke = meet(recall)
        assert spoke[asks % WORLD.size]
        assert spoke[0]  # which has called the others
        assert sum(spoke) == len({0, asks % WORLD.size})


def test_all_ask_at_once(recall: Recall) -> None:
    for _ in range(3):
        recall.ask()
        assert recall.heard()
        assert all(meet(recall)[:1])


@pytest.mark.parametrize("asks", [0, 1, WORLD.size - 1])
def test_asking_while_others_have_met_already(recall: Recall, asks: int) -> None:
    """They never hear it, neither then nor in the next round."""
    for _ in range(3):
        if WORLD.rank == asks % WORLD.size:
            recall.ask()
        assert meet(recall)[asks % WORLD.size]
        time.sleep(0.01)
        assert not any(allgather(WORLD, recall.heard()))


def test_some_ask_late_after_they_were_called(recall: Recall) -> None:
    if WORLD.rank == WORLD.size - 1:
        recall.ask()
    assert waited(recall)
    recall.ask()
    spoke = meet(recall)
    assert sum(spoke) <= 2  # those who were called say nothing any more
