"""What tests share: running the real command on real ranks."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Commands = Sequence[tuple[Path, str]]  # run directories, and flags of mpiml.train
LIMIT = 120  # seconds that any job may take
COMMANDS = str(Path(__file__).parent / "contract" / "commands.py")
SHM = Path("/dev/shm")
SETTLED = 5  # seconds after which a job has mapped what it made there
PRTERUN = re.compile(r"^-{60,}\n(?:.*\n)*?-{60,}\n|^\[.*PMIX ERROR.*\n", re.MULTILINE)  # what Open MPI's launcher adds


@dataclass
class Job:
    """What became of a command: its exit code, what it printed, and its run directory."""

    code: int
    out: str
    err: str
    run: Path

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.run / "result.json").read_text())

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]


def mpirun(ranks: int) -> list[str]:
    """The launcher beside this Python, or the machine's."""
    beside = Path(sys.executable).with_name("mpirun")
    launcher = str(beside) if beside.exists() else shutil.which("mpirun")
    assert launcher, "no mpirun beside this Python, and none on the PATH"
    return [launcher, "-n", str(ranks)]


def launch(ranks: int, *arguments: str, limit: float = LIMIT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` on `ranks` ranks; with 0 ranks, without a launcher. Its stderr is what ranks have said."""
    command = [*(mpirun(ranks) if ranks else []), sys.executable, *arguments]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "OMPI_COMM", "HYDRA", "MPIR", "MPICH"))}
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=limit,
        env=clean | environment,
        stdin=subprocess.DEVNULL,
    )
    done.stderr = PRTERUN.sub("", done.stderr)
    return done


@pytest.fixture(autouse=True, scope="module")
def no_pretended_device() -> Iterator[None]:
    """After the tests of a file, operations are not watched for devices that one of them has opened."""
    yield
    if fake := sys.modules.get("mpiml.devices.fake"):
        fake.Sides.end()


def pytest_collection_finish() -> None:
    """What is imported and collected stays: a collection of garbage need not look through it, a third of a second."""
    gc.freeze()


def eventually(condition: Callable[[], object], limit: float = 30) -> bool:
    """Wait until a condition holds, `limit` seconds at most. Returns whether it does."""
    end = time.monotonic() + limit
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return bool(holds)


def launch_all(ranks: int, commands: Commands, **environment: str) -> list[Job]:
    """Run mpiml.train several times, each with a run directory and flags, in ONE MPI job of `ranks` ranks.

    That saves the start of Python and MPI. Flags may begin with variables of the environment, as NAME=VALUE. A rank
    that fails alone ends the job; commands that have not begun by then run in another.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = write_commands(Path(folder) / "commands", commands)
        jobs = jobs_of(file, commands, launch(ranks, COMMANDS, file, limit=3 * LIMIT, **environment))
    rest = commands[len(jobs) :]
    return [*jobs, *(launch_all(ranks, rest, **environment) if rest else [])]


def write_commands(file: Path, commands: Commands) -> str:
    """Write the file that the script COMMANDS takes. Returns its path."""
    file.write_text(json.dumps([_words(run, flags) for run, flags in commands]))
    return str(file)


def jobs_of(file: str, commands: Commands, done: subprocess.CompletedProcess[str]) -> list[Job]:
    """What has become of the commands in a file, of those that have begun; the last of them may have ended the job."""
    jobs: list[Job] = []
    for number, (run, _) in enumerate(commands):
        out, err, codes = (Path(f"{file}.{number}.{kind}") for kind in ("out", "err", "codes"))
        if out.exists():
            ended = set(json.loads(codes.read_text())) if codes.exists() else {done.returncode or 1}
            assert len(ended) == 1, f"ranks end with different codes: {ended}"
            jobs.append(Job(ended.pop(), out.read_text(), err.read_text(), run))
    assert jobs, done.stderr
    return jobs


def _words(run: Path, flags: str) -> tuple[dict[str, str], list[str]]:
    """The environment and the arguments of a command."""
    words = flags.split()
    first = next((number for number, word in enumerate(words) if word.startswith("-")), len(words))
    environment = dict(word.split("=", 1) for word in words[:first])
    return environment, ["--out", str(run), *words[first:]]


@pytest.fixture(scope="session", autouse=True)
def leftovers() -> Iterator[None]:
    with shared_memory_tidied():
        yield


@contextlib.contextmanager
def shared_memory_tidied() -> Iterator[None]:
    """Takes away what MPI libraries leave in shared memory when a job is killed, which many are here."""
    before = set(SHM.iterdir())
    yield
    used = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            used |= {line.split()[-1] for line in maps.read_text().splitlines() if str(SHM) in line}
    for pattern in ("mpich_shm_*", "ucx_shm_posix_*", "sm_segment.*"):
        for path in set(SHM.glob(pattern)) - before:
            with contextlib.suppress(OSError):  # another rank was sooner
                if str(path) not in used and time.time() - path.stat().st_mtime > SETTLED:
                    path.unlink()


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Job]:
    """`train(ranks, "--pipe 2 ...", out="name")` runs mpiml.train on ranks, in a directory of this test."""

    def run(ranks: int, arguments: str = "", out: str = "run", limit: float = LIMIT, **environment: str) -> Job:
        path = tmp_path / out
        done = launch(ranks, "-m", "mpiml.train", "--out", str(path), *arguments.split(), limit=limit, **environment)
        return Job(done.returncode, done.stdout, done.stderr, path)

    return run


@pytest.fixture
def train_all(tmp_path: Path) -> Callable[..., list[Job]]:
    """`train_all(ranks, "--pipe 2 ...", ...)` does so several times in one job: in run-0, run-1, ... of this test."""

    def run(ranks: int, *commands: str, **environment: str) -> list[Job]:
        named = [(tmp_path / f"run-{number}", flags) for number, flags in enumerate(commands)]
        return launch_all(ranks, named, **environment)

    return run
