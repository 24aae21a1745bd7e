"""A loop of one's own in which ranks get into trouble: `python own_loop.py OUT RANK PHASE KIND`.

Without trouble (`python own_loop.py OUT 0 never -`) rank 0 prints the digest of what it has summed.
"""

import contextlib
import hashlib
import os
import signal
import sys
import threading
import time
from typing import Any

import numpy as np
from mpi4py import MPI

from mpiml.api import Rows, Sum, guard
from mpiml.run import alarm

alarm.LEAST = 2.0
RANK, PHASE, KIND = int(sys.argv[2]), sys.argv[3], sys.argv[4]


def fail() -> None:
    raise RuntimeError("this rank is in trouble")


def in_thread() -> None:
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    time.sleep(60)


class LeftError(Exception):
    """Leaves the block of the guard, and is caught around the loop."""


def leave() -> None:
    raise LeftError


KINDS: dict[str, Any] = {
    "raise": fail,
    "exit0": lambda: sys.exit(0),
    "exit3": lambda: sys.exit(3),
    "thread": in_thread,
    "os-exit0": lambda: os._exit(0),
    "os-exit3": lambda: os._exit(3),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(60),
    "leave": leave,
}


def trouble(phase: str, step: int = 3) -> None:
    if (phase, MPI.COMM_WORLD.rank, step) == (PHASE, RANK, 3):
        KINDS[KIND]()


class Troubled:
    """An array that gets into trouble when it is put."""

    def __init__(self, array: Any, step: int):
        self.array, self.step = array, step

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        trouble("put", self.step)
        return self.array


def gradient(m: int, rows: Any) -> Any:
    """Of no loss in particular, but its sum depends on the order."""
    random = np.random.default_rng((m, *rows))
    return (random.standard_normal((70, 300)) * 2.0 ** random.integers(-12, 12, (70, 300))).astype(np.float32)


def loop(job: guard) -> str:
    trouble("first")
    data, digest = Rows(200, 40, 5, seed=1), hashlib.sha256()
    with Sum(like={"w": np.zeros((70, 300), np.float32), "loss": 0.0}, microbatches=5) as total:
        for step in range(1, 8):
            trouble("loop", step)
            if (PHASE, MPI.COMM_WORLD.rank, step) == ("break", RANK, 4):
                break
            for m, rows in data.mine(step):
                total.put(m, {"w": Troubled(gradient(m, rows), step), "loss": rows.mean()}, weight=len(rows))
            mean = total.mean()
            digest.update(mean["w"].tobytes() + repr(mean["loss"]).encode())
            if job.stop:
                break
    return digest.hexdigest()


trouble("before")
digest = ""
with guard(out=sys.argv[1], stall_timeout=2) as job:
    with contextlib.suppress(LeftError):
        digest = loop(job)
    trouble("last")
if MPI.COMM_WORLD.rank == 0:
    print(digest)
sys.exit(job.exit_code)
