"""A loop of one's own, of the parts: the same bits on every layout, and an end in time that says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chaos.trouble import WORD
from tests.conftest import launch

pytestmark = pytest.mark.contract

SCRIPT = ("-m", "tests.contract.own_loop")
RANKS, LIMIT = 3, 15.0  # seconds: 10 that are promised, and the start


def test_the_sums_have_the_same_bits_on_every_layout(tmp_path: Path) -> None:
    said = []
    for ranks, nodes in ((0, ""), (3, ""), (4, "1,3")):
        path, more = tmp_path / str(len(said)), {"MPIML_NODES": nodes} if nodes else {}
        done = launch(ranks, *SCRIPT, str(path), "0", "never", "-", **more)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert len(set(said)) == 1
    assert len(said[0].strip()) == 64
    assert all(json.loads((tmp_path / f"{n}/result.json").read_text())["status"] == "done" for n in range(3))
    assert len({(tmp_path / f"{n}/checkpoints/step-000000007.safetensors").read_bytes() for n in range(3)}) == 1


RAISED = f"RuntimeError: {WORD}"
STOPPED = "rank {rank} has given no sign of life for 2 s"
ASLEEP = "rank {rank} has made no progress for 2 s, in step 3, Checkpoints.save() (checkpoint)"
LEFT = "rank {rank} has left the block in step 2, and the others wait for it: 2 in step 3, Sum.mean() (communication)"


@pytest.mark.parametrize(
    ("phase", "way", "rank", "reason"),
    [
        ("first", "raise", 0, RAISED),
        ("last", "raise", 2, RAISED),
        ("first", "sys.exit(0)", 2, "sys.exit(0) in the middle of the run"),
        ("loop", "sys.exit(3)", 0, "sys.exit(3) in the middle of the run"),
        ("put", "raise", 0, f"put(m=3): w: no NumPy array can be made of a Troubled ({WORD})"),
        ("save", "raise", 2, f"save: the array: no NumPy array can be made of a Troubled ({WORD})"),
        ("write", "endless loop", 2, ASLEEP),
        ("loop", "thread", 2, RAISED),
        ("put", "SIGSTOP", 0, STOPPED),
        ("alive", "SIGSTOP", 0, STOPPED),
        ("last", "SIGSTOP", 2, STOPPED),  # the others wait for it, to leave
        ("loop", "leave", 0, LEFT),  # out of the guard, by an exception that is caught
        ("break", "-", 2, "rank {rank} is at close() in step 3, but rank 1 is at mean() in step 4"),
    ],
)
def test_ways_out_that_somebody_is_left_to_write_down(
    tmp_path: Path, phase: str, way: str, rank: int, reason: str
) -> None:
    done = launch(RANKS, *SCRIPT, str(tmp_path), str(rank), phase, way, limit=LIMIT)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["reason"].startswith(reason.format(rank=rank))
    assert (result["status"], result["rank"], result["exit_code"]) == ("failed", rank, done.returncode)
    assert done.returncode in (70, 78)
    where = f" (rank {rank}, step " if reason == RAISED else ""
    assert f"own_loop.py: {reason.format(rank=rank)}{where}" in done.stderr
    assert done.stderr.count("Traceback") <= 1


@pytest.mark.parametrize(
    ("phase", "way", "rank"),
    [("first", "os._exit(5)", 2), ("loop", "SIGKILL", 0), ("write", "SIGKILL", 2), ("last", "SIGKILL", 2)],
)
def test_ways_out_that_cannot_be_seen(tmp_path: Path, phase: str, way: str, rank: int) -> None:
    """The launcher ends the job, or a neighbour does; its exit code is the launcher's."""
    done = launch(RANKS, *SCRIPT, str(tmp_path), str(rank), phase, way, limit=LIMIT)
    assert done.returncode != 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["rank"]) in (("running", None), ("failed", rank))


def test_an_error_of_a_rank_that_does_not_come_to_the_guard_ends_the_job(tmp_path: Path) -> None:
    done = launch(RANKS, *SCRIPT, str(tmp_path), "2", "before", "raise", limit=2 * LIMIT)
    assert done.returncode == 70
    assert f"RuntimeError: {WORD}\nown_loop.py: this error of rank 2 ends the job" in done.stderr
    assert "waiting" not in done.stderr


def test_a_rank_that_ends_before_it_has_come_to_the_guard(tmp_path: Path) -> None:
    done = launch(RANKS, *SCRIPT, str(tmp_path), "2", "before", "sys.exit(3)", limit=2 * LIMIT)
    assert done.returncode != 0
    assert "rank 0 has been waiting for all ranks to enter the guard for 2 s: another has not come" in done.stderr


def test_a_program_may_end_mpi_itself() -> None:
    script = (
        "from mpi4py import MPI; from mpiml.loop.until_exit import guard_until_exit; job = guard_until_exit({}); {}"
    )
    left = "job.at_end.append(lambda: print('left', flush=True)); MPI.Finalize()"
    done = launch(2, "-c", script.format("MPI.COMM_WORLD, 8", left))
    assert (done.returncode, done.stdout.count("left")) == (0, 2), done.stderr
