"""What ranks print, in files of the run directory: what a model prints on each rank, what a run says, and failures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mpiml.run.directory import is_own
from tests.conftest import Job

pytestmark = pytest.mark.contract

MODEL = """
import sys

from mpi4py import MPI
from mpiml.api import Flatten, Layer, Linear

RANK = MPI.COMM_WORLD.rank


class Talking(Layer):
    def output_shape(self, shape):
        return shape

    def __call__(self, x, at):
        if at.training:
            print(f"out {RANK} step {at.step}")
            print(f"err {RANK}", file=sys.stderr)
        if at.step == 5 and RANK == 2:
            raise ValueError("on purpose")
        return x, lambda dy, grads: dy


def net(shape, outputs):
    return [Flatten(), Linear(64, 8), Talking(), Linear(8, outputs)]
"""
FLAGS = "--model talking:net --rank-log"


@pytest.fixture
def talk(train: Callable[..., Job], tmp_path: Path) -> Callable[..., Job]:
    """Trains a model that prints, on 3 ranks."""
    (tmp_path / "talking.py").write_text(MODEL)
    return lambda flags, **more: train(3, f"{FLAGS} {flags}", PYTHONPATH=str(tmp_path), **more)


def log(job: Job, rank: int) -> list[str]:
    return (job.run / "ranks" / f"rank-{rank:05d}.log").read_text().splitlines()


def test_each_rank_prints_to_its_file_until_it_fails_and_what_the_run_says_is_on_the_terminal(
    talk: Callable[..., Job],
) -> None:
    first = talk("--steps 3")
    assert (first.code, first.err) == (0, "")
    assert not [line for line in first.out.splitlines() if line.startswith(("out", "err"))]
    assert "done: step 3" in first.out
    for rank in range(3):
        head, *rest = log(first, rank)
        assert head.startswith("--- 2")
        assert f": a job begins, rank {rank} of 3 on " in head
        assert [line for line in rest if line.startswith("out") and not line.endswith("step 0")] == [
            f"out {rank} step {step}" for step in (1, 2, 3)
        ]
        assert f"err {rank}" in rest
    assert any(line.startswith("done: step 3") for line in log(first, 0))

    failed = talk("--steps 9 --resume")
    assert failed.code == 70
    assert "mpiml.train: ValueError: on purpose (rank 2, step 5, compute)\nTraceback" in failed.err
    assert "out " not in failed.out
    for rank in range(3):
        lines = log(failed, rank)
        assert len([line for line in lines if line.startswith("---")]) == 2
        assert f"out {rank} step 4" in lines
    assert "ValueError: on purpose" in log(failed, 2)
    assert is_own(failed.run / "ranks" / "mine", failed.run)
    assert "rank-log" not in (failed.run / "config.toml").read_text()


def test_a_rank_that_cannot_write_is_named_and_prints_to_the_terminal(talk: Callable[..., Job], tmp_path: Path) -> None:
    (tmp_path / "run" / "ranks" / "rank-00001.log").mkdir(parents=True)
    job = talk("--steps 2")
    assert job.code == 0, job.err
    (warning,) = [line for line in job.out.splitlines() if "warning" in line]
    assert warning.startswith("warning: --rank-log: rank 1 on ")
    assert "cannot write " in warning
    assert warning.endswith("rank-00001.log: Is a directory; what it prints goes to the terminal")
    assert "out 1 step 2" in job.out
    assert "out 0 step 2" in log(job, 0)


def test_if_rank_0_cannot_write_the_run_does_not_begin(talk: Callable[..., Job], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ranks").touch()
    job = talk("--steps 2")
    assert job.code == 74
    assert job.err == f"mpiml.train: cannot create {tmp_path / 'run' / 'ranks'}: File exists\n"
