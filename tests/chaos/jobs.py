"""Jobs that get into trouble on purpose: bounded waits, and nothing of a job stays when it has been awaited."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.chaos.shim import RANK
from tests.conftest import eventually, mpirun

ROOT = Path(__file__).resolve().parents[2]
MARK = "CHAOS_JOB"  # in the environment of every process of a job, whoever its parent is by now
LAUNCHED = ("PMI", "PMIX_", "OMPI_COMM", "HYDRA", "MPIR", "MPICH")  # a job of its own, also within a job
PAUSE = 0.02


@dataclass
class Ended:
    """How a job ended: the launcher's exit code, None if there was none in time; all that was printed; the processes
    that were still there when time was up."""

    code: int | None
    seconds: float
    text: str
    left: int

    @property
    def hung(self) -> str:
        """What is wrong if processes were left, else nothing."""
        return f"{self.left} processes left after {self.seconds:.1f} s" if self.left else ""

    @property
    def last(self) -> str:
        """The last line printed."""
        lines = self.text.strip().splitlines()
        return lines[-1][:240] if lines else ""


class Job:
    """`mpirun -n RANKS python -m MODULE ARGUMENTS` in a session of its own; without a launcher if `ranks` is 0.

    After the block, no process of it is left.

    Args:
        memory: KiB of address space that each process may have.
        more: of the environment.
    """

    def __init__(
        self,
        ranks: int,
        *arguments: object,
        module: str = "mpiml.train",
        cwd: Path = ROOT,
        memory: int | None = None,
        **more: str,
    ):
        self.mark = f"{MARK}={uuid.uuid4().hex}"
        name, _, value = self.mark.partition("=")
        clean = {key: text for key, text in os.environ.items() if not key.startswith(LAUNCHED)}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed at the end of the block)
        limit = ["sh", "-c", f'ulimit -v {memory}; exec "$@"', "sh"] if memory else []
        self.process = subprocess.Popen(
            [*limit, *(mpirun(ranks) if ranks else []), sys.executable, "-m", module, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=clean | {"PYTHONPATH": str(ROOT), name: value} | more,
            start_new_session=True,
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        self._log.close()

    def processes(self) -> dict[int, dict[str, str]]:
        """The processes of this job, zombies left out, each with its environment."""
        processes = {}
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    text = Path(entry.path, "environ").read_bytes().decode(errors="replace")
                    if self.mark in text:
                        pairs = (line.partition("=") for line in text.split("\0"))
                        processes[int(entry.name)] = {name: value for name, _, value in pairs}
        return processes

    def ranks(self) -> list[int]:
        """The process of each rank that is there, in the order of ranks."""
        numbers = {}
        for process, environment in self.processes().items():
            number = next((environment[name] for name in RANK if name in environment), None)
            if number is not None:
                numbers[int(number)] = process
        return [numbers[rank] for rank in sorted(numbers)]

    def wait(self, limit: float) -> Ended:
        """Wait until no process of the job is left, `limit` seconds at most, then end those that are."""
        began = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(limit)
        eventually(lambda: not self.processes(), limit - (time.monotonic() - began))
        left, seconds = len(self.processes()), time.monotonic() - began
        code = self.process.poll()
        self.end()
        self._log.seek(0)
        return Ended(code, seconds, self._log.read().decode(errors="replace"), left)

    def end(self) -> None:
        """Kill what is left of it."""
        while left := {*self.processes(), *([self.process.pid] if self.process.poll() is None else [])}:
            for process in left:
                kill(process, signal.SIGKILL)
            time.sleep(PAUSE)


def kill(process: int, number: int) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)
