"""Who learns when: summing and workers agree where they should, and one goes over into the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.config import Config
from mpiml.data.dataset import Dataset, open_dataset
from mpiml.errors import freed
from mpiml.nn.parameters import Parameter
from mpiml.parallel.state import OUTER, VALUES
from mpiml.training.run import Run, unsaved
from tests.parallel.gathered import gathered

Make = Callable[..., Run]
WORLD = MPI.COMM_WORLD


@pytest.fixture
def run() -> Iterator[Make]:
    """Makes runs of 6 steps, whose 8 micro-batches have 4 rows each."""
    made: list[Run] = []
    random = np.random.default_rng(0)
    x, y = random.standard_normal((64, 5)), random.integers(0, 3, 64)

    def make(**settings: Any) -> Run:
        given = {"hidden": (4,), "steps": 6, "batch": 32, "microbatches": 16, "eval_every": 0, "dtype": "float64"}
        made.append(unsaved(WORLD, Config(**given | settings), Dataset.from_arrays(x, y, x, y)))
        made[-1].data.ahead.__enter__()
        return made[-1]

    yield make
    for one in made:
        one.data.ahead.__exit__(None, None, None)
        one.free()


def trained(run: Run, first: int = 1) -> dict[str, bytes]:
    """Train to the end; the vectors of the model then."""
    while first <= run.config.steps:
        first = run.advance(first).steps[-1].step + 1
    return vectors(run)


def vectors(run: Run) -> dict[str, bytes]:
    return {name: vector.tobytes() for (_, name), vector in gathered(run.state).items()}


@pytest.mark.mpi
def test_averaging_plain_steps_at_every_step_is_summing(run: Make) -> None:
    """Of workers with equally many rows, without momentum and clipping; up to the order of additions."""
    settings = {"optimizer": "sgd", "lr": 0.5, "clip": 0.0}
    summed, apart = (
        trained(run(**settings)),
        trained(run(**settings, average_every=1, workers=4 if WORLD.size != 3 else 1)),
    )
    one, other = (np.frombuffer(each[VALUES]) for each in (summed, apart))
    np.testing.assert_allclose(other, one, rtol=1e-12, atol=1e-12)
    assert (one.tobytes() == other.tobytes()) is (WORLD.size == 3)  # of one worker these are the same steps


@pytest.mark.mpi
@pytest.mark.parametrize("optimizer", ["adamw", "nesterov"])
def test_one_worker_has_the_bits_of_summing(run: Make, optimizer: str) -> None:
    settings = {"optimizer": optimizer, "clip": 0.1, "ema": 0.5}
    assert trained(run(**settings, average_every=4, workers=1)) == trained(run(**settings))


@pytest.mark.mpi
@pytest.mark.parametrize("outer", [{}, {"outer_lr": 0.7, "outer_momentum": 0.9}])
def test_workers_begin_with_the_common_model(run: Make, outer: dict[str, float]) -> None:
    """Up to the step before, values and states are those of summing; then each worker has them, and the outer velocity
    is 0."""
    workers = 2 * WORLD.size if WORLD.size < 3 else WORLD.size
    settings = {"optimizer": "adam", "lr": 0.01, "microbatches": workers}
    summed, late = run(**settings), run(**settings, **outer, average_every=2, workers=workers, average_from=4)
    for step in (1, 2, 3):
        summed.advance(step)
        assert len(late.advance(step).steps) == 1
        assert late.learning.now.average is None
    before = vectors(summed)
    assert vectors(late) == before
    late.learning.begin(4)
    after = vectors(late)
    velocity = after.pop(OUTER, b"\0")
    assert after == before
    assert not any(velocity)
    assert late.learning.names(4, left=False) == (VALUES, "mean", "variance", *((OUTER,) if outer else ()))
    assert all(own.stage.sum.values.vector.tobytes().startswith(before[VALUES]) for own in late.learning.now.own)
    for name in ("mean", "variance"):
        assert len({learner.update.states[name].tobytes() for learner in late.learning.now.own}) == 1
        assert all(learner.update.states[name].any() for learner in late.learning.now.own)
    assert {learner.name for learner in late.learning.now.own} == {
        f"worker {late.learning.now.first + turn}: " for turn in range(len(late.learning.now.own))
    }
    assert [step.step for step in late.advance(4).steps] == [4, 5]
    assert len({learner.stage.sum.values.vector.tobytes() for learner in late.learning.now.own}) == 1
    assert vectors(late) != before


@pytest.mark.mpi
@pytest.mark.parametrize(
    "settings", [{}, {"memory": "private"}, {"pipe": 2}, {"nodes": "of one rank"}, {"allreduce": "mpi"}]
)
def test_every_rank_begins_with_the_common_model(
    run: Make, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not trained included; whether a worker has several ranks or a rank several workers."""
    if WORLD.size % settings.get("pipe", 1):
        return
    if settings.pop("nodes", ""):
        monkeypatch.setenv("MPIML_NODES", ",".join(["1"] * WORLD.size))
    workers = WORLD.size if WORLD.size == 3 else 2
    apart = {"average_every": 2, "workers": workers, "average_from": 2, "microbatches": 48}
    late = run(optimizer="adam", rates=("layers.2.*=0",), hidden=(40, 20), **apart, **settings)
    late.advance(1)
    before = gathered(late.state)
    late.learning.begin(2)
    now, stage = late.learning.now, late.grid.stage
    common = before[stage, VALUES].tobytes()
    assert all(learner.stage.sum.values.vector.tobytes().startswith(common) for learner in now.own)
    for name, part in now.state.parts.items():
        assert all(view.tobytes() == before[stage, name][slice(*of)].tobytes() for of, view in part.held.items())
    for name, state in now.own[0].update.states.items():
        assert state.any() or not state.size
        assert all(learner.update.states[name].tobytes() == state.tobytes() for learner in now.own)


def test_names_within_a_round_are_of_all_workers(run: Make) -> None:
    one = run(optimizer="nesterov", average_every=3, workers=2, outer_lr=0.5)
    state = one.learning.now.round_state()
    names = one.learning.names(1, left=True)
    assert names[:2] == (VALUES, OUTER)
    assert names[2:] == tuple(f"worker.{w}.{of}" for w in (0, 1) for of in (VALUES, one.state.names[1]))
    assert state.names == names


def test_workers_have_one_mean_but_values_of_their_own(run: Make) -> None:
    """Within a round; and a rank that has several sends nothing to other nodes."""
    one = run(average_every=2, workers=4)
    before = vectors(one)
    one.advance(1)
    owns = [learner.stage.sum.values.vector for learner in one.learning.now.own]
    assert len({id(own.base) for own in owns} | {own.ctypes.data for own in owns}) >= 4
    assert len({own.tobytes() for own in owns}) == 1
    assert vectors(one)[VALUES] != before[VALUES]
    assert one.learning.now.sent == 0


@pytest.mark.mpi
def test_bytes_sent_go_on_when_workers_begin_to_learn_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIML_NODES", ",".join("1" * WORLD.size))
    settings = Config(average_every=2, average_from=3, workers=WORLD.size, steps=8, log_every=1, eval_every=0)
    run = unsaved(WORLD, settings, open_dataset("digits"))
    with freed(run, WORLD.size), run.data.ahead:
        sent = [done.sent for step in (1, 2, 3, 5, 7) for done in run.advance(step).steps]
    assert sent == sorted(sent)
    assert WORLD.size == 1 or 0 < sent[0] < sent[1] < sent[3] < sent[5] < sent[7]
    assert sent[1] == sent[2]  # nothing within a round


def test_first_values_are_not_drawn_again_when_workers_begin_to_learn_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PyTorch module's are those that it has, which are other ones by then."""
    drawn, draw = [], Parameter._draw

    def count(parameter: Parameter, *how: Any) -> int:
        drawn.append(parameter.name)
        return draw(parameter, *how)

    monkeypatch.setattr(Parameter, "_draw", count)
    run = unsaved(MPI.COMM_SELF, Config(average_every=2, average_from=2, workers=2, steps=3), open_dataset("digits"))
    before = len(drawn)
    with freed(run, 1), run.data.ahead:
        assert [len(run.advance(step).steps) for step in (1, 2)] == [1, 2]
    assert len(drawn) == before > 0
