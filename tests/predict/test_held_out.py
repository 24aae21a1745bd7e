"""The law of epochs in predictions, and its check by batches that it was not fitted to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpiml.errors import ConfigError
from mpiml.predict import predictor
from mpiml.predict.__main__ import main
from mpiml.predict.held_out import HeldOut, describe, held_out
from mpiml.scaling.epochs import Reached, fit_epochs
from mpiml.scaling.laws import Interval
from mpiml.scaling.points import STUDY, Point
from tests.predict.test_predictor import known
from tests.scaling.test_epochs import STEPS, trained
from tests.scaling.test_results import train_to

RUNS = {64: Reached(64, 3, 4), 128: Reached(128, 4, 6), 320: Reached(320, 5, 10), 640: Reached(640, 0, 10)}


def test_each_batch_is_predicted_by_the_others(tmp_path: Path) -> None:
    compared = held_out(trained(tmp_path, STEPS))
    assert [(one.batch, one.reached) for one in compared] == list(RUNS.items())  # without 500, which did not reach it
    for one in compared:
        law = fit_epochs([run for batch, run in RUNS.items() if batch != one.batch], 0.9)
        assert one.predicted == law.at(one.batch)
        assert one.error == pytest.approx(one.predicted.value / RUNS[one.batch].epochs - 1)


def test_batches_of_the_fit_are_not_predicted(tmp_path: Path) -> None:
    compared = held_out(trained(tmp_path, STEPS), [64, 128, 640])
    law = fit_epochs([RUNS[64], RUNS[128], RUNS[640]], 0.9)
    assert [(one.batch, one.predicted) for one in compared] == [(320, law.at(320))]


def test_a_batch_with_several_runs_is_compared_by_their_mean(tmp_path: Path) -> None:
    trained(tmp_path, STEPS, trainings=2)
    train_to(tmp_path, Point(1, 1, 64, 1), [0.5] * 5 + [0.95], 30, 1)
    (first, *_) = held_out(tmp_path)
    assert (first.batch, first.runs, first.reached) == (64, 2, Reached(64, 4, 5))
    train_to(tmp_path, Point(1, 1, 128, 1), [0.5], 30, 1)
    assert [one.batch for one in held_out(tmp_path)] == [64, 320, 640]  # one run of 128 did not reach it


@pytest.mark.parametrize(
    ("interval", "inside"), [((5, 5.5), True), ((1, 3), True), ((1, 2.9), False), ((4.1, 9), False), ((4, 9), True)]
)
def test_a_run_is_inside_if_it_may_be(interval: tuple[float, float], inside: bool) -> None:
    reached = Reached(64, 5, 6) if interval == (5, 5.5) else Reached(64, 3, 4)
    assert HeldOut("s", 64, 1, reached, Interval(4, *interval)).inside is inside


def test_the_errors_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = trained(tmp_path, STEPS)
    compared = held_out(study)
    errors = sorted(abs(one.error) for one in compared)
    assert main(["check", str(study)]) == int((errors[1] + errors[2]) / 2 > 0.15) == 1
    output = capsys.readouterr().out
    assert output.splitlines()[1:-1] == describe(compared, None, 0.15)[1:-1]
    assert f"batches predicted: 4, each batch by the others: median error {(errors[1] + errors[2]) / 2:.0%}" in output
    assert (
        f"largest {errors[3]:.0%}; {sum(one.inside for one in compared)} of 4 within the interval; off by more than 15%"
        in output
    )
    good = trained(_empty(tmp_path / "good"), {64: 4, 128: 3, 320: 2})
    assert main(["check", str(good), "--fit", "64,320"]) == 0  # 4.5 epochs, of 5
    line = "batches predicted: 1, fitted to batches of 64, 320: median error 10%, largest 10%; no intervals; good\n"
    assert capsys.readouterr().out.endswith(line)


@pytest.mark.parametrize(
    ("fit", "named"),
    [
        ("64,65", "has no batch of 65 that always reached the target; it has 64, 128, 320, 640"),
        ("64,500", "has no batch of 500"),
        ("64", "--fit 64: the law has two parameters; give two"),
        ("64,128,320,640", "these are all batches"),
        ("64,x", "--fit: must be whole numbers"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    fit: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(trained(tmp_path, STEPS)), "--fit", fit]) == 78
    errors = capsys.readouterr().err
    assert named in errors
    assert errors.count("\n") == 1


def test_two_batches_hold_out_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert held_out(trained(tmp_path, {64: 4, 128: 3})) == []
    assert main(["check", str(tmp_path)]) == 78
    assert "has no calibration" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="it has none"):
        held_out(known(_empty(tmp_path / "plain"), one=[1.0], two=[1.0]), [64, 128])


def _empty(path: Path) -> Path:
    path.mkdir()
    return path


def accurate(directory: Path, mode: str, tens: dict[int, int]) -> Path:
    """A study of a known machine that has trained with some batches."""
    known(directory, one=[1.0], two=[1.0])
    study = json.loads((directory / STUDY).read_text())
    more = [vars(Point(1, 1, batch, 1, timed=False)) for batch in tens]
    about = {"mode": mode, "target": 0.9, "max_epochs": 30, "rows": 1437, "points": study["points"] + more}
    (directory / STUDY).write_text(json.dumps(study | about))
    for batch, count in tens.items():
        train_to(directory, Point(1, 1, batch, 1), [0.5] * (count - 1) + [0.95], 30)
    return directory


def predicted(study: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["predict", str(study), "--node-ranks", "64", *flags]) == 0
    return capsys.readouterr().out


def test_seconds_to_the_target_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = accurate(tmp_path, "weak", {32: 30, 128: 10, 512: 9})
    content = json.loads(predicted(study, capsys, "--ranks", "1,8", "--json"))
    law = predictor.Predictor(study).law
    assert law
    assert content["law"]["parameters"]["E0"]["value"] == pytest.approx(law.constant)
    for one in content["predictions"]:
        rows = 1437 / -(-1437 // (60 * one["ranks"]))
        assert one["rows"] == pytest.approx(rows)
        assert one["epochs_to_target"]["value"] == pytest.approx(law.constant + law.slope * rows)
        seconds = {name: epochs * 1437 / one["samples_per_second"] for name, epochs in one["epochs_to_target"].items()}
        assert one["seconds_to_target"] == pytest.approx(seconds)


def test_where_more_replicas_stop_paying(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = accurate(tmp_path, "weak", {32: 30, 128: 10, 1024: 9})
    output = predicted(study, capsys, "--ranks", "1,2,4,16")
    head = next(line for line in output.splitlines() if line.startswith("ranks"))
    assert head.endswith("epochs to 0.9  seconds to it (95 %)")
    assert "least seconds to the target: on 16 ranks with a batch of 960, " in output
    assert "more ranks may take less" in output
    assert "ASSUMED: the law" not in output
    output = predicted(study, capsys, "--ranks", "1,16,32,1024")
    assert "ASSUMED: the law of epochs also for batches of 1920, 61440; runs have 31.9 to 718 rows a step" in output
    (tmp_path / "slow").mkdir()
    slow = accurate(tmp_path / "slow", "weak", {32: 1, 128: 5, 512: 30})
    output = predicted(slow, capsys, "--ranks", "1,2,1024")
    assert "; more ranks take longer" in output


def test_predictions_do_not_measure_the_noise_scale(tmp_path: Path) -> None:
    study = accurate(tmp_path, "weak", {32: 30, 128: 10})
    content = json.loads((study / STUDY).read_text())
    content["settings"].append("--noise-scale")
    (study / STUDY).write_text(json.dumps(content))
    assert list(predictor.Predictor(study).grids(1, 1))


def test_predictions_without_a_law_say_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = predicted(accurate(tmp_path, "strong", {32: 30}), capsys, "--ranks", "1")
    assert "epochs to 0.9: undecided: needs 2 batches that reach it" in output
    assert "seconds to it" not in output
    predictions: list[dict[str, Any]] = json.loads(predicted(tmp_path, capsys, "--ranks", "1", "--json"))["predictions"]
    assert [one["seconds_to_target"] for one in predictions] == [None] * len(predictions)
