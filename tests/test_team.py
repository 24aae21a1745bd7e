"""Waiting leaves the cores to those who work, and what ranks tell each other arrives whole, however long it is."""

from __future__ import annotations

import time

import pytest
from mpi4py import MPI

from mpiml import team
from mpiml.team import ENVELOPE, allgather, broadcast, until

COMM = MPI.COMM_WORLD


@pytest.mark.mpi
@pytest.mark.parametrize("root", [0, -1])
def test_broadcast_of_every_length(root: int) -> None:
    """Around the length at which a second message is needed, too."""
    root %= COMM.size
    for length in (0, 1, *range(ENVELOPE - 100, ENVELOPE + 20), 100_000):
        text = bytes(index % 251 for index in range(length))
        assert broadcast(COMM, text if COMM.rank == root else None, root) == text


@pytest.mark.mpi
def test_allgather_of_values_of_all_lengths() -> None:
    found = allgather(COMM, ["x" * COMM.rank * 5000, COMM.rank, None])
    assert found == [["x" * rank * 5000, rank, None] for rank in range(COMM.size)]


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
