"""A user's model, whose making gives a rank trouble with the disk: DISK=slow, DISK=WHAT:RANK or DISK=WHAT:RANK:CALL.

slow: syncs take time, on all ranks. unseen: the rank does not see the run directory, as on another node. full, kill,
term: at a write of a checkpoint, the CALLth of the rank, the disk is full, the rank is killed, or asked to stop.
"""

import errno
import os
import signal
import time

from mpi4py import MPI

from mpiml.nn.perceptrons import mlp

OPEN, PWRITE, FSYNC = os.open, os.pwrite, os.fsync


def model(shape, outputs):
    what, rank, call = (os.environ.get("DISK", "none") + ":-1:0").split(":")[:3]
    os.open, os.pwrite, os.fsync = OPEN, PWRITE, FSYNC
    if what == "unseen" and MPI.COMM_WORLD.rank == int(rank):
        os.open = unseen
    elif what != "none":
        os.fsync = slowly
    if what in ("full", "kill", "term") and MPI.COMM_WORLD.rank == int(rank):
        os.pwrite = Writes(what, int(call))
    return mlp(shape, outputs, (640, 96))  # so large that each of three ranks has blocks of it


def unseen(path, *arguments, **more):
    if ".safetensors" in os.fspath(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
    return OPEN(path, *arguments, **more)


def slowly(descriptor):
    time.sleep(0.02)
    FSYNC(descriptor)


class Writes:
    """Writes of checkpoints, one of which gets into trouble."""

    def __init__(self, what, last):
        self.what, self.left = what, last

    def __call__(self, descriptor, content, offset):
        if len(content) > 200:  # else it is .lock
            self.left -= 1
            if self.left == 0:
                self.trouble()
        return PWRITE(descriptor, content, offset)

    def trouble(self):
        if self.what == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), signal.SIGKILL if self.what == "kill" else signal.SIGTERM)
