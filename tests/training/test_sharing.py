"""What a run says of its grid and its workers."""

from __future__ import annotations

from typing import Any

import pytest

from mpiml.config import Config
from mpiml.training.sharing import grid_text, workers_text


@pytest.mark.parametrize(
    ("replicas", "microbatches", "workers", "fewest"),
    [(2, 6, None, 4), (2, 6, 6, None), (4, 12, 4, None), (8, 24, 4, 16), (6, 18, 3, 12), (4, 16, 2, None)],
)
def test_fewest_messages_are_those_of_each_workers_own_sum(
    replicas: int, microbatches: int, workers: int | None, fewest: int | None
) -> None:
    text = grid_text(1, replicas, microbatches, workers)
    assert (f"(--microbatches {fewest} would need the fewest messages on this one)" in text) == (fewest is not None)
    assert ("fewest" in text) == (fewest is not None)


@pytest.mark.parametrize(
    ("replicas", "settings", "line"),
    [
        (4, {}, "4 workers: learning apart from step 1 on, averaged every 8 steps"),
        (2, {"average_every": 1}, "4 workers, 2 to a replica: learning apart from step 1 on, averaged every step"),
        (
            8,
            {"average_from": 5, "outer_lr": 0.7},
            "4 workers of 2 replicas: learning apart from step 5 on, averaged every 8 steps by an outer step, "
            "rate 0.7, momentum 0",
        ),
    ],
)
def test_a_run_says_how_many_learn_apart_and_when_they_meet(replicas: int, settings: Any, line: str) -> None:
    assert workers_text(Config(**{"average_every": 8, "workers": 4} | settings), replicas) == [line]


def test_without_workers_nothing_is_said_of_them() -> None:
    assert not workers_text(Config(), 4)
