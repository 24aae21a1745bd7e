"""Scaling studies as commands: a real study with its report, jobs that fail, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.command import fault_line, run_command
from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.errors import ConfigError
from mpiml.run.launcher import launcher
from mpiml.scaling import timing
from mpiml.scaling.__main__ import main
from mpiml.scaling.points import POINTS, STUDY
from mpiml.training.run import unsaved
from tests.conftest import launch, mpirun


def test_rounds_are_timed_whole() -> None:
    """Six steps are two rounds of four, after one to warm up; a step has an equal part of its round."""
    x, y = np.ones((60, 3), np.float32), np.arange(60) % 2
    settings = {"average_every": 4, "workers": 2, "average_from": 7, "hidden": (4,), "batch": 20}
    config, warm_up, steps = timing.timed(Config(**settings), 1, 6)
    run = unsaved(MPI.COMM_SELF, config, Dataset.from_arrays(x, y, x, y))
    with run.data.ahead:
        first, second = np.split(np.array(timing.time_steps(run, warm_up, steps)["step_seconds"]), 2)
    assert len(set(first)) == len(set(second)) == 1
    assert len(first) == 4
    assert first[0] != second[0]
    assert (warm_up, run.calendar.round_of(12)) == (4, range(9, 13))
    assert not any(run.calendar.due(step).log for step in range(1, 13))
    run.free()
    assert timing.timed(Config(), 1, 6) == (Config(steps=7), 1, 6)


def test_a_launcher_must_say_where_the_ranks_go() -> None:
    assert launcher("srun --mpi=pmi2 -n {ranks}", 4) == ["srun", "--mpi=pmi2", "-n", "4"]
    assert launcher("srun -n {ranks} -N {nodes}", 5, 4) == ["srun", "-n", "5", "-N", "2"]
    with pytest.raises(ConfigError, match=r"\{ranks\}"):
        launcher("srun", 4)
    with pytest.raises(ConfigError, match="--node-ranks"):
        launcher("srun -n {ranks} -N {nodes}", 4)


def command(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", program, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


@pytest.mark.contract
def test_a_real_study(tmp_path: Path) -> None:
    """Measured, a lost and a failed point measured again, reported."""
    start = " ".join([*mpirun(1)[:-1], "{ranks}"])
    study = ["--steps", "3", "--warm-up", "1", "--repeats", "2", "--out", str(tmp_path / "s"), "--launcher", start]
    accuracy = ["--target", "0.01", "--max-epochs", "1", "--batches", "64,256"]
    done = command("mpiml.scaling", "run", "--ranks", "2", *study, *accuracy, "--", "--hidden", "16", "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained, accuracy at best") == 4
    files = sorted((tmp_path / "s" / POINTS).iterdir())
    assert len(files) == 6  # one and two ranks, and one rank with two micro-batches, twice each
    measured = json.loads(files[-1].read_text())
    assert (measured["ranks"], measured["microbatches"], len(measured["step_seconds"])) == (2, 2, 3)
    assert all(0 < seconds < 10 for seconds in measured["step_seconds"])
    # The mean over ranks; each step's seconds are of its slowest rank, so they are more, if not by much.
    assert 0.7 < sum(measured["shares"].values()) / (sum(measured["step_seconds"]) / 3) < 1.1

    files[0].unlink()
    part = command("mpiml.scaling", "run", "--ranks", "2", *study, "--only", "2,1", "--", "--hidden", "16", "--quiet")
    assert part.stdout.count("\n") == 1  # of two ranks, one job a repeat
    again = command("mpiml.scaling", "run", "--ranks", "2", *study, "--", "--hidden", "16", "--quiet")
    assert again.stdout.count("done before") == 5
    other = command("mpiml.scaling", "run", "--ranks", "2", *study, "--", "--hidden", "17", "--quiet")
    assert (other.returncode, "choose another --out" in other.stderr) == (78, True)

    pytest.importorskip("matplotlib")
    reported = command("mpiml.scaling", "report", str(tmp_path / "s"))
    assert reported.returncode == 0, reported.stderr
    images = re.findall(r"^!\[.*\]\((.*)\)$", (tmp_path / "s" / "scaling.md").read_text(), re.MULTILINE)
    assert [(tmp_path / "s" / name).exists() for name in images] == [True] * 6
    page = (tmp_path / "s" / "scaling.html").read_text()
    assert [page.count("<figure"), page.count("<table"), page.count("<li>")] == [6, 2, 3]
    assert reported.stdout.endswith(f"{tmp_path}/s/scaling.md\n{tmp_path}/s/scaling.html\n")
    rows = list(csv.DictReader((tmp_path / "s" / "scaling.csv").open()))
    assert [row["ranks"] for row in rows] == ["1", "2", "1"]
    content = json.loads((tmp_path / "s" / "scaling.json").read_text())
    assert content["rows"][1]["speed_up"] > 0
    assert content["rows"][1]["seconds_to_target"] > 0
    assert content["open"] == 0
    trained = [(row["batch"], row["microbatches"], row["steps_to_target"]) for row in content["trainings"]]
    assert trained == [(64, 2, 1), (128, 1, 1), (128, 2, 1), (256, 2, 1)]
    assert content["fits"][-1]["law"] == "epochs to 0.01"
    assert content["fits"][-1]["parameters"].keys() == {"E0", "B_noise"}
    assert (tmp_path / "s" / "speed-up.png").stat().st_size > 5000


def script(path: Path, text: str) -> str:
    """A launcher."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return f"{path} {{ranks}}"


def test_failed_jobs_are_told_and_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = script(tmp_path / "start", "echo some warning >&2; echo mpiml: broken >&2; exit 3")
    study = ["run", "--ranks", "1", "--repeats", "1", "--out", str(tmp_path / "s"), "--launcher", start]
    assert main(study) == 1
    printed = capsys.readouterr()
    assert "failed, exit code 3: mpiml: broken\n" in printed.out
    assert "tries them again" in printed.err


def test_line_that_names_the_fault() -> None:
    many = ["prterun says", "  File mpiml/train.py", "ValueError: x", "mpiml.train: rank 2 died", "mpiml: and more"]
    assert fault_line("\n".join(many), r"^mpiml", r"^\w*Error") == "mpiml.train: rank 2 died"
    assert fault_line("\n".join(many[:3]), r"^mpiml", r"^\w*Error") == "ValueError: x"
    assert fault_line("\nfirst\nsecond", "error") == "first"
    assert fault_line("", "error") == "it printed no error"


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (ConfigError("no"), 78, "p: no\n"),
        (KeyboardInterrupt(), 130, "p: interrupted\n"),
        (PermissionError(13, "Permission denied", "/x"), 74, "p: /x: Permission denied\n"),
    ],
)
def test_commands_end_in_one_line(
    error: BaseException, code: int, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def act() -> int:
        raise error

    assert run_command("p", act) == code
    assert capsys.readouterr().err == printed


@pytest.mark.parametrize("module", ["plan --ranks 4", "doctor"])
def test_nobody_needs_to_read_what_is_printed(module: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    name, *arguments = module.split()
    command = [sys.executable, "-m", f"mpiml.{name}", *arguments]
    done = subprocess.run(command, check=False, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", "--ranks", "0"], "--ranks: must be whole numbers, each at least 1, as in 1,2,4"),
        (["run", "--ranks", "2,x"], "not '2,x'"),
        (["run", "--ranks", "1", "--steps", "0"], "--steps: must be"),
        (["run", "--ranks", "1", "--repeats", "0"], "--repeats: must be"),
        (["run", "--ranks", "1", "--warm-up", "-1"], "--warm-up: must be"),
        (["run", "--ranks", "1", "--timeout", "0"], "--timeout: must be more than 0"),
        (["run", "--ranks", "1", "--timeout", "nan"], "--timeout: must be a number"),
        (["run", "--ranks", "1", "--target", "nan"], "--target: must be a number"),
        (["run", "--ranks", "1", "--target", "1.5"], "--target 1.5: accuracy is at most 1"),
        (["run", "--ranks", "1", "--launcher", "nosuch {ranks}"], "no program nosuch"),
        (["run", "--ranks", "1", "--launcher", "true"], "must say {ranks}"),
        (["run", "--ranks", "1", "--slurm", "--node-ranks", "1", "--launcher", "true"], "must say {ranks}"),
        (["run", "--ranks", "1", "--only", "3,0"], "no job of so many ranks"),
        (["run", "--ranks", "1", "--only", "3"], "--only: must be a number of ranks and a repeat, as in 4,0"),
        (["run", "--ranks", "1", "--", "--trace", "t.json"], "--trace is of no use to a study"),
        (["run", "--ranks", "1", "--", "--time-limit", "5"], "--time-limit is of no use"),
        (["run", "--ranks", "1", "--", "--save-every", "5"], "--save-every is of no use"),
        (["run", "--ranks", "1", "--", "--batch", "9999"], "--batch 9999: more than the 1437 rows"),
        (
            ["run", "--ranks", "2,16", "--mode", "weak", "--", "--batch", "100"],
            "--batch 100 x 16 ranks: more than the 1437 rows to train on; --batch 89 at most",
        ),
        (["run", "--ranks", "2048", "--mode", "weak", "--", "--batch", "1"], "use fewer ranks"),
        (["run", "--ranks", "1,64", "--pipes", "64"], "cannot be cut into 64 stages"),
        (["run", "--ranks", "2", "--", "--pipe", "2"], "--pipe is the study's"),
        (["run", "--ranks", "2", "--", "--hiden", "2"], "did you mean --hidden"),
        (["run", "--ranks", "2", "--sbatch", "--partition=x"], "--slurm, which is not given"),
        (["run", "--ranks", "2", "--target", "1", "--", "--eval-every", "0"], "--eval-every 0"),
        (["run", "--ranks", "1", "--trainings", "3"], "--trainings: these only train to a target; say which with"),
        (["run", "--ranks", "1", "--batches", "32,64"], "--batches: these only train to a target; say which with"),
        (["run", "--ranks", "1", "--batches", "0,8", "--target", "1"], "--batches: must be whole numbers"),
        (["run", "--ranks", "1", "--batches", "8,9999", "--target", "1"], "9999: more than the 1437 rows to train on"),
        (["run", "--ranks", "4", "--batches", "3,8", "--target", "1"], "3 rows cannot be cut into 4 micro-batches"),
        (
            ["run", "--ranks", "2", "--target", "1", "--", "--average-every", "4"],
            "4: each grid would have other workers",
        ),
        (
            ["run", "--ranks", "3", "--", "--average-every", "4", "--workers", "2"],
            "3 replicas cannot share them; 2 could",
        ),
        (["report", "nowhere"], "holds no study"),
    ],
)
def test_bad_commands_are_refused_and_leave_nothing_behind(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "s")] if arguments[0] == "run" else []
    assert main([arguments[0], *out, *arguments[1:]]) == 78
    errors = capsys.readouterr().err
    assert named in errors
    assert errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_data_that_cannot_be_used_are_refused_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = ["run", "--ranks", "1,2", "--out", str(tmp_path / "s"), "--", "--data", str(tmp_path / "nothing.npz")]
    assert main(study) == 65
    assert "nothing.npz" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["file", "file/s", "/proc/none"])
def test_places_that_cannot_be_written_are_refused(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["run", "--ranks", "1", "--out", str(tmp_path / place)]) == 74
    assert capsys.readouterr().err.startswith("mpiml.scaling: cannot write")


def test_the_same_settings_in_other_words_are_the_same_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = ["run", "--ranks", "1", "--repeats", "1", "--out", str(tmp_path / "s"), "--launcher"]
    study += [script(tmp_path / "start", "exit 1"), "--"]
    assert main([*study, "--batch", "64", "--hidden", "8"]) == 1
    assert main([*study, "--hidden=8", "--batch=64", "--seed", "0"]) == 1
    assert main([*study, "--hidden=8"]) == 78
    assert "choose another --out" in capsys.readouterr().err


def test_a_study_keeps_what_its_trainings_need(tmp_path: Path) -> None:
    study = ["run", "--ranks", "1", "--repeats", "1", "--out", str(tmp_path / "s"), "--launcher"]
    study += [script(tmp_path / "start", "exit 1"), "--target", "0.9"]
    for more in (["--trainings", "2", "--batches", "32"], ["--batches", "64"]):
        assert main([*study, *more, "--", "--noise-scale"]) == 1  # though one rank has one micro-batch
    content = json.loads((tmp_path / "s" / STUDY).read_text())
    assert (content["rows"], content["trainings"]) == (1437, 2)
    assert [point["batch"] for point in content["points"] if not point["timed"]] == [32, 64]


def test_submitted_jobs_train_as_the_command_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "squeue", "")
    script(tmp_path / "sbatch", "echo 7")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    study = ["run", "--slurm", "--node-ranks", "1", "--ranks", "1", "--repeats", "1", "--out", str(tmp_path / "s")]
    assert main([*study, "--target", "0.9", "--trainings", "2", "--batches", "32,64"]) == 0
    (written,) = (tmp_path / "s" / "jobs").glob("*.sbatch")
    assert " --batches=32,64 --trainings=2 " in written.read_text()
    assert main([*study[:-1], str(tmp_path / "t")]) == 0
    (written,) = (tmp_path / "t" / "jobs").glob("*.sbatch")
    assert "--batches" not in written.read_text()


@pytest.mark.parametrize(("flags", "named"), [([], "--node-ranks"), (["--node-ranks", "1"], "no sbatch found")])
def test_without_slurm_nothing_is_submitted(tmp_path: Path, flags: list[str], named: str) -> None:
    study = ["run", "--slurm", "--ranks", "1", "--out", str(tmp_path / "s"), *flags]
    command = [sys.executable, "-m", "mpiml.scaling", *study]
    env = {name: value for name, value in os.environ.items() if name != "PATH"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env | {"PATH": "/nowhere"})
    assert (done.returncode, named in done.stderr) == (78, True), done.stderr
    assert not list(tmp_path.iterdir())


def test_the_line_of_sbatch_that_names_the_fault_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "squeue", "")
    script(
        tmp_path / "sbatch",
        "echo 'sbatch: note: x' >&2; echo 'sbatch: error: invalid partition specified: nosuch' >&2\n"
        "echo 'sbatch: error: Batch job submission failed' >&2; exit 1",
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main(["run", "--slurm", "--node-ranks", "1", "--ranks", "1", "--out", str(tmp_path / "s")]) == 78
    assert "exit code 1: sbatch: error: invalid partition specified: nosuch\n" in capsys.readouterr().err


@pytest.mark.contract
def test_processes_that_are_not_one_job_measure_nothing(tmp_path: Path) -> None:
    """As a launcher makes them that does not suit the MPI library."""
    done = launch(0, "-m", "mpiml.scaling.timing", str(tmp_path / "x.json"), "1", "1", SLURM_STEP_NUM_TASKS="4")
    assert (done.returncode, "4 processes" in done.stderr) == (78, True), done.stderr
    assert not (tmp_path / "x.json").exists()
