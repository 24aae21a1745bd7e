"""Locks of run directories: one job at a time, even without the file system's locks or if the lock file is removed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from dataclasses import astuple, dataclass
from pathlib import Path

from mpiml.errors import DirectoryError, OutputError
from mpiml.run.node import kernel

LOCK = ".lock"
OURS = "mpiml"  # the first word of .lock: a file of another program is left as it is
CONTENT = 4096  # bytes of it that are read
# O_NONBLOCK: opening a FIFO of that name must not wait.
READ, WRITE = os.O_RDONLY | os.O_NONBLOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(frozen=True)
class Owner:
    """The process that holds a directory, as written in .lock.

    Attributes:
        token: of the job; unique.
        kernel: the machine, boot and PID namespace in which `pid` is valid.
        started: when the process began, in that kernel's ticks: a later process may have the same number.
    """

    token: str
    host: str
    kernel: str
    pid: str
    started: str

    @classmethod
    def this_process(cls, token: str) -> Owner:
        """The process that calls this."""
        pid = str(os.getpid())
        return cls(token, os.uname().nodename or "unknown", kernel() or "unknown", pid, _started(pid))

    @classmethod
    def parse(cls, content: bytes) -> Owner | None:
        """From the content of .lock; None if it is empty or of another program."""
        first, *fields = content.decode(errors="replace").split() or [""]
        return cls(*fields) if first == OURS and len(fields) == 5 else None

    def line(self) -> bytes:
        """The content of .lock, which `parse` reads."""
        return (" ".join([OURS, *astuple(self)]) + "\n").encode()

    def lives(self) -> bool:
        """Whether it is known to be a running process of this machine."""
        return self.kernel == kernel() and self.started == _started(self.pid) != "ended"

    def __str__(self) -> str:
        return f"another job (process {self.pid} on {self.host})"


class Lock:
    """Holds a directory until `release`, or until this process ends, however it ends.

    The kernel locks both the directory, which nobody removes by mistake, and .lock in it, because network file systems
    lock only files. Where neither works, .lock still names the owner: if that is a running process of this machine it
    keeps the directory; otherwise it loses it, and learns so from `check`.

    Attributes:
        token: of this job.
        kernel_locks: whether the kernel has locked at least one of the two.

    Raises DirectoryError if another job holds the directory, OutputError if it cannot be opened.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.token = f"{os.getpid()}-{time.time_ns()}"
        self._descriptors: list[int] = []
        try:
            self._descriptors.append(os.open(directory, os.O_RDONLY))
            self._descriptors.append(os.open(directory / LOCK, WRITE, 0o666))
            self.kernel_locks = True in [_locked(descriptor) for descriptor in self._descriptors]
            owner = _owner(directory)
            if owner and owner.lives():
                raise BlockingIOError
            _claim(directory, self.token)
        except BlockingIOError:
            self.release()
            raise DirectoryError(f"{directory} is in use by another job that is still running") from None
        except OSError as error:
            self.release()
            raise OutputError(f"cannot open the run directory {directory}: {error.strerror or error}") from error

    def release(self) -> None:
        """Give the directory up."""
        with contextlib.suppress(OSError):
            owner = _owner(self.directory)
            if owner and owner.token == self.token:
                os.truncate(self.directory / LOCK, 0)
        for descriptor in self._descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._descriptors.clear()


def check(directory: Path, token: str) -> None:
    """Raise DirectoryError if another job has taken the directory from the job with this token, which is this process'.

    If the lock file has been removed, it is written again.
    """
    owner = _owner(directory)
    if owner is None:
        _claim(directory, token)
    elif owner.token != token:
        raise DirectoryError(f"{directory} has been taken over by {owner}: nothing more is saved there by this job")


def _locked(descriptor: int) -> bool:
    """Lock a file, if the file system can. Returns whether it could; raises BlockingIOError if another process has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False  # without locks; or a network file system, which does not lock directories
    return True


def _owner(directory: Path) -> Owner | None:
    """The owner that .lock names."""
    try:
        descriptor = os.open(directory / LOCK, READ)
    except FileNotFoundError:
        return None
    try:
        return Owner.parse(_read(descriptor))
    finally:
        os.close(descriptor)


def _claim(directory: Path, token: str) -> None:
    """Make this process the owner in .lock, unless the file is another program's."""
    descriptor = os.open(directory / LOCK, WRITE, 0o666)
    try:
        content, line = _read(descriptor), Owner.this_process(token).line()
        if not content or content.split()[:1] == [OURS.encode()]:
            os.pwrite(descriptor, line, 0)
            os.ftruncate(descriptor, len(line))
    finally:
        os.close(descriptor)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, CONTENT)
    except BlockingIOError:  # a FIFO
        return b""


def _started(pid: str) -> str:
    """When a process of this machine began, in clock ticks since boot; "ended" if it no longer runs."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "ended"
    return "ended" if state in "ZX" else fields[18]
