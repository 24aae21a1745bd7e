"""A loop of one's own in which a rank gets into trouble: `python -m tests.contract.own_loop OUT RANK PHASE WAY`.

Without trouble (`... OUT 0 never -`) rank 0 prints the digest of what it has summed. Its communicator has the ranks of
the job backwards: RANK, and what messages say, is as mpirun numbers them. The last rank saves.
"""

import contextlib
import hashlib
import os
import sys
import threading
import time
from typing import Any

import numpy as np
from mpi4py import MPI

from mpiml.api import Checkpoints, Rows, Sum, guard
from mpiml.loop.guard import clock
from mpiml.run import alarm
from tests.chaos.trouble import WAYS, fail

alarm.LEAST = 2.0
STEP = 3  # in which the trouble comes
OUT, RANK, PHASE, WAY = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
COMM = MPI.Intracomm(MPI.COMM_WORLD.Split(0, -MPI.COMM_WORLD.rank))


def in_thread() -> None:
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    time.sleep(60)


class LeftError(Exception):
    """Leaves the block of the guard, and is caught around the loop."""


def leave() -> None:
    raise LeftError


OWN_WAYS = {"thread": in_thread, "leave": leave}


def trouble(phase: str, step: int = STEP) -> None:
    if (phase, MPI.COMM_WORLD.rank, step) == (PHASE, RANK, STEP):
        (WAYS | OWN_WAYS)[WAY]()


class Troubled:
    """An array that gets into trouble when it is read."""

    def __init__(self, array: Any, phase: str, step: int):
        self.array, self.phase, self.step = array, phase, step

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        trouble(self.phase, self.step)
        return self.array


def gradient(m: int, rows: Any) -> Any:
    """Of no loss in particular, but its sum depends on the order."""
    random = np.random.default_rng((m, *rows))
    return (random.standard_normal((70, 300)) * 2.0 ** random.integers(-12, 12, (70, 300))).astype(np.float32)


def sync(descriptor: int) -> None:
    """In place of os.fsync: the trouble comes in the main thread, as a checkpoint is written."""
    if clock().activity == "checkpoint" and threading.current_thread() is threading.main_thread():
        trouble("write", clock().step)
    real_sync(descriptor)


def loop(job: guard) -> str:
    trouble("first")
    data, digest = Rows(200, 40, 5, seed=1, comm=COMM), hashlib.sha256()
    checkpoints = Checkpoints(f"{OUT}/checkpoints", COMM)
    with Sum(COMM, {"w": np.zeros((70, 300), np.float32), "loss": 0.0}, microbatches=5) as total:
        for step in range(1, 8):
            trouble("loop", step)
            if (PHASE, MPI.COMM_WORLD.rank, step) == ("break", RANK, STEP + 1):
                break
            for m, rows in data.mine(step):
                total.put(m, {"w": Troubled(gradient(m, rows), "put", step), "loss": rows.mean()}, weight=len(rows))
            mean = total.mean()
            digest.update(mean["w"].tobytes() + repr(mean["loss"]).encode())
            with job.alive("evaluation"):
                trouble("alive", step)
            checkpoints.save(step, Troubled(mean["w"], "save", step))
            if job.stop:
                break
    return digest.hexdigest()


real_sync, os.fsync = os.fsync, sync
trouble("before")
digest = ""
with guard(COMM, OUT, stall_timeout=2) as job:
    with contextlib.suppress(LeftError):
        digest = loop(job)
    trouble("last")
if COMM.rank == 0:
    print(digest)
sys.exit(job.exit_code)
