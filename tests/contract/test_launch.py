"""What is settled before the first step: the same settings on all ranks, --init, the directory's rights."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import COMMANDS, LIMIT, jobs_of, launch, launch_all, mpirun, write_commands

pytestmark = pytest.mark.contract


DIFFERENT = [  # flags of rank 0, flags of rank 1, and words of the refusal
    ("", "--stpes 3", "--stpes"),
    ("--stpes 3", "", "--stpes"),
    ("", "--config /nowhere.toml", "/nowhere.toml"),
    ("--batch 64", "--batch 32", "ranks differ in --batch: 32 (rank 1 on"),
    ("", "--pipe 2", "ranks differ in --pipe: 2 (rank 1 on"),
]


def test_ranks_with_different_settings_are_refused(tmp_path: Path) -> None:
    """Each rank has a file of commands of its own."""
    run = tmp_path / "run"
    (launcher, *_), program = mpirun(1), ["-n", "1", sys.executable, COMMANDS]
    given = [[(run, f"--steps 3 {pair[rank]}") for pair in DIFFERENT] for rank in (0, 1)]
    files = [write_commands(tmp_path / f"rank-{rank}", commands) for rank, commands in enumerate(given)]
    command = [launcher, *program, files[0], ":", *program, files[1]]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=LIMIT, stdin=subprocess.DEVNULL)
    jobs = jobs_of(files[0], given[0], done)
    for number, (job, (_, _, words)) in enumerate(zip(jobs, DIFFERENT, strict=True)):
        said = job.err + Path(f"{files[1]}.{number}.err").read_text()
        assert job.code == 78
        assert words in said
        assert said.count("mpiml.train:") == 1
    assert not run.exists()


def test_ranks_with_another_version_are_refused(tmp_path: Path) -> None:
    (launcher, *_) = mpirun(1)
    flags = ["--out", str(tmp_path / "run"), "--steps", "3"]
    other = "import sys, mpiml; mpiml.__version__ = '0'; from mpiml.train import main; sys.exit(main())"
    command = [launcher, "-n", "1", sys.executable, "-m", "mpiml.train", *flags, ":"]
    command += ["-n", "1", sys.executable, "-c", other, *flags]
    began = time.monotonic()
    job = subprocess.run(command, check=False, capture_output=True, text=True, timeout=LIMIT)
    assert time.monotonic() - began < 5
    assert job.returncode == 78
    assert "ranks differ in mpiml: 0 (rank 1 on" in job.stderr
    assert job.stderr.count("mpiml.train:") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks", [0, 1])
def test_a_process_alone_is_a_job(train: Any, ranks: int) -> None:
    assert train(ranks, "--steps 1").code == 0


def test_processes_that_another_launcher_means_to_be_one_job_are_refused(tmp_path: Path) -> None:
    began = time.monotonic()
    job = launch(0, "-m", "mpiml.train", "--out", str(tmp_path / "run"), SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="0")
    assert time.monotonic() - began < 5
    assert job.returncode == 78
    assert "4 processes were started, but" in job.stderr
    assert "srun --mpi=pmi2" in job.stderr
    assert job.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
    other = launch(0, "-m", "mpiml.train", "--out", str(tmp_path / "run"), SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="1")
    assert (other.returncode, other.stderr) == (78, "")


def test_init_takes_the_weights_and_starts_at_step_0(train: Any) -> None:
    first = train(0, "--steps 6 --hidden 16 --microbatches 4", out="first")
    weights = first.run / "checkpoints" / "step-000000006.safetensors"
    flags = f"--steps 1 --lr 0 --optimizer sgd --hidden 16 --init {weights}"
    job = train(3, flags, out="second")
    assert job.code == 0, job.err
    assert job.result["step"] == 1
    assert job.result["weights_sha256"] == first.result["weights_sha256"]
    again = train(0, f"{flags} --resume", out="second")
    assert "nothing to do" in again.out, again.err


def test_init_that_cannot_be_used_leaves_the_directory_free(train: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    wider = train(0, "--steps 1 --hidden 32", out="wider").run / "checkpoints" / "step-000000001.safetensors"
    flags = "--hidden 16 --steps 2"
    unusable = [tmp_path / "missing.safetensors", tmp_path / "other.npz", wider]
    refusals = [(tmp_path / f"run-{number}", f"{flags} --init {init}") for number, init in enumerate(unusable)]
    jobs = launch_all(2, [*refusals, *((run, flags) for run, _ in refusals)])
    for job, init in zip(jobs[:3], unusable, strict=True):
        assert job.code == 74
        assert init.name in job.err or "checkpoint's layers" in job.err
        assert job.err.count("\n") == 1
    assert [job.code for job in jobs[3:]] == [0, 0, 0]


def test_run_without_its_config_goes_on_with_the_settings_of_its_checkpoint(train: Any) -> None:
    flags = "--hidden 16 --microbatches 6 --lr 0.01 --seed 3 --save-every 5"
    whole = train(0, f"{flags} --steps 10", out="whole")
    cut = train(0, f"{flags} --steps 5", out="cut")
    (cut.run / "config.toml").unlink()
    assert train(0, "--steps 10", out="cut").code == 73
    job = train(3, "--resume --steps 10", out="cut")
    assert job.result["weights_sha256"] == whole.result["weights_sha256"]


def test_checkpoint_of_another_run_is_refused(train: Any) -> None:
    one = train(0, "--hidden 16 --steps 4", out="one")
    other = train(0, "--hidden 16 --steps 4 --seed 1", out="other")
    name = "checkpoints/step-000000004.safetensors"
    shutil.copy(one.run / name, other.run / name)
    job = train(2, "--resume --steps 6", out="other")
    assert job.code == 74
    assert "--seed 0" in job.err


def test_a_job_script_may_repeat_its_flags(train: Any) -> None:
    flags = "--hidden 16 --loss auto --microbatches 4 --epochs 1 --resume"
    assert train(2, flags).code == 0
    job = train(0, flags.replace("--epochs 1", "--epochs 2"))
    assert job.code == 0, job.err
    assert job.result["step"] == 24


def test_finished_run_says_so_on_a_grid_that_it_could_not_run_on(train: Any) -> None:
    train(0, "--hidden 16 --microbatches 2 --steps 2")
    job = train(4, "--resume")
    assert job.code == 0, job.err
    assert "nothing to do" in job.out


def test_damaged_newer_checkpoints_do_not_crowd_out_good_ones(train: Any) -> None:
    job = train(0, "--hidden 16 --microbatches 2 --steps 10 --save-every 5")
    newest = job.run / "checkpoints" / "step-000000010.safetensors"
    newest.write_bytes(newest.read_bytes()[:500])
    (job.run / "result.json").unlink()
    again = train(2, "--resume --save-every 1 --keep 1 --steps 8")
    assert again.code == 0, again.err
    names = sorted(path.name for path in (job.run / "checkpoints").glob("step-*"))
    assert names == ["step-000000008.safetensors", "step-000000010.safetensors"]
    assert train(0, "--resume --steps 9").code == 0


def test_one_rank_reports_and_ends_as_several_do(tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("trouble.py"))
    for ranks, kind in ((0, "exit0"), (1, "raise")):
        done = launch(ranks, script, "0", "forward", kind, "--out", str(tmp_path / kind), "--steps", "20")
        assert done.returncode == 70
        assert done.stderr.count("Traceback") == 1


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path: Path) -> None:
    command = f"{sys.executable} -m mpiml.train --steps 300 --hidden 16 --out {tmp_path}/run | head -1"
    subprocess.run(["bash", "-c", command], check=True, stdout=subprocess.DEVNULL, timeout=LIMIT)
    assert '"status": "done"' in (tmp_path / "run" / "result.json").read_text()


def test_standard_error_that_is_closed_does_not_end_the_run(tmp_path: Path) -> None:
    command = f"{sys.executable} -m mpiml.train --steps 3 --hidden 16 --out {tmp_path}/run 2>&-"
    assert subprocess.run(["sh", "-c", command], check=False, capture_output=True, timeout=LIMIT).returncode == 0
    assert '"status": "done"' in (tmp_path / "run" / "result.json").read_text()


def test_rank_that_stops_before_mpi_is_up_ends_the_job(tmp_path: Path) -> None:
    """The others wait for it in MPI_Init, where only a timer in C can end them."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        "from mpiml.run import alarm\n"
        "alarm.LEAST, alarm.GRACE, alarm.TURN = 1.0, 0.5, 0.0\n"
        "if alarm.rank_by_launcher() == 1: os.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    flags = f"--out {tmp_path}/run --stall-timeout 1"
    job = launch(3, "-m", "mpiml.train", *flags.split(), limit=30, PYTHONPATH=f"{tmp_path}:{Path(__file__).parents[2]}")
    assert job.returncode != 0
    assert "starting MPI for 1 s" in job.stderr or "MPI_Init, which waits for all ranks" in job.stderr


def test_rank_that_cannot_import_what_it_needs_ends_the_job(tmp_path: Path) -> None:
    """The others wait for it, and it for them as it ends MPI."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif os.environ.get('PMI_RANK') == '1':\n    sys.modules['mpiml.run.crew'] = None\n"
    )
    flags = f"--steps 3 --out {tmp_path}/run"
    job = launch(2, "-m", "mpiml.train", *flags.split(), limit=30, PYTHONPATH=str(tmp_path))
    assert job.returncode != 0
    assert "import of mpiml.run.crew halted" in job.stderr


def test_library_that_cannot_watch_is_said(train: Any) -> None:
    job = train(2, "--steps 1 --hidden 8", MPI4PY_RC_THREAD_LEVEL="serialized")
    assert job.code == 0, job.err
    assert "no MPI_THREAD_MULTIPLE: a rank that is stopped is not noticed" in job.out
