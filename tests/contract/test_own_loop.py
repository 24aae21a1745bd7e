"""A loop of one's own, of the parts: the same bits on every layout, and an end in time that says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import launch

pytestmark = pytest.mark.contract

SCRIPT = str(Path(__file__).with_name("own_loop.py"))
RANKS, LIMIT = 3, 15.0  # seconds: 10 that are promised, and the start


def test_the_sums_have_the_same_bits_on_every_layout(tmp_path: Path) -> None:
    said = []
    for ranks, nodes in ((0, ""), (2, ""), (3, ""), (4, "2,2"), (4, "1,3")):
        done = launch(
            ranks, SCRIPT, str(tmp_path / "run"), "0", "never", "-", **({"MPIML_NODES": nodes} if nodes else {})
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert len(set(said)) == 1
    assert len(said[0].strip()) == 64
    assert json.loads((tmp_path / "run/result.json").read_text())["status"] == "done"


RAISED = "RuntimeError: this rank is in trouble"
STOPPED = "rank {rank} has given no sign of life for 2 s"
ASLEEP = "rank {rank} has made no progress for 2 s"
LEFT = "rank {rank} has left the block in step 2, and the others wait for it: 2 in step 3 (communication)"


@pytest.mark.parametrize(
    ("phase", "kind", "rank", "reason"),
    [
        ("first", "raise", 0, RAISED),
        ("last", "raise", 2, RAISED),
        ("first", "exit0", 2, "sys.exit(0) in the middle of the run"),
        ("loop", "exit3", 0, "sys.exit(3) in the middle of the run"),
        ("put", "raise", 2, "put(m=3): w: no NumPy array can be made of a Troubled (this rank is in trouble)"),
        ("loop", "thread", 2, RAISED),
        ("put", "stop", 0, STOPPED),
        ("last", "stop", 2, STOPPED),  # the others wait for it, to leave
        ("loop", "sleep", 2, ASLEEP),
        ("loop", "leave", 0, LEFT),  # out of the guard, by an exception that is caught
        ("break", "-", 2, "rank {rank} is at close() in step 3, but rank 0 is at mean() in step 4"),
    ],
)
def test_ways_out_that_somebody_is_left_to_write_down(
    tmp_path: Path, phase: str, kind: str, rank: int, reason: str
) -> None:
    done = launch(RANKS, SCRIPT, str(tmp_path), str(rank), phase, kind, limit=LIMIT)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["reason"].startswith(reason.format(rank=rank))
    assert (result["status"], result["rank"], result["exit_code"]) == ("failed", rank, done.returncode)
    assert done.returncode in (70, 78)
    assert f"own_loop.py: {reason.format(rank=rank)}" in done.stderr
    assert done.stderr.count("Traceback") <= 1


@pytest.mark.parametrize(
    ("phase", "kind", "rank"),
    [("first", "os-exit0", 2), ("loop", "kill", 0), ("put", "os-exit3", 0), ("last", "kill", 2)],
)
def test_ways_out_that_cannot_be_seen(tmp_path: Path, phase: str, kind: str, rank: int) -> None:
    """The launcher ends the job, or a neighbour does; its exit code is the launcher's."""
    launch(RANKS, SCRIPT, str(tmp_path), str(rank), phase, kind, limit=LIMIT)
    assert json.loads((tmp_path / "result.json").read_text())["status"] in ("running", "failed")


def test_a_rank_that_does_not_come_to_the_guard(tmp_path: Path) -> None:
    done = launch(RANKS, SCRIPT, str(tmp_path), "2", "before", "raise", limit=2 * LIMIT)
    assert done.returncode != 0
    assert "this rank is in trouble" in done.stderr
    assert "waiting for all ranks to enter the guard" in done.stderr
