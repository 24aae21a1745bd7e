"""The best evaluations: which they are, which checkpoints they keep, and when there have been enough of others."""

from __future__ import annotations

import functools
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.errors import ConfigError, RunError
from mpiml.nn.losses import Accuracy
from mpiml.run import checkpoint, step_files
from mpiml.run.log import Log
from mpiml.run.process import StopRequest
from mpiml.run.saving import Saver
from mpiml.train import train
from mpiml.training import storage
from mpiml.training.best import Best, best_of

NAN = math.nan


def of(*scores: float | None, higher: bool = False, keep: int = 2, patience: int = 2) -> Best:
    """After evaluations at steps 10, 20 and so on."""
    best = Best("loss", "test loss", higher, keep, patience, lambda step: step % 10 == 0)
    for number, score in enumerate(scores, 1):
        best.add(10 * number, score)
    return best


@pytest.mark.parametrize(
    ("scores", "higher", "steps"),
    [
        ((), False, []),
        ((3.0,), False, [10]),
        ((3.0, 2.0, 1.0), False, [30, 20]),
        ((3.0, 2.0, 1.0), True, [10, 20]),
        ((2.0, 3.0, 1.0), False, [30, 10]),
        ((1.0, 1.0, 1.0), False, [10, 20]),
        ((1.0, 1.0, 1.0), True, [10, 20]),
        ((NAN, 5.0, None, math.inf, 6.0), False, [20, 50]),
        ((NAN, 5.0, None, math.inf, 6.0), True, [50, 20]),
        ((None, NAN), True, []),
    ],
)
def test_the_best_come_first_and_of_equal_ones_the_earlier(scores: Any, higher: bool, steps: list[int]) -> None:
    best = of(*scores, higher=higher)
    assert best.steps == steps
    assert best.result(Path("none")).get("best_step") == (steps[0] if steps else None)
    none = of(*scores, higher=higher, keep=0)
    assert (none.steps, none.since, none.result(Path())) == ([], best.since, best.result(Path()))


def test_an_evaluation_is_among_the_best_or_not() -> None:
    best = of(keep=2)
    assert [best.add(step, score) for step, score in enumerate([5.0, 6.0, 6.0, 4.0, 5.5, 5.0, NAN])] == [
        *(True, True, False, True, False, False, False)
    ]


def test_an_evaluation_at_the_end_alone_takes_no_place_from_others() -> None:
    best = of(3.0, 2.0, 1.0)
    assert best.add(35, 0.5)
    assert best.steps == [35, 30, 20]
    assert best.result(Path("none"))["best_step"] == 35
    best.add(40, 1.5)  # another number of steps between evaluations, now
    assert best.steps == [35, 30]
    assert (of(3.0, 2.0).add(35, 4.0), of(keep=0).add(5, 1.0)) == (False, False)
    once = of(3.0, keep=1)
    once.add(15, 2.0)
    once.add(20, NAN)
    assert once.steps == [15]


@pytest.mark.parametrize(
    ("scores", "since", "reason"),
    [
        ((), 0, None),
        ((1.0, 2.0), 1, None),
        ((1.0, 2.0, 1.0), 2, "no better test loss in 2 evaluations since step 10"),
        ((1.0, 2.0, 1.5, NAN), 3, "no better test loss in 3 evaluations since step 10"),
        ((1.0, 2.0, 0.5), 0, None),
        ((None, NAN), 2, "no test loss was a number in 2 evaluations"),
    ],
)
def test_enough_are_so_many_in_a_row_without_a_better_one(scores: Any, since: int, reason: str | None) -> None:
    best = of(*scores)
    assert (best.since, best.enough, best.reason) == (since, reason is not None, reason)
    assert not of(*scores, patience=0).enough
    assert of(1.0, 2.0, patience=1).reason == "no better test loss in 1 evaluation since step 10"


# A run that overfits: its best test losses are those of steps 8 and 6, its best accuracies others.
SETTINGS: dict[str, Any] = {"hidden": (16,), "batch": 20, "microbatches": 2, "lr": 0.03, "quiet": True, "log_every": 1}
SETTINGS |= {"steps": 40, "eval_every": 2, "save_every": 5, "keep": 1}


def noisy() -> Dataset:
    random = np.random.default_rng(0)
    x = random.normal(size=(120, 12)).astype(np.float32)
    y = (x[:, 0] > 0) ^ (random.random(120) < 0.3)
    return Dataset.from_arrays(x[:40], y[:40].astype(int), x[40:], y[40:].astype(int))


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the disk: no power fails here."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def run_of(path: Path, **settings: Any) -> dict[str, Any]:
    given = SETTINGS | settings
    return train(Config(**given, out=str(path), given=frozenset(given)), data=noisy())


def kept(path: Path) -> list[int]:
    return sorted(int(file.stem[5:]) for file in (path / "checkpoints").iterdir())


def lines(path: Path) -> list[dict[str, Any]]:
    entries = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in entry.items() if k not in ("seconds", "samples_per_second", "time")} for entry in entries]


def scores(path: Path, name: str = "loss") -> dict[int, float]:
    return {line["step"]: line["evaluation"][name] for line in lines(path) if "evaluation" in line}


def outcome(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in ("seconds", "samples_per_second")}


@functools.cache
def losses() -> dict[int, float]:
    """The test losses of the run, however it is saved."""

    with tempfile.TemporaryDirectory() as folder:
        run_of(Path(folder) / "run", save_every=0)
        return scores(Path(folder) / "run")


def ranked(last: int = 40) -> list[int]:
    return sorted((step for step in losses() if step <= last), key=losses().__getitem__)


@pytest.mark.parametrize(("save_every", "newest"), [(5, [40]), (0, [])])
def test_checkpoints_of_the_best_are_kept_besides_the_newest(
    tmp_path: Path, save_every: int, newest: list[int]
) -> None:
    result = run_of(tmp_path / "run", keep_best=2, save_every=save_every)
    best, second, *_ = ranked()
    assert best % 5, "is not saved anyhow"
    newest = newest or [max(best, second)]
    assert kept(tmp_path / "run") == sorted({best, second, *newest})
    file = f"checkpoints/{step_files.file_name(best)}"
    assert (result["best_step"], result["best_score"], result["best_checkpoint"]) == (best, losses()[best], file)
    saved = checkpoint.load(tmp_path / "run" / file)
    assert saved.step == best


def test_what_is_no_longer_among_the_best_is_removed_after_the_last_evaluation_too(tmp_path: Path) -> None:
    run_of(tmp_path / "run", keep_best=1, steps=ranked()[0])
    assert kept(tmp_path / "run") == ranked()[:1]


def test_without_the_file_the_best_step_is_still_named(tmp_path: Path) -> None:
    result = run_of(tmp_path / "run")
    assert kept(tmp_path / "run") == [40]
    assert (result["best_step"], result["best_checkpoint"]) == (ranked()[0], None)
    assert (result["reason"], result["status"]) == (None, "done")


def test_the_best_by_a_metric(tmp_path: Path) -> None:
    result = run_of(tmp_path / "run", keep_best=1, best="accuracy")
    by_step = scores(tmp_path / "run", "accuracy")
    best = max(by_step, key=by_step.__getitem__)  # the first of the equal ones
    assert best != ranked()[0]
    assert (result["best_step"], result["best_score"]) == (best, by_step[best])
    assert kept(tmp_path / "run") == sorted({best, 40})


def test_patience_ends_a_run_which_then_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, best = tmp_path / "run", ranked()[0]
    result = run_of(run, patience=4, keep_best=1, quiet=False)
    end = best + 8
    reason = f"no better test loss in 4 evaluations since step {best}"
    assert (result["status"], result["exit_code"], result["reason"]) == ("done", 0, reason)
    assert (result["step"], result["saved"], kept(run)) == (end, end, [best, end])
    said = capsys.readouterr().out
    assert f"ended by --patience: {reason}\n" in said
    assert f"at step {best}: {run}/{result['best_checkpoint']}\n" in said
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert run_of(run, patience=4, keep_best=1, resume=True, quiet=False) == result
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert f"is finished after step {end} ({reason}): nothing to do" in capsys.readouterr().out
    run_of(run, patience=4, keep_best=1, resume=True, epochs=20, steps=None)  # which are as many steps
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (run / "result.json").unlink()
    assert outcome(run_of(run, resume=True)) == outcome(result)


def test_a_stop_that_is_asked_for_in_the_last_step_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, end = [0], ranked()[0] + 8

    def now(stop: object) -> bool:
        asked[0] += 1
        return asked[0] == 1 + end  # once before the first step, and once in each

    monkeypatch.setattr(StopRequest, "now", now)
    result = run_of(tmp_path / "run", patience=4)
    assert (asked[0], result["step"], result["status"], result["exit_code"]) == (1 + end, end, "done", 0)


def test_a_job_that_goes_on_knows_the_best_and_the_end_from_its_start(tmp_path: Path, monkeypatch: Any) -> None:
    """Whether it then fails, or is asked to stop when there is nothing left to do."""

    def fail(log: Log, text: str) -> None:
        raise Killed("killed")

    run = tmp_path / "run"
    whole = run_of(run, patience=4, keep_best=1)
    with monkeypatch.context() as patch:
        patch.setattr(Log, "say", fail)
        with pytest.raises(Killed):
            run_of(run, resume=True, steps=39)
    failed = json.loads((run / "result.json").read_text())
    assert (failed["status"], failed["best_checkpoint"]) == ("failed", whole["best_checkpoint"])
    monkeypatch.setattr(StopRequest, "now", lambda stop: True)
    assert outcome(run_of(run, resume=True)) == outcome(whole)


@pytest.mark.parametrize("patience", [0, 6, 2])
def test_another_patience_is_that_of_the_start(tmp_path: Path, patience: int) -> None:
    run_of(tmp_path / "run", patience=4, keep_best=1)
    whole = run_of(tmp_path / "whole", patience=patience, keep_best=1)
    result = run_of(tmp_path / "run", resume=True, patience=patience)
    if patience < 4:
        ended = "no better test loss in 4 evaluations" if patience else None
        assert (result["reason"] or "")[: len(ended or "")] == (ended or "")
    if patience != 2:
        assert outcome(result) == outcome(whole)
        assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_with_patience_and_nothing_saved_the_end_is_not_saved(tmp_path: Path) -> None:
    result = run_of(tmp_path / "run", patience=1, save_every=0)
    assert (result["saved"], kept(tmp_path / "run")) == (0, [])
    assert result["step"] < 40


class Killed(RunError):
    pass


def killing(monkeypatch: pytest.MonkeyPatch, at: int) -> Callable[[], int]:
    """Let the `at`-th of these moments end the run: before each piece that is written or removed. Returns how many
    there were."""
    moments = [0]

    def wrapped(function: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            moments[0] += 1
            if moments[0] == at:
                raise Killed("killed")
            return function(*arguments, **more)

        return call

    places = (
        (Saver, "begin"),
        (Saver, "_send_digests"),
        (Saver, "_finish"),
        (Saver, "_end"),
        (storage, "update_result"),
        (Log, "evaluation"),
    )
    for owner, name in (*places, (storage.Store, "save_best"), (storage.Store, "saved")):
        monkeypatch.setattr(owner, name, wrapped(getattr(owner, name)))
    return lambda: moments[0]


SHORT = {"steps": 20, "keep_best": 2, "patience": 2, "save_every": 3, "keep": 2}


def test_killed_at_any_moment_a_run_decides_as_one_that_was_not(tmp_path: Path, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        moments = killing(patch, 0)
        whole = run_of(tmp_path / "whole", **SHORT)
    assert whole["reason"]
    assert whole["step"] < 20
    for at in range(1, moments() + 1):
        run = tmp_path / str(at)
        with monkeypatch.context() as patch:
            killing(patch, at)
            with pytest.raises(Killed):
                run_of(run, **SHORT)
        assert outcome(run_of(run, **SHORT, resume=True)) == outcome(whole), at
        assert lines(run) == lines(tmp_path / "whole"), at
        assert kept(run) == kept(tmp_path / "whole"), at


@pytest.mark.parametrize("gone", [True, False])
def test_a_best_checkpoint_that_is_gone_or_damaged_changes_nothing_else(tmp_path: Path, gone: bool) -> None:
    whole = run_of(tmp_path / "whole", keep_best=1)
    run_of(tmp_path / "run", keep_best=1, steps=20)
    (best,) = {whole["best_step"]} & set(kept(tmp_path / "run"))
    file = tmp_path / "run" / "checkpoints" / step_files.file_name(best)
    file.unlink() if gone else file.write_bytes(b"damaged")
    result = run_of(tmp_path / "run", steps=40, resume=True)
    assert outcome(result) == outcome(whole) | ({"best_checkpoint": None} if gone else {})
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_rounds_of_workers_keep_as_few_checkpoints() -> None:
    """Evaluations wait for the ends of rounds, which are at other steps than the multiples of --eval-every."""
    best = best_of(Config(average_every=7, steps=40, eval_every=10, keep_best=1), Accuracy())
    kept = []
    for step, loss in ((14, 3.0), (21, 2.0), (35, 1.0), (40, 0.5)):
        best.add(step, loss)
        kept.append(best.steps)
    assert kept == [[14], [21], [35], [40]]
    end = best_of(Config(average_every=7, steps=18, eval_every=10, keep_best=1), Accuracy())
    end.add(14, 3.0)
    end.add(18, 2.0)
    assert end.steps == [18, 14]  # that of step 18 is there only because the run ends


def test_an_evaluation_at_the_end_alone_does_not_count_in_a_longer_run(tmp_path: Path) -> None:
    run_of(tmp_path / "run", steps=11, eval_every=4, keep_best=3)
    assert 11 in scores(tmp_path / "run")
    result = run_of(tmp_path / "run", steps=40, resume=True)
    whole = run_of(tmp_path / "whole", eval_every=4, keep_best=3)
    assert outcome(result) == outcome(whole)


def test_the_best_is_still_there_when_a_run_that_ended_with_a_better_one_goes_on(tmp_path: Path) -> None:
    every = {"eval_every": 6, "keep_best": 1, "seed": 6}  # best at step 8 if step 8 is the last, else at 6
    end = run_of(tmp_path / "run", steps=8, **every)
    assert (end["best_step"], kept(tmp_path / "run")) == (8, [6, 8])
    result = run_of(tmp_path / "run", steps=40, resume=True, **every)
    assert outcome(result) == outcome(run_of(tmp_path / "whole", **every))
    assert (result["best_step"], kept(tmp_path / "run")) == (6, [6, 40])


OWN = """
class Errors:
    name, columns = "errors", 1

    def __init__(self, outputs):
        pass

    def sums(self, y, labels):
        return [float((y.argmax(1) != labels).sum())]

    def value(self, totals):
        return totals[0]

class Fewer(Errors):
    higher_is_better = False

class Unsure(Errors):
    higher_is_better = "yes"
"""


def test_which_scores_of_a_metric_of_ones_own_are_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "counted.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    result = run_of(tmp_path / "run", metric="counted:Fewer", best="errors", keep_best=1)
    by_step = scores(tmp_path / "run", "errors")
    assert result["best_step"] == min(by_step, key=by_step.__getitem__)
    assert run_of(tmp_path / "loss", metric="counted:Errors", steps=2)["best_step"] == 2  # it need not say it
    for name, words in (("Errors", ""), ("Unsure", "; it is 'yes'")):
        with pytest.raises(ConfigError) as error:
            run_of(tmp_path / name, metric=f"counted:{name}", best="errors")
        assert str(error.value) == (
            f"--best errors: --metric counted:{name} must say which scores are better, by an attribute "
            f"higher_is_better, True or False{words}"
        )
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"best": "f1"}, "--best f1: must be loss or accuracy, which the evaluations of this run have"),
        ({"best": "test_loss"}, "--best test_loss: must be loss or accuracy, which the evaluations of this run have"),
        (
            {"patience": 3, "eval_every": 0},
            "--patience 3 --eval-every 0: there are no evaluations; give --patience 0, or --eval-every the steps "
            "between them",
        ),
        (
            {"keep_best": 1, "eval_every": 0},
            "--keep-best 1 --eval-every 0: there are no evaluations; give --keep-best 0, or --eval-every the steps "
            "between them",
        ),
    ],
)
def test_what_cannot_be_the_best(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        run_of(tmp_path / "run", **settings)
    assert str(error.value) == words
    assert not (tmp_path / "run").exists()
