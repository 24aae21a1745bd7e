"""The results of studies: speed-up, marks, laws and times to the target, and files that are damaged."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpiml.config import Config
from mpiml.errors import ConfigError
from mpiml.scaling import plots
from mpiml.scaling.__main__ import main
from mpiml.scaling.jobs import StudyJob, TrainingRun, jobs_of, points_to_train, run_directory
from mpiml.scaling.points import POINTS, STUDY, Point, points_of
from mpiml.scaling.report import fit, fits_text, notes
from mpiml.scaling.results import Study, load_study, markdown


def made(directory: Path, mode: str, step_ms: dict[Point, list[float]]) -> Path:
    """A study whose repeats took so many milliseconds a step."""
    (directory / POINTS).mkdir()
    points = [dataclasses.asdict(point) for point in step_ms]
    (directory / STUDY).write_text(json.dumps({"mode": mode, "settings": [], "points": points}))
    for point, medians in step_ms.items():
        for repeat, milliseconds in enumerate(medians):
            job = {
                "step_seconds": [milliseconds / 1e3] * 3,
                "shares": {"compute": 3.0, "waiting": 0.0, "communication": 1.0, "update": 0.0, "data": 0.0},
                "rows": point.batch,
                "nodes": max(point.ranks // 2, 1),
                "cores": 2,
                "threads": 1,
                "environment": {},
            }
            (directory / POINTS / f"{point.name}_{repeat}.json").write_text(json.dumps(job))
    return directory


def test_speed_up_is_against_one_rank_at_its_best(tmp_path: Path) -> None:
    one, other, two = Point(1, 1, 64, 1), Point(1, 1, 64, 2, extra=True), Point(2, 1, 64, 2)
    study = load_study(made(tmp_path, "strong", {one: [12.0, 12.1], other: [10.0, 10.0], two: [5.0, 6.0, 4.0]}))
    assert study.base.point == other
    line = next(line for line in study.lines if line.point == two)
    assert line.speed_up.value == pytest.approx(2.0)
    assert (line.step.low, line.step.value, line.step.high) == pytest.approx((0.004, 0.005, 0.006))
    assert line.efficiency.value == pytest.approx(1.0)
    assert line.same_parts == pytest.approx(2.0)
    assert line.share("communication") == pytest.approx(0.25)
    assert not line.oversubscribed
    assert other not in [line.point for line in study.asked()]
    assert [line.point for line in study.best()] == [other, two]


def test_weak_speed_up_counts_rows(tmp_path: Path) -> None:
    one, four = Point(1, 1, 64, 1), Point(4, 1, 256, 4)
    study = load_study(made(tmp_path, "weak", {one: [10.0], four: [12.5]}))
    assert study.lines[1].speed_up.value == pytest.approx(3.2)
    assert study.lines[1].row()["node_hours_per_million_samples"] == pytest.approx(2 * 12.5e-3 / 3600 * 1e6 / 256)


def test_more_ranks_than_cores_are_marked(tmp_path: Path) -> None:
    one, eight = Point(1, 1, 64, 1), Point(8, 1, 64, 8)
    made(tmp_path, "strong", {one: [10.0], eight: [9.0]})
    path = tmp_path / POINTS / f"{eight.name}_0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"nodes": 1}))
    study = load_study(tmp_path)
    assert [line.oversubscribed for line in study.lines] == [False, True]
    assert "| 8* |" in markdown(study)


def test_laws_are_fitted_where_each_rank_has_a_core(tmp_path: Path) -> None:
    """On nodes of two cores: with eight ranks on one, the laws would be of ranks that take turns."""
    points = {Point(ranks, 1, 64, ranks): [16.0 / ranks, 16.1 / ranks] for ranks in (1, 2, 4, 8)}
    made(tmp_path, "strong", points)
    amdahl, universal = fit(load_study(tmp_path))
    assert amdahl.verdict.startswith("supported")
    for ranks in (4, 8):
        path = next((tmp_path / POINTS).glob(f"ranks-0000{ranks}*_0.json"))
        path.write_text(json.dumps(json.loads(path.read_text()) | {"nodes": 1}))
    laws = fit(load_study(tmp_path))
    assert all(law.verdict.startswith("undecided") for law in laws)
    assert "with a core for each rank" in fits_text(laws[1:2])
    assert universal.parameters


def test_what_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no study"):
        load_study(tmp_path)
    with pytest.raises(ConfigError, match="no job of one rank"):
        load_study(made(tmp_path, "strong", {Point(2, 1, 64, 2): [1.0]}))


def test_base_is_called_the_best_only_if_all_are_there(tmp_path: Path) -> None:
    one, other, two = Point(1, 1, 64, 1), Point(1, 1, 64, 2, extra=True), Point(2, 1, 64, 2)
    made(tmp_path, "strong", {one: [12.0], other: [10.0], two: [5.0]})
    assert "with M = 2, the fastest: " in notes(load_study(tmp_path))[0]
    (tmp_path / POINTS / f"{one.name}_0.json").unlink()
    assert "with M = 2, the fastest so far (M = 1 not yet measured): " in notes(load_study(tmp_path))[0]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"step_seconds": [1]'])
def test_damaged_files_of_points_are_told_and_count_as_open(tmp_path: Path, text: str) -> None:
    one = Point(1, 1, 64, 1)
    made(tmp_path, "strong", {one: [10.0, 11.0]})
    (tmp_path / STUDY).write_text(json.dumps(json.loads((tmp_path / STUDY).read_text()) | {"repeats": 2}))
    assert load_study(tmp_path).open == 0
    path = tmp_path / POINTS / f"{one.name}_1.json"
    path.write_text(text)
    study = load_study(tmp_path)
    assert (study.open, study.lines[0].medians) == (1, (0.01,))
    assert any(str(path) in note for note in notes(study))
    jobs = jobs_of(tmp_path, [one], 2, (1, 3), Config(batch=64), [], 640, None)
    assert [job.done for job in jobs] == [job.path != path for job in jobs]


GOOD = '{"mode": "strong", "settings": [], "points": []'
DAMAGED = ["", "{", "[]", "{}", GOOD.replace("[]", '[{"x": 1}]'), f'{GOOD}, "rows": 0}}', f'{GOOD}, "rows": "9"}}']
DAMAGED += [f'{GOOD}, "target": "high"}}', f'{GOOD}, "trainings": "2"}}']


@pytest.mark.parametrize("text", DAMAGED)
@pytest.mark.parametrize("command", ["run", "report"])
def test_damaged_studies_are_refused(
    tmp_path: Path, text: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / STUDY).write_text(text)
    more = ["--ranks", "1", "--out"] if command == "run" else []
    assert main([command, *more, str(tmp_path)]) == 74
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert f"{tmp_path / STUDY} is damaged" in errors


TARGET = {"target": 0.9, "max_epochs": 3}


def train_to(directory: Path, point: Point, scores: list[float], epochs: int = 3, offset: int = 0) -> None:
    """What a training run leaves that was evaluated every ten steps."""
    run = run_directory(directory, point, epochs, offset)
    run.mkdir(parents=True)
    lines = [{"step": 10 * n, "evaluation": {"loss": 1.0, "accuracy": s, "rows": 9}} for n, s in enumerate(scores, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"step": 10, "loss": 1.0}, *lines]))
    (run / "result.json").write_text(json.dumps({"status": "done"}))


def test_time_to_target_is_the_steps_of_a_run_and_the_points_own_time(tmp_path: Path) -> None:
    """The two stages and the two replicas share batch and micro-batches, so they share a run."""
    one, replicas, stages, four = Point(1, 1, 64, 1), Point(2, 1, 64, 4), Point(2, 2, 64, 4), Point(4, 1, 64, 8)
    made(tmp_path, "strong", {one: [10.0], replicas: [5.0], stages: [6.0], four: [3.0]})
    about = json.loads((tmp_path / STUDY).read_text()) | TARGET | {"repeats": 2}
    (tmp_path / STUDY).write_text(json.dumps(about))
    train_to(tmp_path, one, [0.5, 0.89, 0.8])
    train_to(tmp_path, stages, [0.5, 0.95, 0.8])
    study = load_study(tmp_path)
    assert [line.seconds_to_target for line in study.lines] == [None, pytest.approx(0.1), pytest.approx(0.12), None]
    assert study.lines[1].row()["samples_to_target"] == 20 * 64
    assert study.open == 4 + 1  # the second repeats, and the training run of four ranks
    rows = markdown(study).splitlines()[2:]
    assert [row.split("|")[-4].strip() for row in rows] == ["not reached (0.89)", "20", "20", "open"]
    assert any("Steps between evaluations: 10 with a batch of 64." in note for note in notes(study))
    assert any("5 of the study's jobs are open" in note for note in notes(study))


def test_each_batch_and_micro_batches_are_trained_once(tmp_path: Path) -> None:
    points = points_of("strong", [1, 2, 4], [1, 2], 64, 8)
    assert points_to_train(points) == [Point(4, 2, 64, 8)]
    weak = points_of("weak", [1, 2, 4], [1], 64, None)
    asked = Config(batch=64, eval_every=12)
    assert every(jobs_of(tmp_path, weak, 1, (1, 3), asked, [], 6400, 5)) == [12, 6, 3]  # as many rows at each size
    assert every(jobs_of(tmp_path, weak, 1, (1, 3), Config(batch=64), [], 6400, 5)) == [10, 5, 2]  # of 500 steps, ...
    assert every(jobs_of(tmp_path, weak, 1, (1, 3), Config(batch=64), [], 640, 1)) == [1, 1, 1]
    assert every(jobs_of(tmp_path, weak, 1, (1, 3), Config(batch=64), [], 6400, None)) == []


def every(jobs: list[StudyJob]) -> list[int]:
    """The steps between evaluations of each training run."""
    words = [word for job in jobs if isinstance(job, TrainingRun) for word in job.arguments]
    return [int(word.split("=")[1]) for word in words if word.startswith("--eval-every")]


def legend(plot: Callable[[Any, Study], None], study: Study) -> dict[str, list[float]]:
    """What a plot shows under which name, by ranks."""
    figure = pytest.importorskip("matplotlib.figure")
    axes = figure.Figure().subplots()
    plot(axes, study)
    handles, labels = axes.get_legend_handles_labels()
    return {label: list(getattr(handle, "get_xdata", list)()) for handle, label in zip(handles, labels, strict=True)}


def test_each_number_of_stages_has_a_line(tmp_path: Path) -> None:
    one, data, pipe = Point(1, 1, 64, 1), Point(2, 1, 64, 2), Point(2, 2, 64, 4)
    four = Point(4, 2, 64, 8)
    study = load_study(made(tmp_path, "strong", {one: [10.0], data: [5.0], pipe: [6.0], four: [3.0]}))
    for plot in (plots.draw_time, plots.draw_speed_up, plots.draw_efficiency):
        assert legend(plot, study) == {"1 stage": [1, 2], "2 stages": [2, 4], "ideal": [1, 2, 4]}
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    plots.draw_shares(axes, study)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1 x 1", "1 x 2", "2 x 1", "2 x 2"]


def test_time_to_target_starts_from_the_best_one_rank_too(tmp_path: Path) -> None:
    one, other, two = Point(1, 1, 64, 1), Point(1, 1, 64, 2, extra=True), Point(2, 1, 64, 2)
    made(tmp_path, "strong", {one: [10.0], other: [8.0], two: [5.0]})
    (tmp_path / STUDY).write_text(json.dumps(json.loads((tmp_path / STUDY).read_text()) | TARGET))
    train_to(tmp_path, one, [0.5, 0.95])
    train_to(tmp_path, two, [0.5, 0.95])
    assert "ideal, from 1 rank with M = 2" in legend(plots.draw_accuracy, load_study(tmp_path))


def test_one_repeat_has_no_interval(tmp_path: Path) -> None:
    text = markdown(load_study(made(tmp_path, "strong", {Point(1, 1, 64, 1): [10.0]})))
    assert "| 10.00 |" in text
    assert "inf" not in text
