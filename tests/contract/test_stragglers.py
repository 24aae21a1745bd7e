"""The log of a real job names the rank that the others wait for, and no rank of a healthy one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Job, launch

pytestmark = pytest.mark.contract

# The cores are pretended: the job is not to be called crowded on a small machine, or to be so on a large one.
OWN = """
import os, time
from mpi4py import MPI
from mpiml.data.dataset import open_dataset
from mpiml.nn.layers import Flatten, Linear
from mpiml.run import stragglers

stragglers.SECONDS = 0.0  # the job is to be short
cores = set(range(int(os.environ["CORES"])))
os.sched_getaffinity = lambda process: cores
slow = os.environ["SLOW"] if MPI.COMM_WORLD.rank == 1 or os.environ["ALL_SLOW"] else ""

def load():
    return open_dataset("digits")

def transform(x, y, rng):
    time.sleep(0.04 * (slow == "data"))
    return x, y

class Slow(Flatten):
    def __call__(self, x, at):
        time.sleep(0.04 * (slow == "compute"))
        return super().__call__(x, at)

def model(shape, outputs):
    return [Slow(), Linear(64, outputs)]
"""


def job(path: Path, ranks: int, slow: str, cores: int, flags: str = "", all_slow: str = "") -> Job:
    (path / "own.py").write_text(OWN)
    arguments = "--data own:load --model own:model --transform own:transform --steps 16 --log-every 4 --eval-every 0"
    environment = {
        "SLOW": slow,
        "ALL_SLOW": all_slow,
        "CORES": str(cores),
        "PYTHONPATH": f"{Path(__file__).parents[2]}:{path}",
    }
    command = ["-m", "mpiml.train", "--out", str(path / "run"), *arguments.split(), *flags.split()]
    done = launch(ranks, *command, **environment)
    assert done.returncode == 0, done.stderr
    return Job(done.returncode, done.stdout, done.stderr, path / "run")


@pytest.mark.parametrize(("ranks", "slow", "flags"), [(3, "compute", ""), (2, "data", ""), (4, "compute", "--pipe 2")])
def test_slow_rank_is_named_once_and_in_the_lines(tmp_path: Path, ranks: int, slow: str, flags: str) -> None:
    done = job(tmp_path, ranks, slow, 64, flags)
    (warning,) = (text for text in done.out.splitlines() if "wait for" in text)
    host = done.run.joinpath("environment.json").read_text().split('"host": "')[1].split('"')[0]
    assert warning.startswith(f"warning: the others wait for rank 1 (on {host}): its time in {slow} is ")
    named = [line["seconds"].get("slowest") for line in done.metrics]
    assert named[:2] == [None, None]
    for slowest in named[2:]:
        assert (slowest["rank"], slowest["host"], slowest["activity"]) == (1, host, slow)
        assert slowest["times_median"] > 1.5


@pytest.mark.parametrize(("all_slow", "cores"), [("yes", 64), ("", 2)])
def test_nobody_is_named_where_all_are_slow_or_cores_are_short(tmp_path: Path, all_slow: str, cores: int) -> None:
    """All take as long for computing, of which a busy machine adds little."""
    done = job(tmp_path, 3, "compute", cores, "--steps 60", all_slow)
    assert "wait for" not in done.out
    assert all(set(line["seconds"]) >= {"compute", "data"} for line in done.metrics)
    assert not any("slowest" in line["seconds"] for line in done.metrics)
