"""Scaling studies: which points are measured, what the table makes of them, and a real study with its report."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpiml.config import Config
from mpiml.errors import ConfigError
from mpiml.study.points import POINTS, STUDY, TRAINING, Point, plan, runs
from mpiml.study.report import notes
from mpiml.study.scaling import launcher
from mpiml.study.table import load, markdown
from mpiml.study.tasks import Training, tasks, trained, training
from tests.conftest import launch, mpirun


def test_strong_points_keep_the_batch() -> None:
    points = plan("strong", [1, 2, 4], [1, 2], 64, None)
    assert [p for p in points if not p.extra] == [
        Point(1, 1, 64, 1),
        Point(2, 1, 64, 2),
        Point(2, 2, 64, 4),
        Point(4, 1, 64, 4),
        Point(4, 2, 64, 8),
    ]
    assert [p.microbatches for p in points if p.extra] == [2, 4, 8]  # one rank with one is there already


def test_weak_points_keep_the_rows_of_a_rank() -> None:
    points = plan("weak", [1, 2, 4], [1, 2], 64, None)
    assert {p.batch / p.ranks for p in points} == {64}
    assert [p.microbatches for p in points if p.extra] == [2]  # pipelines have two micro-batches a rank, others one


def test_given_microbatches_are_kept() -> None:
    assert {p.microbatches for p in plan("strong", [1, 2, 4], [1], 64, 8)} == {1, 8}


@pytest.mark.parametrize(
    ("ranks", "pipes", "batch", "microbatches", "named"),
    [([1, 3], [2], 64, None, "--ranks 3"), ([1, 8], [1], 4, None, "--ranks 8"), ([1, 8], [1], 64, 4, "4: fewer")],
)
def test_what_cannot_be_measured_is_refused(
    ranks: list[int], pipes: list[int], batch: int, microbatches: int | None, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        plan("strong", ranks, pipes, batch, microbatches)


def test_repeats_are_shuffled_alike_each_time() -> None:
    points = plan("strong", [1, 2, 4, 8], [1], 64, None)
    order = runs(points, 3)
    assert order == runs(points, 3)
    plain = [(point, repeat) for point in points for repeat in range(3)]
    assert sorted(order) == sorted(plain)
    assert order != plain
    assert [point for point, _ in order[:3]] != [points[0]] * 3  # a point's repeats are apart


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
    study = load(made(tmp_path, "strong", {one: [12.0, 12.1], other: [10.0, 10.0], two: [5.0, 6.0, 4.0]}))
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
    study = load(made(tmp_path, "weak", {one: [10.0], four: [12.5]}))
    assert study.lines[1].speed_up.value == pytest.approx(3.2)
    assert study.lines[1].row()["node_hours_per_million_samples"] == pytest.approx(2 * 12.5e-3 / 3600 * 1e6 / 256)


def test_more_ranks_than_cores_are_marked(tmp_path: Path) -> None:
    one, eight = Point(1, 1, 64, 1), Point(8, 1, 64, 8)
    made(tmp_path, "strong", {one: [10.0], eight: [9.0]})
    path = tmp_path / POINTS / f"{eight.name}_0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"nodes": 1}))
    study = load(tmp_path)
    assert [line.oversubscribed for line in study.lines] == [False, True]
    assert "| 8* |" in markdown(study)


def test_what_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no study"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="no job of one rank"):
        load(made(tmp_path, "strong", {Point(2, 1, 64, 2): [1.0]}))


TARGET = {"target": 0.9, "max_epochs": 3}


def train_to(directory: Path, point: Point, scores: list[float], epochs: int = 3) -> None:
    """What a training run leaves that was evaluated every ten steps."""
    run = directory / TRAINING / training(point, epochs)
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
    study = load(tmp_path)
    assert [line.seconds_to_target for line in study.lines] == [None, pytest.approx(0.1), pytest.approx(0.12), None]
    assert study.lines[1].row()["samples_to_target"] == 20 * 64
    assert study.open == 4 + 1  # the second repeats, and the training run of four ranks
    rows = markdown(study).splitlines()[2:]
    assert [row.split("|")[-4].strip() for row in rows] == ["not reached (0.89)", "20", "20", "open"]
    assert any("5 of the study's jobs are open" in note for note in notes(study))


def test_each_batch_and_micro_batches_are_trained_once(tmp_path: Path) -> None:
    points = plan("strong", [1, 2, 4], [1, 2], 64, 8)
    assert trained(points) == [Point(4, 2, 64, 8)]
    weak = plan("weak", [1, 2, 4], [1], 64, None)
    jobs = tasks(tmp_path, weak, 1, (1, 3), Config(batch=64, eval_every=12), ["--batch=64"], 5)
    flags = [task.words for task in jobs if isinstance(task, Training)]
    assert [flag for words in flags for flag in words if flag.startswith("--eval-every")] == [
        f"--eval-every={every}" for every in (12, 6, 3)
    ]  # after as many rows at each size
    assert not [task for task in tasks(tmp_path, weak, 1, (1, 3), Config(), [], None) if isinstance(task, Training)]


def test_one_repeat_has_no_interval(tmp_path: Path) -> None:
    text = markdown(load(made(tmp_path, "strong", {Point(1, 1, 64, 1): [10.0]})))
    assert "| 10.00 |" in text
    assert "inf" not in text


def test_a_launcher_must_say_where_the_ranks_go() -> None:
    assert launcher("srun --mpi=pmi2 -n {ranks}", 4) == ["srun", "--mpi=pmi2", "-n", "4"]
    assert launcher("srun -n {ranks} -N {nodes}", 5, 4) == ["srun", "-n", "5", "-N", "2"]
    with pytest.raises(ConfigError, match=r"\{ranks\}"):
        launcher("srun", 4)
    with pytest.raises(ConfigError, match="--node-ranks"):
        launcher("srun -n {ranks} -N {nodes}", 4)


def scaling(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mpiml.scaling", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


@pytest.mark.contract
def test_a_real_study(tmp_path: Path) -> None:
    """Measured, a lost and a failed point measured again, reported."""
    start = " ".join([*mpirun(1)[:-1], "{ranks}"])
    study = ["--steps", "3", "--warm-up", "1", "--repeats", "2", "--out", str(tmp_path / "s"), "--launcher", start]
    accuracy = ["--target", "0.01", "--max-epochs", "1"]
    done = scaling("run", "--ranks", "2", *study, *accuracy, "--", "--hidden", "16", "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained, test accuracy") == 2
    files = sorted((tmp_path / "s" / POINTS).iterdir())
    assert len(files) == 6  # one and two ranks, and one rank with two micro-batches, twice each
    found = json.loads(files[-1].read_text())
    assert (found["ranks"], found["microbatches"], len(found["step_seconds"])) == (2, 2, 3)
    assert all(0 < seconds < 10 for seconds in found["step_seconds"])
    # The mean over ranks; each step's seconds are of its slowest rank, so they are more, if not by much.
    assert 0.7 < sum(found["shares"].values()) / (sum(found["step_seconds"]) / 3) < 1.1

    files[0].unlink()
    part = scaling("run", "--ranks", "2", *study, "--only", "2,1", "--", "--hidden", "16", "--quiet")
    assert part.stdout.count("\n") == 1  # of two ranks, one job a repeat
    again = scaling("run", "--ranks", "2", *study, "--", "--hidden", "16", "--quiet")
    assert again.stdout.count("there already") == 5
    other = scaling("run", "--ranks", "2", *study, "--", "--hidden", "17", "--quiet")
    assert (other.returncode, "choose another --out" in other.stderr) == (78, True)

    pytest.importorskip("matplotlib")
    told = scaling("report", str(tmp_path / "s"))
    assert told.returncode == 0, told.stderr
    page = (tmp_path / "s" / "scaling.html").read_text()
    assert page.count("<svg") == 5
    assert not [word for word in ("src=", 'href="http', "@import") if word in page]
    rows = list(csv.DictReader((tmp_path / "s" / "scaling.csv").open()))
    assert [row["ranks"] for row in rows] == ["1", "2", "1"]
    content = json.loads((tmp_path / "s" / "scaling.json").read_text())
    assert content["rows"][1]["speed_up"] > 0
    assert content["rows"][1]["seconds_to_target"] > 0
    assert content["open"] == 0
    assert (tmp_path / "s" / "speed-up.png").stat().st_size > 5000


@pytest.mark.contract
def test_failed_jobs_are_told_and_tried_again(tmp_path: Path) -> None:
    start = " ".join([*mpirun(1)[:-1], "{ranks}"])
    study = [
        "run",
        "--ranks",
        "1",
        "--repeats",
        "1",
        "--out",
        str(tmp_path / "s"),
        "--launcher",
        start,
        "--steps",
        "2",
    ]
    failed = scaling(*study, "--", "--data", str(tmp_path / "nothing.npz"))
    assert failed.returncode == 1
    assert "nothing.npz" in failed.stdout
    assert "tries them again" in failed.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", "--ranks", "0", "--out", "x"], "--ranks"),
        (["run", "--ranks", "2", "--out", "x", "--", "--pipe", "2"], "--pipe is the study's"),
        (["run", "--ranks", "2", "--out", "x", "--", "--hiden", "2"], "did you mean --hidden"),
        (["run", "--ranks", "2", "--out", "x", "--sbatch", "--partition=x"], "--slurm, which is not given"),
        (["run", "--ranks", "2", "--out", "x", "--target", "1", "--", "--eval-every", "0"], "--eval-every 0"),
        (["report", "nowhere"], "holds no study"),
    ],
)
def test_bad_commands_are_refused(arguments: list[str], named: str) -> None:
    done = scaling(*arguments)
    assert (done.returncode, named in done.stderr) == (78, True), done.stderr


@pytest.mark.parametrize(("flags", "named"), [([], "--node-ranks"), (["--node-ranks", "1"], "no squeue found")])
def test_without_slurm_nothing_is_submitted(tmp_path: Path, flags: list[str], named: str) -> None:
    command = [sys.executable, "-m", "mpiml.scaling", "run", "--slurm", "--ranks", "1", "--out", str(tmp_path), *flags]
    env = {name: value for name, value in os.environ.items() if name != "PATH"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env | {"PATH": "/nowhere"})
    assert (done.returncode, named in done.stderr) == (78, True), done.stderr


@pytest.mark.contract
def test_processes_that_are_not_one_job_measure_nothing(tmp_path: Path) -> None:
    """As a launcher makes them that does not suit the MPI library."""
    done = launch(0, "-m", "mpiml.study.timing", str(tmp_path / "x.json"), "1", "1", SLURM_STEP_NUM_TASKS="4")
    assert (done.returncode, "4 processes" in done.stderr) == (78, True), done.stderr
    assert not (tmp_path / "x.json").exists()
