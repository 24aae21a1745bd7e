"""The run directory: its owner, its files, and atomic writing, so that a crash leaves no file half-written."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mpiml.clock import unwatched
from mpiml.documents import check_fields, from_json, from_toml, read
from mpiml.errors import DirectoryError, OutputError
from mpiml.run.lock import LOCK, Lock

CONFIG = "config.toml"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
ENVIRONMENT = "environment.json"
RESULT = "result.json"
TENSORBOARD, RANKS = "tensorboard", "ranks"  # directories of event files, and of what each rank prints
FAILED = ".failed-"  # created by the first rank of a job that reports a failure; the name ends with the job's token
PARTIAL = ".partial"  # ends the name of an unfinished file
# Unfinished files that killed jobs leave in the directory and in checkpoints/; .tmpXXXXXX is the safetensors library's
# name for one.
OWN = "|".join(re.escape(name) for name in (CONFIG, METRICS, ENVIRONMENT, RESULT))
LEFT = re.compile(rf"{re.escape(FAILED)}[-\d]+|\.({OWN})\..+{re.escape(PARTIAL)}")
LEFT_OF_CHECKPOINTS = re.compile(rf"\.step-\d+\.safetensors\..+{re.escape(PARTIAL)}|\.tmp[0-9A-Za-z]{{6}}")
PART = 1 << 26  # bytes that are written to disk between two syncs: some seconds on a slow one
LONGEST = 200  # bytes of a file's name that its temporary name repeats; file systems allow 255 in all


@contextmanager
def named_errors(action: str, path: Path) -> Iterator[None]:
    """Turn an OSError into an OutputError that names the action and the path."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot {action} {path}: {error.strerror or error}") from error


class Parts:
    """A file that is synced to disk part by part while it is written. `progress` is called after each part, so that a
    watch sees a long write progress."""

    def __init__(self, file: IO[bytes], progress: Callable[[], object]):
        self.file, self.progress = file, progress
        self._waiting = 0  # bytes written since the last sync

    def write(self, content: bytes | memoryview) -> int:
        """Write bytes, or the content of an array."""
        view = memoryview(content)
        if view.nbytes:
            view = view.cast("B")
        for first in range(0, view.nbytes, PART):
            self._waiting += self.file.write(view[first : first + PART])
            if self._waiting >= PART:
                self.sync()
        return view.nbytes

    def sync(self) -> None:
        """Wait until everything written is on disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self._waiting = 0
        self.progress()


def temporary(path: Path) -> Path:
    """A name for a new file in the directory of `path`."""
    name = os.fsencode(path.name)[:LONGEST].decode(errors="ignore")
    return path.with_name(f".{name}.{os.urandom(8).hex()}{PARTIAL}")


@contextmanager
def replacing(path: Path, action: str = "write", progress: Callable[[], object] = unwatched) -> Iterator[Parts]:
    """Write a temporary file in a block and move it to `path` at the end: readers see the old file or the new one, and
    never a part, even after a crash. After an error in the block the old file stays.

    Args:
        action: for the message of an OutputError: "cannot (action) (path)".
        progress: called whenever another part of the file is on disk.
    """
    unfinished = temporary(path)
    with named_errors(action, path):
        try:
            with open(unfinished, "xb") as file:
                parts = Parts(file, progress)
                yield parts
                parts.sync()
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise
        sync(path.parent)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace the file at `path` by `content`."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Make what was written to a file, or renamed in a directory, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the content of a file, if it exists, survive a power failure."""
    with named_errors("write", path), contextlib.suppress(FileNotFoundError):
        sync(path)
        sync(path.parent)


class RunDirectory:
    """The directory of one run, which rank 0 holds while the job runs: `out`, or the first free runs/NAME-NNN. It is
    created if it does not exist.

    Raises DirectoryError if it holds another run or another job runs in it, and OutputError if it cannot be read or
    written, or has lost its checkpoints/.
    """

    def __init__(self, out: str | None, name: str = ""):
        self.path = Path(out) if out is not None else _numbered(Path("runs"), name)
        with named_errors("create the run directory", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.path)
        self.token = self._lock.token

    @property
    def notes(self) -> list[str]:
        """Warnings about the directory."""
        if self._lock.kernel_locks:
            return []
        return [f"warning: {self.path} cannot be locked: a second job in it is noticed only when one of them saves"]

    def prepare(self, resume: bool) -> None:
        """Create checkpoints/ and remove what killed jobs have left; `resume`: the directory may hold a run.

        checkpoints/ is the first thing of a run on disk, even after a power failure: a run without it has lost it.
        """
        checkpoints = self.path / CHECKPOINTS
        if holds_run(self.path) and not resume:
            raise DirectoryError(f"{self.path} already holds a run: go on with it by --resume, or choose another --out")
        if (entries := names(self.path)) & {CONFIG, METRICS} and CHECKPOINTS not in entries:
            raise OutputError(
                f"{checkpoints} is gone: put it back, or make it anew, empty, if nothing has been saved there yet"
            )
        with named_errors("create the run directory", self.path):
            checkpoints.mkdir(exist_ok=True)
            sync(self.path)
        self.tidy()
        sweep(checkpoints, LEFT_OF_CHECKPOINTS)

    def tidy(self) -> None:
        """Remove what killed jobs have left beside checkpoints/."""
        sweep(self.path, LEFT)

    def close(self) -> None:
        """Give the directory up."""
        self._lock.release()


def holds_run(path: Path) -> bool:
    """Whether a directory holds any part of a run. Raises OutputError if it cannot be read."""
    entries = names(path)
    if entries & {CONFIG, METRICS}:
        return True
    return CHECKPOINTS in entries and any(name.startswith("step-") for name in names(path / CHECKPOINTS))


def names(directory: Path) -> set[str]:
    """The names in a directory. Raises OutputError if it cannot be read, which does not mean that it is empty."""
    with named_errors("read", directory):
        return set(os.listdir(directory))


def sweep(directory: Path, left: re.Pattern[str]) -> None:
    """Remove the files in a directory whose names match."""
    with named_errors("read", directory), os.scandir(directory) as entries:
        for entry in entries:
            if left.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                Path(entry.path).unlink(missing_ok=True)


def is_own(path: Path, run: Path) -> bool:
    """Whether a path is the run directory, or is or lies in something that a run keeps there."""
    path, run = path.resolve(), run.resolve()
    own = (CONFIG, METRICS, CHECKPOINTS, RESULT, ENVIRONMENT, LOCK, TENSORBOARD, RANKS)
    return path.is_relative_to(run) and path.relative_to(run).parts[:1] in ((), *((name,) for name in own))


def read_fields(path: Path, kinds: Mapping[str, Any], needed: Iterable[str]) -> dict[str, Any]:
    """The object in a JSON file of a run, checked by documents.check_fields; empty if there is no such file.

    Raises OutputError if it is damaged.
    """
    if not path.exists():
        return {}
    try:
        return check_fields(from_json(read(path), str(path)), kinds, str(path), needed)
    except OutputError as error:
        raise OutputError(f"{error}; if you remove it, --resume goes on from the checkpoints") from None


def settings_in(run: Path) -> dict[str, Any]:
    """What config.toml says in a run directory, of whatever version of mpiml; empty if there is none yet.

    Raises OutputError if it is damaged.
    """
    path = run / CONFIG
    return from_toml(read(path), str(path)) if path.exists() else {}


def _numbered(parent: Path, name: str) -> Path:
    """Create the first parent/name-NNN that does not exist; creating it is the test, so two jobs never share one."""
    with named_errors("create the run directory in", parent.absolute()):
        parent.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            path = parent / f"{name}-{number:03d}"
            try:
                path.mkdir()
                return path
            except FileExistsError:
                number += 1
