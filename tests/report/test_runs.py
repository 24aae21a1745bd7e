"""What is read of a run directory: names, epochs, seconds and restarts; files that are missing, older or damaged."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mpiml.errors import ConfigError, OutputError
from mpiml.report.runs import labels, read_run, read_runs
from tests.report.conftest import CONFIG, ENVIRONMENT, LINES, Make, evaluation_line, step_line

JOBS = [{"after": 0, "ranks": 16, "pipe": 4}, {"after": 15, "ranks": 6, "pipe": 2}]


def test_a_run_is_read_as_its_files_say(made: Make) -> None:
    run = read_run(made(environment={**ENVIRONMENT, "jobs": JOBS}, checkpoints=[10, 24]), "a")
    assert (run.status, run.evaluated, run.batch, run.restarts) == ("done", "test", 120, [15])
    assert run.checkpoints == [10, 24]
    assert run.metrics.metric == "accuracy"
    assert run.metrics.steps["loss"].tolist() == [2 / step for step in range(1, 25)]
    assert run.metrics.evaluations["score"].tolist() == [0.75]


def test_epochs_follow_from_the_lines(made: Make) -> None:
    run = read_run(made(config=None, environment=None), "a")
    assert run.steps_per_epoch == 12


def test_jobs_tell_epochs_and_rows(made: Make) -> None:
    lines = [step_line(10, epoch=1), step_line(20, epoch=2)]  # 10 to 19 steps
    told = {**ENVIRONMENT, "jobs": [*JOBS, {"after": 20, "steps_per_epoch": 12, "rows_per_step": 118.5}]}
    run = read_run(made("with", lines, environment=told), "a")
    assert (run.steps_per_epoch, run.rows_per_step) == (12, 118.5)
    assert run.seconds.tolist() == pytest.approx([118.5 * 10 / 1200, 118.5 * 15 / 1200])  # the second job began at 15
    without = read_run(made("without", lines, environment=None), "a")
    assert (without.steps_per_epoch, without.rows_per_step) == (14.5, 120)
    assert read_run(made("first", lines[:1], environment=None), "a").steps_per_epoch is None


def test_seconds_are_those_of_the_steps_since_the_line_before(made: Make) -> None:
    """Of a job that went on from step 15, the first line counts from there."""
    lines = [step_line(10), step_line(20), step_line(24, speed=600.0)]
    assert read_run(made("one", lines), "a").seconds.tolist() == pytest.approx([1.0, 2.0, 2.8])
    again = read_run(made("two", lines, environment={**ENVIRONMENT, "jobs": JOBS}), "a")
    assert again.seconds.tolist() == pytest.approx([1.0, 1.5, 2.3])
    stopped = [step_line(10), step_line(20, speed=0.0), step_line(21, loss=None)]
    assert read_run(made("three", stopped), "a").seconds.tolist() == pytest.approx([1.0, 1.0, 1.1])


def test_a_run_without_a_line_is_empty(made: Make) -> None:
    run = read_run(made(lines=[], config=None, environment=None, result={"status": "failed", "reason": "x"}), "a")
    assert (run.status, run.steps_per_epoch, len(run.seconds), run.restarts) == ("failed", None, 0, [])


def test_a_half_written_last_line_is_no_error_and_others_are_told(made: Make) -> None:
    path = made()
    file = path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 25, "lo')
    assert read_run(path, "a").metrics.problems == []
    file.write_text('{"step": "1"}\n' + file.read_text())
    run = read_run(path, "a")
    assert len(run.metrics.steps["step"]) == 24
    assert [f"{file}, line 1, is damaged: step is '1'" in problem for problem in run.metrics.problems] == [True]


def test_odd_values_are_not_drawn(made: Make) -> None:
    odd = step_line(1, loss=1e300, learning_rate=float("inf"), accuracy="high", seconds={"compute": 5, "slowest": []})
    metrics = read_run(made(lines=[odd, step_line(2, seconds={"slowest": {"rank": 3}})]), "a").metrics
    for name in ("loss", "learning_rate", "score", "compute, most"):
        assert np.isnan(metrics.steps[name][0])
    assert [(slow.step, slow.rank, slow.activity) for slow in metrics.slow] == [(2, 3, "")]


def test_lines_are_put_in_order(made: Make) -> None:
    run = read_run(made(lines=[*LINES[12:], *LINES[:12], evaluation_line(12)]), "a")
    assert run.metrics.steps["step"].tolist() == list(range(1, 25))
    assert run.metrics.evaluations["step"].tolist() == [12, 24]


def test_settings_of_another_version_are_named(made: Make) -> None:
    run = read_run(made(config=CONFIG + "warp-speed = 9\n"), "a")
    assert (run.unknown, run.settings["warp-speed"]) == (["warp-speed"], 9)


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    paths = [Path("/x/a/run"), Path("/x/b/run"), Path("/x/other")]
    assert labels(paths) == ["a/run", "b/run", "other"]
    assert labels([Path("/x/a/run"), Path("/y/a/run")]) == ["x/a/run", "y/a/run"]
    assert labels([Path(os.fsdecode(b"/x/bad\xff\x07name"))]) == ["bad\ufffd\ufffdname"]


def test_a_run_that_is_named_twice_is_read_once(made: Make) -> None:
    one, two = made("one"), made("two")
    assert [run.label for run in read_runs([one, two, one / ".." / "one"])] == ["one", "two"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "nowhere: there is no such directory"),
        ("runs", "runs: holds no run; runs in it: first"),
        ("runs/first/metrics.jsonl", "metrics.jsonl: is a file; give the directory that it is in"),
        ("runs/first/checkpoints", "checkpoints: holds no run$"),
    ],
)
def test_what_is_no_run_is_refused(made: Make, tmp_path: Path, path: str, message: str) -> None:
    made("runs/first")
    with pytest.raises(ConfigError, match=message):
        read_run(tmp_path / path, "a")


@pytest.mark.parametrize("file", ["config.toml", "environment.json", "result.json"])
def test_a_damaged_file_is_named(made: Make, file: str) -> None:
    path = made()
    (path / file).write_text("{")
    with pytest.raises(OutputError, match=f"{path / file} is damaged"):
        read_run(path, "a")


def test_settings_that_are_no_numbers_are_not_counted_with(made: Make) -> None:
    odd = 'batch = "many"\nsteps = []\nheld-out = nan\nvalidation = true\n'
    run = read_run(made(config=odd, environment=None), "a")
    assert (run.batch, run.last_step, run.evaluated, run.rows_per_step) == (0, 0, "test", 1)
    assert run.steps_per_epoch == 12
