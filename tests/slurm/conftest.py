"""A cluster for the tests in this directory, and what they ask of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm import cluster as slurm

ROOT = Path(__file__).parents[2]
LIMIT = 200  # seconds that a job may take, with all its restarts
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")


class Cluster:
    """Submits jobs and waits for them; `path` is a directory of its own for their files."""

    def __init__(self, path: Path):
        self.path = path
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "SLURM", "OMPI", "HYDRA"))}
        self.environment |= {"SLURM_CONF": str(path / "slurm.conf"), "TMPDIR": str(path), "PYTHON": sys.executable}
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{self.environment['PATH']}"

    def call(self, *command: str, **environment: str) -> str:
        """What a command prints; it must succeed."""
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment | environment,
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, flags: str, script: str, arguments: str, out: str, **environment: str) -> str:
        """The number of a new job that runs a script of jobs/ in the run directory `out`."""
        log = f"--output={self.path}/{out}.log"
        command = ["sbatch", "--parsable", log, *flags.split(), f"jobs/{script}", *arguments.split()]
        return self.call(*command, OUT=str(self.path / out), **environment)

    def show(self, job: str) -> dict[str, str]:
        """What SLURM says of a job."""
        fields = self.call("scontrol", "show", "job", "--oneliner", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def has_ended(self, job: str) -> bool:
        """Whether a job will not run any more."""
        return self.show(job)["JobState"] in ENDED

    def wait(self, job: str) -> dict[str, str]:
        """What SLURM says of a job when it has ended."""
        wait_until(lambda: self.has_ended(job), f"job {job} to end")
        return self.show(job)

    def fail(self, node: str) -> None:
        """Kill all that runs on a node, and set it down, as SLURM does when a node is silent for long enough."""
        self.kill(node)
        self.set_down(node)

    def kill(self, node: str) -> bool:
        """Kill all that runs on a node; False if that cannot be told from what runs on others, by its mounts."""
        mounts = os.readlink(f"/proc/{(self.path / f'slurmd-{node}.pid').read_text().strip()}/ns/mnt")
        if mounts == os.readlink("/proc/self/ns/mnt"):
            return False
        for number in (signal.SIGSTOP, signal.SIGKILL):  # as if all ended at once: nobody sees the end of another
            for process in processes_with(mounts):
                with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
                    os.kill(process, number)
        return True

    def set_down(self, node: str) -> None:
        """Tell SLURM that a node has failed."""
        self.call("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def log(self, out: str) -> str:
        """What the job of a run has printed."""
        path = self.path / f"{out}.log"
        return path.read_text() if path.exists() else ""

    def result(self, out: str, name: str = "result.json") -> dict[str, Any]:
        """The result.json of a run, or another such file; empty if there is none."""
        path = self.path / out / name
        return json.loads(path.read_text()) if path.exists() else {}

    def step(self, out: str) -> int:
        """The last step in the log of a run; 0 if there is none."""
        path = self.path / out / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def checkpoints(self, out: str) -> list[Path]:
        """The checkpoints of a run."""
        return sorted((self.path / out / "checkpoints").glob("step-*"))


def processes_with(mounts: str) -> list[int]:
    """The processes with these mounts, srun first: it would still end its processes on other nodes."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if os.readlink(process / "ns" / "mnt") == mounts:
                found.append(((process / "comm").read_text() != "srun\n", int(process.name)))
    return [process for _, process in sorted(found)]


def wait_until(condition: Any, what: str, limit: float = LIMIT, pause: float = 0.3) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(pause)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    slurm.install()
    if missing := slurm.missing():
        reason = f"SLURM is not here and cannot be installed (as root, by apt-get): no {', '.join(missing)}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    command = [sys.executable, "-m", "tests.slurm.cluster"]
    # A session of its own: Ctrl-C ends the tests, and they the cluster.
    daemon = subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert daemon.stdin
    assert daemon.stdout
    try:
        word, _, path = daemon.stdout.readline().strip().partition(" ")
        assert word == slurm.READY, "the cluster did not start; its reason is above"
        yield Cluster(Path(path))
    finally:
        daemon.stdin.close()
        daemon.wait(30)
