"""The law of epochs over batches: fitted to published runs, to runs made up, and to those of a study."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.command import markdown
from mpiml.config import Config
from mpiml.errors import OutputError
from mpiml.scaling.__main__ import main
from mpiml.scaling.epochs import EpochsLaw, Reached, fit_epochs
from mpiml.scaling.jobs import jobs_of, run_directory
from mpiml.scaling.laws import Interval
from mpiml.scaling.plots import draw_epochs, drawings
from mpiml.scaling.points import STUDY, Point, batches_to_train, points_of
from mpiml.scaling.report import fit, fits_text, notes
from mpiml.scaling.results import Study, load_study
from mpiml.scaling.trained import law_of, training_rows, training_table
from tests.scaling.test_results import legend, made, train_to

# Rows of a batch and mean epochs to the target of ResNet-50 in MLPerf Training.
MLPERF = [(1632, 35.0), (3264, 35.2), (4096, 40.0), (8192, 42.0), (13056, 45.4)]
MLPERF += [(32768, 56.0), (49152, 68.0), (58880, 79.9), (65536, 84.5), (67840, 85.9)]
BATCHES = (32, 64, 128, 256, 512, 1024)


def exact(batches: Sequence[int], first: float = 5.0, noise: float = 200.0) -> list[Reached]:
    """Runs on the law."""
    return [Reached(b, first * (1 + b / noise), first * (1 + b / noise)) for b in batches]


def parameters(law: EpochsLaw) -> tuple[Interval, Interval]:
    return law.fit.parameters["E0"], law.fit.parameters["B_noise"]


def test_mlperf_by_published_numbers() -> None:
    law = fit_epochs([Reached(batch, epochs, epochs) for batch, epochs in MLPERF], 0.759)
    first, noise = parameters(law)
    assert first.value == pytest.approx(34.6, rel=0.003)
    assert noise.value == pytest.approx(47_000, rel=0.005)
    assert law.rms == pytest.approx(0.037, abs=0.0005)
    assert first.low < 34.6 < first.high < 37
    assert 40_000 < noise.low < 47_000 < noise.high < 56_000
    assert law.fit.verdict == "supported: 3.7% off (root mean square), 6% at worst"


def test_intervals_by_the_textbook() -> None:
    """Those of weighted linear regression, at a batch with weight one: with 2.228 of Student's t for 10 degrees of
    freedom, the formula for another observation, worked out here with the hat matrix."""
    random = np.random.default_rng(3)
    batches = np.linspace(10, 400, 12)
    epochs = 5 * (1 + batches / 200) * (1 + 0.02 * random.standard_normal(12))
    law = fit_epochs([Reached(b, e, e) for b, e in zip(batches, epochs, strict=True)], 0.9)
    terms = np.stack([1 / epochs, batches / epochs], 1)
    solved, squares = np.linalg.lstsq(terms, np.ones(12), rcond=None)[:2]
    inverse, scatter = np.linalg.inv(terms.T @ terms), math.sqrt(squares[0] / 10)
    half = 2.228 * scatter * math.sqrt(inverse[0, 0])
    first, _ = parameters(law)
    assert (first.low, first.high) == pytest.approx((solved[0] - half, solved[0] + half), rel=0.005)
    there = np.array([1.0, 800.0])
    half = 2.228 * scatter * math.sqrt(there @ inverse @ there + (there @ solved) ** 2)
    other = law.at(800)
    assert (other.low, other.value, other.high) == pytest.approx(
        (there @ solved - half, there @ solved, there @ solved + half), rel=0.01
    )


def test_intervals_cover_what_they_say() -> None:
    """With three batches and with six: 95 % of another run's epochs and of the parameters, not far less or more."""
    random = np.random.default_rng(0)
    for batches in ((32, 181, 1024), BATCHES):
        inside = []
        for _ in range(150):
            runs = [Reached(b, e, e) for b, e, _ in exact(batches)]
            noisy = [Reached(b, e * f, e * f) for (b, e, _), f in zip(runs, _factors(random, len(runs)), strict=True)]
            law = fit_epochs(noisy, 0.9)
            first, noise = parameters(law)
            another, truth = law.at(400), 15 * _factors(random, 1)[0]
            inside.append([first.low <= 5 <= first.high, noise.low <= 200 <= noise.high])
            inside[-1].append(another.low <= truth <= another.high)
        assert (np.mean(inside, axis=0) > 0.91).all()
        assert (np.mean(inside, axis=0) < 0.985).all()


def _factors(random: np.random.Generator, count: int) -> list[float]:
    return (1 + 0.03 * random.standard_normal(count)).tolist()


def test_rare_evaluations_widen_intervals() -> None:
    """On the law itself: all that is not known is when, between two evaluations, the target was reached."""
    narrow, wide = (fit_epochs([Reached(b, e - w, e + w) for b, e, _ in exact(BATCHES)], 0.9) for w in (0.01, 0.5))
    for law, most in ((narrow, 0.01), (wide, 0.5)):
        first, _ = parameters(law)
        assert first.value == pytest.approx(5)
        assert most / 2 < first.high - first.low < 4 * most


def test_runs_with_one_batch_count_once_and_their_scatter_counts() -> None:
    two = [Reached(32, 5.0, 5.0), Reached(32, 7.0, 7.0), *exact([64, 128])]
    mean = [Reached(32, 6.0, 6.0), *exact([64, 128])]
    (first, _), (other, _) = (parameters(fit_epochs(runs, 0.9)) for runs in (two, mean))
    assert first.value == pytest.approx(other.value)
    assert first.high - first.low > 1.2 * (other.high - other.low)
    turned, _ = parameters(fit_epochs([two[1], two[0], *two[2:]], 0.9))
    assert (turned.low, turned.high) == pytest.approx((first.low, first.high), rel=0.1)


def test_few_batches_are_said_to_be_few() -> None:
    for runs in ([], exact([32]), exact([32, 32])):
        law = fit_epochs(runs, 0.9)
        assert not law
        assert law.fit.verdict == "undecided: needs 2 batches that reach it; --batches N,N trains with more"
        assert fits_text([law.fit]) == f"- epochs to 0.9: {law.fit.verdict}"
    law = fit_epochs(exact([32, 64]), 0.9)
    assert "2 batches fit any such law, and give no interval" in law.fit.verdict
    assert fits_text([law.fit]).startswith("- epochs to 0.9: E0 5, B_noise 200; undecided: 2 batches")
    assert law.at(200) == Interval(pytest.approx(10), -math.inf, math.inf)


def test_no_parameter_is_negative() -> None:
    level = fit_epochs([Reached(b, 9 - b / 1000, 9 - b / 1000) for b in BATCHES], 0.9)
    assert (parameters(level)[1].value, level.at(100).value) == (math.inf, pytest.approx(8.5, abs=0.3))
    assert level.fit.verdict == "undecided: epochs do not grow with the batch; train with larger ones"
    steep = fit_epochs([Reached(b, b**1.2, b**1.2) for b in BATCHES], 0.9)
    assert (parameters(steep)[0].value, parameters(steep)[1].value) == (0, 0)
    assert "grow as fast as the batch or faster; train with smaller ones" in steep.fit.verdict


@pytest.mark.parametrize("batches", [(64, 128), (64, 128, 256)])
def test_a_parameter_that_is_there_by_rounding_alone_is_0(batches: tuple[int, ...]) -> None:
    """All batches take the same epochs, or epochs as many as they are large."""
    level = fit_epochs([Reached(b, 3, 4) for b in batches], 0.9)
    assert (level.slope, parameters(level)[1].value) == (0, math.inf)
    assert level.fit.verdict == "undecided: epochs do not grow with the batch; train with larger ones"
    steep = fit_epochs([Reached(b, b / 10, b / 10) for b in batches], 0.9)
    assert (steep.constant, parameters(steep)[1].value) == (0, 0)
    assert "grow as fast as the batch or faster; train with smaller ones" in steep.fit.verdict


def test_what_the_law_does_not_describe_is_not_supported() -> None:
    jump = fit_epochs([Reached(b, e, e) for b, e in zip(BATCHES, (5, 5, 5, 5, 50, 5), strict=True)], 0.9)
    assert jump.fit.verdict.startswith("not supported: ")
    loud = fit_epochs([Reached(32, 5.0, 5.0), Reached(64, 5.9, 5.9), Reached(128, 6.0, 6.0)], 0.9)
    assert loud.fit.verdict.startswith("undecided: ")
    assert "but B_noise has no upper bound; --batches" in loud.fit.verdict
    assert " or more); undecided" in fits_text([loud.fit])


def test_points_that_only_train_have_the_largest_grid() -> None:
    points = points_of("weak", [1, 2, 4], [1], 32, None)
    more = batches_to_train([16, 128, 512], points)
    assert more == [Point(4, 1, 16, 4, timed=False), Point(4, 1, 512, 4, timed=False)]  # 128 is there: 32 a rank
    jobs = jobs_of(Path("s"), [*points, *more], 2, (1, 3), Config(batch=32), [], 6400, 5)
    assert sorted(job.point.batch for job in jobs if job.path.parent.name == "points") == [32, 32, 64, 64, 128, 128]
    assert [job.point.batch for job in jobs if job.path.parent.name == "training"] == [32, 64, 16, 128, 512]
    jobs = jobs_of(Path("s"), points, 1, (1, 3), Config(batch=32), ["--noise-scale"], 6400, 5)
    measured = [(job.path.parent.name, job.point.microbatches) for job in jobs if "--noise-scale" in job.arguments]
    assert measured == [("training", 2), ("training", 4)]


def test_further_trainings_have_other_seeds(tmp_path: Path) -> None:
    one = Point(1, 1, 64, 1)
    jobs = jobs_of(tmp_path, [one], 0, (1, 3), Config(seed=5), ["--seed=5"], 640, 30, 3)
    assert [[word for word in job.arguments if "seed" in word] for job in jobs] == [
        ["--seed=5", "--seed=5"],
        ["--seed=5", "--seed=6", f"--out={run_directory(tmp_path, one, 30)}_seed-1"],
        ["--seed=5", "--seed=7", f"--out={run_directory(tmp_path, one, 30)}_seed-2"],
    ]
    study = load_study(trained(tmp_path, STEPS, trainings=2))
    assert study.open == 5
    for batch, tens in ((64, 6), (128, None), (320, 2), (640, 1)):
        train_to(tmp_path, Point(1, 1, batch, 1), [0.5] * 3 if tens is None else [0.5] * (tens - 1) + [0.95], 30, 1)
    study = load_study(tmp_path)
    assert (study.open, len(study.trained)) == (1, 9)
    assert table(study)[2].startswith("| 64 | 2 | 40, 60 | 4 to 5 | ")
    assert table(study)[3] == "| 128 | 2 | 30, not reached (0.5) |  |  |  |"
    mean = [Reached(64, 3, 4), Reached(64, 5, 6), Reached(320, 5, 10), Reached(640, 0, 10)]  # 128 did not always
    assert study.law
    assert (study.law.constant, study.law.slope) == (fit_epochs(mean, 0.9).constant, fit_epochs(mean, 0.9).slope)


def trained(directory: Path, steps: dict[int, int | None], **about: object) -> Path:
    """A study of one rank with batches of 64 of 640 rows, trained with others too; each reached 0.9 after so many tens
    of steps, or not."""
    one = Point(1, 1, 64, 1)
    made(directory, "strong", {one: [10.0]})
    study = json.loads((directory / STUDY).read_text())
    more = [one, *(Point(1, 1, batch, 1, timed=False) for batch in steps if batch != 64)]
    study |= {
        "target": 0.9,
        "max_epochs": 30,
        "rows": 640,
        "repeats": 1,
        "points": [vars(point) for point in more],
        **about,
    }
    (directory / STUDY).write_text(json.dumps(study))
    for point in more:
        tens = steps[point.batch]
        train_to(directory, point, [0.5, 0.6, 0.7] if tens is None else [0.5] * (tens - 1) + [0.95], 30)
    return directory


STEPS = {64: 4, 128: 3, 320: 2, 640: 1, 500: None}  # in tens


def test_a_study_has_the_law_of_its_runs(tmp_path: Path) -> None:
    """Epochs by hand: ten steps are one epoch with 64 of 640 rows, two with 128, and so on."""
    study = load_study(trained(tmp_path, STEPS))
    assert [run.reached for run in study.trained] == [
        Reached(64.0, 3.0, 4.0),
        Reached(128.0, 4.0, 6.0),
        Reached(320.0, 5.0, 10.0),
        None,
        Reached(640.0, 0.0, 10.0),
    ]
    assert study.open == 0
    assert study.law
    assert study.law.constant == pytest.approx(law_of(study.trained, 0.9).constant)
    assert (study.law.smallest, study.law.largest) == (64, 640)
    assert fit(study)[-1] == study.law.fit
    assert any("a run did not reach the target: a batch of 500." in note for note in notes(study))
    assert study.lines[0].row()["epochs_to_target"] == 4
    rows = training_rows(study.trained, study.law)
    assert [row["batch"] for row in rows] == [64, 128, 320, 500, 640]
    assert rows[0]["error"] == pytest.approx(study.law.at(64).value / 3.5 - 1)
    assert (rows[3]["error"], rows[3]["fitted_epochs"]) == (None, None)


def test_a_batch_that_does_not_divide_the_rows_counts_as_its_steps_do(tmp_path: Path) -> None:
    """Of 640 rows, a batch of 500 makes two steps of 320."""
    study = load_study(trained(tmp_path, {64: 4, 500: 3}))
    assert study.trained[1].reached == Reached(320.0, 10.0, 15.0)


def test_the_table_shows_epochs_and_measured_noise_scales(tmp_path: Path) -> None:
    trained(tmp_path, STEPS)
    study = load_study(tmp_path)
    head, _, first, *_ = table(study)
    assert head == "| batch | runs | steps to 0.9 | epochs to it | fitted | error |"
    assert first.startswith("| 64 | 1 | 40 | 3 to 4 | ")
    assert table(study)[5] == "| 500 | 1 | not reached (0.7) |  |  |  |"
    for batch, noise in ((64, 1234.5), (128, None)):
        result = run_directory(tmp_path, Point(1, 1, batch, 1), 30) / "result.json"
        result.write_text(json.dumps({"status": "done", "noise_scale": noise}))
    study = load_study(tmp_path)
    head, _, *rows = table(study)
    assert head.endswith(" | measured noise scale |")
    assert [row.split("|")[-2].strip() for row in rows] == ["1,230 rows", "", "", "", ""]
    assert study.lines[0].row()["noise_scale"] == 1234.5


def table(study: Study) -> list[str]:
    assert study.law is not None
    return markdown(training_table(study.trained, study.law, 0.9)).splitlines()


def test_studies_that_do_not_know_their_rows_have_no_law(tmp_path: Path) -> None:
    """As older ones: the same command writes the rows down."""
    study = load_study(trained(tmp_path, STEPS, rows=None))
    assert study.law is not None
    assert not study.law
    assert "needs 2 batches" in study.law.fit.verdict
    assert table(study)[2] == "| 64 | 1 | 40 |  |  |  |"
    assert study.lines[0].target
    assert study.lines[0].target.steps == 40


def test_without_a_run_that_reached_the_target_there_is_no_plot_of_epochs(tmp_path: Path) -> None:
    names = [drawing.name for drawing in drawings(load_study(trained(tmp_path, dict.fromkeys(STEPS))))]
    assert names == ["time", "speed-up", "efficiency", "shares", "accuracy"]


def test_the_plot_shows_runs_law_and_noise_scales(tmp_path: Path) -> None:
    trained(tmp_path, STEPS)
    result = run_directory(tmp_path, Point(1, 1, 500, 1), 30) / "result.json"
    result.write_text(json.dumps({"status": "done", "noise_scale": 90.0}))
    shown = legend(draw_epochs, load_study(tmp_path))
    assert shown["measured noise scale, median"] == [90, 90]
    assert shown["runs, between evaluations"] == [64, 128, 320, 640]
    assert (min(shown["E0 (1 + B / B_noise)"]), max(shown["E0 (1 + B / B_noise)"])) == pytest.approx((64, 640))


@pytest.mark.parametrize("about", [{"target": 0.99}, {"rows": None}])
def test_a_study_whose_runs_give_no_epochs_is_reported_without_their_plot(
    tmp_path: Path, about: dict[str, Any]
) -> None:
    """None reached the target, or it is not known how many rows are an epoch."""
    pytest.importorskip("matplotlib")
    trained(tmp_path, STEPS, **about)
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "accuracy.png").exists()
    assert not (tmp_path / "epochs.png").exists()


@pytest.mark.parametrize(
    ("step", "scores"), [(0, [{"accuracy": 1.0}]), (1, [{"accuracy": 1.0, "r2": 1.0}]), (1, [{"accuracy": 0.1}, {}])]
)
def test_damaged_evaluations_are_one_line(tmp_path: Path, step: int, scores: list[dict[str, float]]) -> None:
    run = run_directory(trained(tmp_path, STEPS), Point(1, 1, 128, 1), 30)
    lines = [{"step": step, "evaluation": {"loss": 1.0, "rows": 9} | each} for each in scores]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(OutputError, match=r"^\S+metrics\.jsonl is damaged: its evaluations are not of one metric"):
        load_study(tmp_path)
