"""An evaluation has the same sums on every grid, and all ranks leave it before the same chunk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml.clock import Clock
from mpiml.data.dataset import Split
from mpiml.data.sources import ArraySource
from mpiml.errors import NotFiniteError
from mpiml.parallel import grid as grids
from mpiml.parallel import votes as ballots
from mpiml.parallel.record import Record
from mpiml.parallel.stage import Computation, Stage
from mpiml.team import Team
from mpiml.training.evaluation import Evaluation

pytestmark = pytest.mark.mpi
WORLD = MPI.COMM_WORLD
PIPES = [pipe for pipe in (1, 2, 4) if WORLD.size % pipe == 0]
METRIC: Any = SimpleNamespace(columns=2)


class Scored:
    """Scores rows that are their own losses on a grid; `done` counts the chunks that have passed this rank."""

    def __init__(self, values: NDArray[np.float64], pipe: int, chunk_rows: int = 1):
        self.grid, self.done = grids.build(Team(WORLD, Clock()), pipe), 0
        split = Split(ArraySource(values[:, None]), ArraySource(values))
        self.tests = Evaluation(split, chunk_rows, self.grid, "float64")
        shapes: Any = {"x_shape": (1,), "y_shape": (1,), "dtype": "float64"}
        part = Computation(self.forward, lambda *at: None, self.objective, **shapes, learns=False, learned=False)
        self.stage = Stage(self.grid.pipe, part, Clock())

    def forward(self, x: Any, at: Any) -> Any:
        self.done += 1
        return x, None

    def objective(self, y: Any, labels: Any, weights: Any, measured: bool, at: Any) -> Any:
        np.testing.assert_array_equal(y[:, 0], labels)
        return [float(y.sum()), float(len(y)), float(3 * y.sum()), 1.0], y

    def score(self, stop: Callable[[], bool] | None = None) -> Record | None:
        self.done = 0
        return self.tests.score(self.stage, METRIC, Clock(), 1, stop)


@pytest.mark.parametrize("pipe", PIPES)
@pytest.mark.parametrize("chunks", [1, 24])
def test_sums_are_exact(pipe: int, chunks: int) -> None:
    """Of numbers whose sum in another order would differ in all digits that matter."""
    values = np.random.default_rng(chunks).permutation(np.tile([1e16, 1.0, -1e16, 1e-8], 6))[:chunks]
    record = Scored(values, pipe).score()
    loss, third = math.fsum(values), math.fsum(3 * values)
    assert record == Record(loss, float(chunks), [third, float(chunks)])
    assert record == Scored(values, pipe).score(lambda: False)


@pytest.mark.parametrize("pipe", PIPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_first_chunk_that_is_not_finite_is_named(pipe: int, bad: float) -> None:
    values = np.arange(24.0)
    values[[15, 20]] = bad
    with pytest.raises(NotFiniteError, match=r"chunk 7\)"):
        Scored(values, pipe, chunk_rows=2).score()


@pytest.mark.parametrize("pipe", PIPES)
@pytest.mark.parametrize(("who", "when"), [(WORLD.size - 1, 0), (0, 2)])
def test_all_ranks_leave_before_the_same_chunk_soon(pipe: int, who: int, when: int, monkeypatch: Any) -> None:
    """And no message is left over that a later evaluation would take for its own."""
    monkeypatch.setattr(ballots, "PAUSE", 0.0)
    scored = Scored(np.arange(23.0 * WORLD.size), pipe)
    whole = scored.score()
    assert scored.score(lambda: who == WORLD.rank and scored.done >= when) is None
    everyones = WORLD.allgather(scored.done)
    assert set(everyones) == {(-(-when // pipe) + 1) * pipe}
    assert scored.score() == whole


@pytest.mark.parametrize("pipe", PIPES)
def test_who_asks_in_the_last_chunks_comes_too_late(pipe: int, monkeypatch: Any) -> None:
    """Those with fewer chunks than others take part all the same."""
    monkeypatch.setattr(ballots, "PAUSE", 0.0)
    scored = Scored(np.arange(2.0 * pipe * WORLD.size + 1), pipe)
    asked: list[int] = []

    def stop() -> bool:
        asked.append(scored.done)
        return len(asked) == votes

    votes = -(-scored.tests.chunks // scored.grid.replicas // pipe)
    assert scored.score(stop) == scored.score()
    assert len(asked) == votes


def test_quick_chunks_are_voted_on_seldom() -> None:
    """At a pause that the slowest rank sets for all."""
    asked = list[int]()
    series = ballots.Votes(Team(WORLD, Clock()), 1, lambda: bool(asked.append(1)))
    for _ in range(100):
        assert series.go_on()
        time.sleep(0.004 if WORLD.rank == 0 else 0.0)
    assert series.finish()
    assert 3 <= len(asked) <= 10
    assert len(set(WORLD.allgather(len(asked)))) == 1
