"""Runs mpiml.train with its calls on a directory recorded, or one of them failing: `python -m tests.chaos.shim ...`.

The environment says which: CHAOS_DIRECTORY, CHAOS_RECORD (a file that gets one line of JSON for each call), CHAOS_FAIL
("17:28": call 17 fails with error 28), and CHAOS_RANK, of a job of several, 0 by default: the one that is concerned, or
"all" of them.

Whatever is done to files through Python passes here, for `open` is made of the same calls of `os`.
"""

from __future__ import annotations

import builtins
import contextlib
import fcntl
import io
import json
import os
import runpy
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

MODULE = "mpiml.train"
RANK = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")  # where launchers say a process's rank
CREATES = os.O_CREAT | os.O_TRUNC
REAL = {name: getattr(os, name) for name in dir(os) if callable(getattr(os, name))}
REAL_OPEN = io.open


class File(io.FileIO):
    """A file whose bytes go through `os.write`."""

    def write(self, data: Any) -> int:
        return os.write(self.fileno(), data)

    def truncate(self, size: int | None = None) -> int:
        size = self.tell() if size is None else size
        os.ftruncate(self.fileno(), size)
        return size

    def close(self) -> None:
        with SHIM.lock:
            path = "" if self.closed or not self.closefd else SHIM.paths.pop(self.fileno(), "")
        super().close()
        if path:
            SHIM.call("close", path, lambda: None)


class Shim:
    """Stands between Python and the operating system for all calls that concern one directory.

    Threads and ranks make their calls one after the other, so that these are recorded as they were made.

    Attributes:
        paths: of the open descriptors that are of files in the directory; `lock` for its changes.
    """

    def __init__(self, directory: str, record: str, fail: str, rank: int = 0):
        self.directory = os.path.realpath(directory)
        self.paths: dict[int, str] = {}
        self.lock, self._rank = threading.RLock(), rank
        self._log = REAL["open"](record, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if record else -1
        self._fails_at, self._error = map(int, fail.split(":")) if fail else (0, 0)
        self._count = 0

    def path(self, name: Any, at: int | None = None) -> str:
        """The path of what a call names, if it is in the directory, else nothing."""
        if isinstance(name, int):
            return self.paths.get(name, "")
        path = os.path.join(self.paths.get(at, ""), os.fsdecode(name)) if at is not None else os.fsdecode(name)
        path = os.path.abspath(path)
        return path if path == self.directory or path.startswith(self.directory + os.sep) else ""

    def call(self, kind: str, path: str, real: Callable[[], Any], **more: Any) -> Any:
        """Make a call, if it is not the one that fails, and record it when it has succeeded."""
        with self.lock, self._turn():
            self._count += 1
            if self._count == self._fails_at:
                self._note(kind, path, fails=self._error)
                raise OSError(self._error, os.strerror(self._error), path)
            value = real()
            self._note(kind, path, **{key: get(value) if callable(get) else get for key, get in more.items()})
            return value

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """No other rank makes a call in this block."""
        if self._log >= 0:
            fcntl.flock(self._log, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if self._log >= 0:
                fcntl.flock(self._log, fcntl.LOCK_UN)

    def _note(self, kind: str, path: str, **more: Any) -> None:
        line = {
            "call": self._count,
            "rank": self._rank,
            "kind": kind,
            "path": os.path.relpath(path, self.directory),
            **more,
        }
        if self._log >= 0:
            REAL["write"](self._log, json.dumps(line).encode() + b"\n")

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        where = self.path(path, dir_fd)
        if not where:
            return REAL["open"](path, flags, mode, dir_fd=dir_fd)
        kind = "create" if flags & CREATES else "open"
        real = lambda: REAL["open"](path, flags, mode, dir_fd=dir_fd)  # noqa: E731
        with self.lock:
            descriptor = self.call(kind, where, real, truncates=bool(flags & os.O_TRUNC))
            self.paths[descriptor] = where
        return descriptor

    def close(self, descriptor: int) -> None:
        with self.lock:
            path = self.paths.pop(descriptor, "")
        REAL["close"](descriptor)
        if path:  # that a call fails which has closed the file is what some file systems do
            self.call("close", path, lambda: None)

    def write(self, descriptor: int, data: Any) -> int:
        def end(written: int) -> int:
            return os.lseek(descriptor, 0, os.SEEK_CUR) - written

        def content(written: int) -> str:
            return bytes(memoryview(data).cast("B")[:written]).hex()

        return self._on(descriptor, "write", lambda: REAL["write"](descriptor, data), at=end, data=content)

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        content = lambda n: bytes(memoryview(data).cast("B")[:n]).hex()  # noqa: E731
        return self._on(descriptor, "write", lambda: REAL["pwrite"](descriptor, data, offset), at=offset, data=content)

    def preadv(self, descriptor: int, buffers: Any, offset: int) -> int:
        return self._on(descriptor, "read", lambda: REAL["preadv"](descriptor, buffers, offset))

    def truncate(self, name: Any, size: int) -> None:
        self._on(name, "truncate", lambda: REAL["truncate"](name, size), size=size)

    def posix_fallocate(self, descriptor: int, offset: int, length: int) -> None:
        real = lambda: REAL["posix_fallocate"](descriptor, offset, length)  # noqa: E731
        self._on(descriptor, "extend", real, size=offset + length)

    def fsync(self, file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        self._on(descriptor, "sync", lambda: REAL["fsync"](descriptor))

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        where = self.path(path, dir_fd)
        self._on(where or path, "unlink", lambda: REAL["unlink"](path, dir_fd=dir_fd))
        self._forget(where)

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._on(self.path(path, dir_fd) or path, "mkdir", lambda: REAL["mkdir"](path, mode, dir_fd=dir_fd))

    def rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._on(self.path(path, dir_fd) or path, "unlink", lambda: REAL["rmdir"](path, dir_fd=dir_fd))

    def scandir(self, path: Any = ".") -> Any:
        return self._on(path, "list", lambda: REAL["scandir"](path))

    def listdir(self, path: Any = ".") -> Any:
        return self._on(path, "list", lambda: REAL["listdir"](path))

    def rename(self, old: Any, new: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        source, target = self.path(old, src_dir_fd), self.path(new, dst_dir_fd)
        real = lambda: REAL["replace"](old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)  # noqa: E731
        with self.lock:
            self._on(source or old, "rename", real, to=os.path.relpath(target or os.fspath(new), self.directory))
            self._forget(target)
            self.paths = {number: target if path == source else path for number, path in self.paths.items()}

    def link(self, old: Any, new: Any, **more: Any) -> None:
        real = lambda: REAL["link"](old, new, **more)  # noqa: E731
        self._on(old, "link", real, to=os.path.relpath(self.path(new) or new, self.directory))

    def open_file(self, file: Any, mode: str = "r", buffering: int = -1, *text: Any, **more: Any) -> Any:
        """`open`, for files in the directory by way of this object's calls."""
        named = self.path(file) if isinstance(file, int | str | bytes | os.PathLike) else ""
        if not named or more.get("opener"):
            return REAL_OPEN(file, mode, buffering, *text, **more)
        opener = lambda path, flags: self.open(path, flags, 0o666)  # noqa: E731
        raw = File(file, mode.replace("b", "").replace("t", ""), more.pop("closefd", True), opener)
        if buffering == 0:
            return raw
        kind = io.BufferedRandom if "+" in mode else io.BufferedReader if "r" in mode else io.BufferedWriter
        buffered = kind(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *text, **more)

    def install(self) -> None:
        """Take the place of Python's own calls."""
        own = "open close write pwrite preadv truncate posix_fallocate fsync unlink mkdir rmdir scandir listdir rename"
        for name in (*own.split(), "link"):
            setattr(os, name, getattr(self, name))
        os.remove, os.replace, os.fdatasync, os.ftruncate = self.unlink, self.rename, self.fsync, self.truncate
        builtins.open = io.open = self.open_file

    def _on(self, name: Any, kind: str, real: Callable[[], Any], **more: Any) -> Any:
        path = self.path(name)
        return self.call(kind, path, real, **more) if path else real()

    def _forget(self, path: str) -> None:
        """What is written to a file that has lost its name is of no concern."""
        with self.lock:
            self.paths = {number: other for number, other in self.paths.items() if other != path}


if __name__ == "__main__":
    number = next((os.environ[name] for name in RANK if name in os.environ), "0")
    if os.environ.get("CHAOS_RANK", "0") in (number, "all"):
        given = (os.environ.get(f"CHAOS_{name}", "") for name in ("DIRECTORY", "RECORD", "FAIL"))
        SHIM = Shim(*given, rank=int(number))
        SHIM.install()
    sys.argv[0] = MODULE
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
