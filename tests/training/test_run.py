"""A run's step and its store, without a program around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.clock import Clock
from mpiml.config import Config
from mpiml.data.dataset import open_dataset
from mpiml.errors import NotFiniteError, freed
from mpiml.run import step_files
from mpiml.run.deadline import Deadline
from mpiml.run.failure import Guard
from mpiml.run.saving import File, Saver
from mpiml.training.calendar import Due
from mpiml.training.hold import Hold
from mpiml.training.run import Run, unsaved
from mpiml.training.storage import Store

OVERFLOW = {"optimizer": "sgd", "lr": 1e38, "weight_decay": 1e4}  # of weights, whatever the gradient is


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    settings: dict[str, Any] = {"hidden": (4,), "steps": 9, "eval_every": 0} | getattr(request, "param", {})
    made = unsaved(MPI.COMM_SELF, Config(**settings), open_dataset("digits"))
    with freed(made, 1), made.data.ahead, np.errstate(all="ignore"):
        yield made


def test_what_is_due(run: Run) -> None:
    assert run.calendar.due(4) == Due()
    assert run.calendar.due(9) == Due(log=True, save=True, evaluation=False)  # all after the last step, but what is off


@pytest.mark.parametrize("due", [Due(log=True), Due(save=True), Due(evaluation=True)])
@pytest.mark.parametrize("run", [OVERFLOW], indirect=True)
def test_weights_are_looked_at_before_they_are_shown_or_saved(run: Run, due: Due) -> None:
    """The gradient is finite, and so are the loss and the step's record; the update is not."""
    with pytest.raises(NotFiniteError, match="weights are not finite after step 1; a smaller --lr") as caught:
        run.step(1, due)
    assert caught.value.everywhere


@pytest.mark.parametrize("run", [OVERFLOW], indirect=True)
def test_weights_that_nobody_sees_are_refused_by_the_next_step(run: Run) -> None:
    run.step(1)
    with pytest.raises(NotFiniteError, match="weights are not finite after step 1"):
        run.step(2)


@pytest.mark.mpi
def test_leaves_say_which_micro_batches_a_rank_has() -> None:
    """One whose replica has nothing but NaN is named; another leaf would name another rank."""
    ranks, bad = MPI.COMM_WORLD.size, MPI.COMM_WORLD.size // 2
    config = Config(microbatches=6 * ranks + 3, leaf=3, memory="private", hidden=(4,), steps=9, eval_every=0)
    made = unsaved(MPI.COMM_WORLD, config, open_dataset("digits"))
    first, last = bad * (2 * ranks + 1) // ranks * 3, made.data.shards.last
    with freed(made, ranks), made.data.ahead, np.errstate(all="ignore"):
        assert made.pace().microbatches[MPI.COMM_WORLD.rank] == last - made.data.shards.first
        assert made.pace().microbatches.sum() == 6 * ranks + 3
        if MPI.COMM_WORLD.rank == bad:
            made.stage.sum.values.vector[:] = np.nan
        with pytest.raises(NotFiniteError, match=rf"step 1 \(micro-batch {first}, rank {bad}\)"):
            made.step(1)


def test_a_step_is_measured_if_it_is_logged_and_asks_once_for_a_stop(run: Run) -> None:
    asked = []
    plain = run.step(1, stop=lambda: bool(asked.append(1)))
    logged = run.step(2, Due(log=True), lambda: True)
    assert (plain.score, plain.norm, plain.stop, len(asked)) == (None, None, False, 1)
    assert logged.score is not None
    assert 0.0 <= logged.score <= 1.0
    assert logged.norm
    assert logged.stop
    assert (logged.step, logged.epoch) == (2, 1)


@pytest.mark.parametrize("run", [{"ema": 0.5, "eval_rows": 50}], indirect=True)
def test_an_evaluation_of_the_average_leaves_the_weights_alone(run: Run) -> None:
    """Also one that is cut short, or that fails."""
    values, average = run.stage.sum.values.vector, run.update.states["ema"]
    for step in (1, 2, 3):
        run.step(step)
    before = values.tobytes(), average.tobytes()
    scored = run.evaluate(3, lambda: False)
    assert (values.tobytes(), average.tobytes()) == before
    assert run.evaluate(3, lambda: True) is None
    assert (values.tobytes(), average.tobytes()) == before
    weights = values[: average.size].copy()
    values[: average.size] = average
    record = run.data.tests.score(run.stage, run.model.metric, Clock(), 3)
    assert record
    assert scored
    assert scored.loss == record.mean_loss
    values[: average.size], average[...] = weights, np.nan
    with pytest.raises(NotFiniteError, match="the test loss is not finite after step 3"):
        run.evaluate(3, lambda: False)
    assert values.tobytes() == before[0]


def test_a_step_is_saved_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    begin = Saver.begin

    def counted(saver: Saver, prepare: Callable[[], File], *more: Any) -> None:
        def noted() -> File:
            file = prepare()
            written.append(step_files.step_of(file.path))
            return file

        begin(saver, noted, *more)

    monkeypatch.setattr(Saver, "begin", counted)
    monkeypatch.chdir(tmp_path)
    with Hold(Guard(run.grid.team, "mpiml.train")) as hold:
        hold.opened(run, "digits")
        store = Store(run, hold, Deadline())
        for step in (1, 1, 2):
            store.save(step)
    assert written == [1, 2]


@pytest.mark.parametrize("run", [{"average_every": 4}], indirect=True)
def test_each_step_of_a_round_is_seen_when_it_is_done(run: Run) -> None:
    seen: list[int] = []
    run.advance(1, moved=seen.append)
    run.advance(5, moved=seen.append)
    run.advance(9, moved=seen.append)
    assert seen == [*range(1, 10)]


def test_arithmetic_is_fixed_after_a_users_code_has_had_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a module is tried, and when loss and metric have been made, whose code comes last."""
    torch = pytest.importorskip("torch")
    from mpiml.devices.fake import Fake
    from mpiml.nn import torch_modules

    done = list[str]()

    def net(shape: Any, outputs: int) -> Any:
        done.append("model")
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, outputs))

    def loss(y: Any, labels: Any) -> Any:
        done.append("loss")
        return torch.nn.functional.cross_entropy(y, labels, ignore_index=-1, reduction="none")

    def noted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **named: (done.append(name), real(*arguments, **named))[1]

    monkeypatch.setattr(Fake, "fix_arithmetic", noted("fixed", Fake.fix_arithmetic))
    monkeypatch.setattr(torch_modules, "attempt", noted("tried", torch_modules.attempt))
    monkeypatch.setattr("tests.usercode.noted_loss", loss, raising=False)
    config = Config(device="fake", microbatches=1, steps=1, eval_every=0, loss="tests.usercode:noted_loss")
    with freed(unsaved(MPI.COMM_SELF, config, open_dataset("digits"), net), 1):
        order = [name for index, name in enumerate(done) if index == 0 or done[index - 1] != name]
    assert order[-1] == "fixed"
    assert order.index("model") < order.index("fixed", 1) < order.index("tried")
