"""A round of workers: its lines, a worker that cannot go on, and one that is left and gone on with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml.config import Config
from mpiml.data.dataset import open_dataset
from mpiml.errors import NotFiniteError, freed
from mpiml.parallel.state import Source
from mpiml.training.accounts import LINES, STEPS, WEIGHTS, arrays_of, check_left
from mpiml.training.rounds import Round
from mpiml.training.run import NEVER, Run, unsaved

Make = Callable[..., Run]
WORLD = MPI.COMM_WORLD


@pytest.fixture
def run() -> Iterator[Make]:
    """Makes runs of 8 steps of 4 workers, on one rank."""
    made: list[Run] = []

    def make(**settings: Any) -> Run:
        given = {"hidden": (4,), "steps": 8, "average_every": 4, "workers": 4, "microbatches": 8, "log_every": 3}
        made.append(unsaved(MPI.COMM_SELF, Config(**given | settings), open_dataset("digits")))
        made[-1].data.ahead.__enter__()
        return made[-1]

    with np.errstate(all="ignore"):
        yield make
    for one in made:
        one.data.ahead.__exit__(None, None, None)
        one.free()


def arrays(left: Round) -> dict[str, NDArray[Any]]:
    return arrays_of(left.workers, left.reported.logged, left.steps)


def values(run: Run) -> bytes:
    return run.stage.sum.values.vector.tobytes()


class Leave:
    """Asks to leave a round when it is asked for the n-th time."""

    def __init__(self, n: int):
        self.n = n

    def now(self) -> bool:
        return self.n <= 0

    def within(self, rest: float, step: float, copies: int) -> bool:
        assert copies == 4
        self.n -= 1
        return self.n <= 0


def test_lines_of_a_round(run: Make) -> None:
    """The steps that are logged have all, the last one its loss, and others nothing."""
    one = run()
    steps = [step for first in (1, 5) for step in one.advance(first).steps]
    assert [step.step for step in steps] == list(range(1, 9))
    assert [step.step for step in steps if step.logged] == [3, 6, 8]
    assert [step.step for step in steps if step.loss is not None] == [3, 4, 6, 8]
    for step in steps:
        assert (step.workers is not None) is step.logged
        if step.workers:
            assert step.workers["loss"]["min"] < step.loss < step.workers["loss"]["max"]
            assert step.workers["distance"] > 0
            assert step.norm
            assert step.score is not None
    assert not any(step.stop for step in steps)


def test_a_worker_that_cannot_go_on_is_named(run: Make) -> None:
    """Others take their steps, and what is raised at the end of the round is of the first of those that cannot."""
    one = run(optimizer="sgd", clip=0.0)
    made = Round(one.learning.now, range(1, 5), [3], one.model.metric.columns)
    for worker in (3, 2):
        one.learning.now.own[worker].stage.sum.values.vector[:] = np.nan
    made.train(one.data.ahead.batches, NEVER)
    assert [account.done for account in made.accounts] == [4, 4, 0, 0]
    with pytest.raises(
        NotFiniteError, match=r"^worker 2: the loss is not finite in step 1 \(micro-batch 4, rank 0\)"
    ) as error:
        made.meet(False)
    assert error.value.everywhere


def test_weights_that_are_not_finite_after_the_last_step_are_refused(run: Make) -> None:
    one = run(average_every=1, optimizer="sgd", lr=1e38, weight_decay=1e4, log_every=9)
    with pytest.raises(NotFiniteError, match="worker 0: weights are not finite after step 1"):
        one.advance(1)


@pytest.mark.parametrize("asked", [1, 2, 3, 5, 9, 11])
def test_a_round_that_was_left_goes_on_where_it_was(run: Make, asked: int) -> None:
    """With another log, too: what it tells of was settled when it began."""
    whole, left, after = run(), run(), run(log_every=1)
    expected = [whole.advance(1), whole.advance(5)][1]
    left.advance(1)
    done = left.advance(5, Leave(asked))
    assert (done.stop, done.steps) == (True, [])
    assert done.left
    saved = arrays(done.left)
    state = left.learning.now.round_state()
    check_left(saved, int(saved[STEPS].min()), left.calendar, left.model.metric.columns, "c")
    assert set(saved[STEPS]) == {5 + (asked - 1) // 4}
    after.learning.now.round_state().take([state.copied()])
    after.learning.left = saved
    gone_on = after.advance(5)
    assert values(after) == values(whole)
    for now, was in zip(gone_on.steps, expected.steps, strict=True):
        assert (now.loss, now.norm, now.score, now.workers, now.logged) == (
            was.loss,
            was.norm,
            was.score,
            was.workers,
            was.logged,
        )
        assert now.seconds == 0.0


def test_workers_that_were_left_at_different_steps_end_alike(run: Make) -> None:
    """As those of several ranks may be: of two runs that were left, one gives two workers, the other the other two."""
    whole, after = run(), run()
    whole.advance(1)
    whole.advance(5)
    given: list[tuple[dict[str, NDArray[Any]], Source]] = []
    for asked in (1, 9):
        one = run()
        one.advance(1)
        left = one.advance(5, Leave(asked)).left
        assert left
        given.append((arrays(left), one.learning.now.round_state().copied()))
    (early, vectors), (late, others) = given
    for name in (STEPS, WEIGHTS, LINES):
        early[name][2:] = late[name][2:]
    of_others = {key: views for key, views in others.own.items() if key[1].startswith(("worker.2.", "worker.3."))}
    assert early[STEPS].tolist() == [5, 5, 7, 7]
    after.learning.now.round_state().take([vectors._replace(own=vectors.own | of_others)])
    after.learning.left = early
    after.advance(5)
    assert values(after) == values(whole)


def test_one_that_asks_in_the_last_step_leaves_nothing(run: Make) -> None:
    done = run().advance(1, Leave(13))
    assert (len(done.steps), done.left) == (4, None)


class OneAsks:
    """A request to stop that only rank 1 has got, after a few steps."""

    def __init__(self) -> None:
        self.steps = 0

    def now(self) -> bool:
        return False

    def within(self, rest: float, step: float, copies: int) -> bool:
        self.steps += 1
        time.sleep(0.002)
        return WORLD.rank == 1 and self.steps > 3


@pytest.mark.mpi
@pytest.mark.skipif(WORLD.size % 4 > 0, reason="needs two workers of two ranks")
def test_all_leave_a_round_if_a_neighbour_of_rank_0_asks() -> None:
    settings = Config(average_every=400, workers=2, microbatches=WORLD.size, steps=400, hidden=(4,), eval_every=0)
    run = unsaved(WORLD, settings, open_dataset("digits"))
    with freed(run, WORLD.size), run.data.ahead:
        left = run.advance(1, OneAsks()).left
    assert left
    assert left.accounts[0].done < 200
