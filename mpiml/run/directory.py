"""The run directory: who owns it, its files, and how they are written so that a crash leaves no half of one."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mpiml.documents import check_fields, finite, from_json, read, to_json
from mpiml.errors import DirectoryError, OutputError

CONFIG = "config.toml"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
ENVIRONMENT = "environment.json"
LOCK = ".lock"
PARTIAL = ".partial"  # ends the name of a file that is not whole yet
RESULT = "result.json"
RESULT_KINDS = {"status": str, "exit_code": int | None, "reason": str | None, "rank": int | None, "step": int}
FAILED = ".failed-"  # made by the first rank of a job to report a failure; the name ends in the job's token


@contextmanager
def named_errors(action: str, path: Path) -> Iterator[None]:
    """Turn an OSError into an OutputError that says what could not be done to which path."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot {action} {path}: {error.strerror or error}") from error


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to in a block, which is put at `path` so that at any moment, also after a crash, the old or the
    new is there whole. After an error in the block the old one stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    with named_errors("write", path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace what is at `path` by `content`."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_directory(path: Path) -> None:
    """Make renames in a directory survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RunDirectory:
    """The directory of one run, held by rank 0 for as long as it runs.

    Raises DirectoryError if another run is, or goes on, in it, and OutputError if it cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = self._take()

    @classmethod
    def create(cls, out: str | None, name: str, resume: bool) -> RunDirectory:
        """Make the directory, or open it to resume the run in it.

        Args:
            out: where; None for the first free runs/NAME-NNN.
            name: NAME.
        """
        if out is None:
            out, resume = str(_numbered(Path("runs"), name)), False
        path = Path(out)
        with named_errors("create the run directory", path):
            path.mkdir(parents=True, exist_ok=True)
        directory = cls(path)
        if holds_run(path) and not resume:
            directory.close()
            raise DirectoryError(f"{path} already holds a run: go on with it by --resume, or choose another --out")
        with named_errors("create the run directory", path):
            (path / CHECKPOINTS).mkdir(exist_ok=True)
            for leftover in (*path.glob(f"{FAILED}*"), *path.glob(f"**/.*{PARTIAL}")):
                leftover.unlink(missing_ok=True)
        return directory

    def _take(self) -> int:
        with named_errors("open the run directory", self.path):
            descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise DirectoryError(f"{self.path} is in use by another job that is still running") from None
        except OSError:
            pass  # a file system without locks: nothing to rely on there
        return descriptor

    def close(self) -> None:
        """Let others have the directory."""
        os.close(self._lock)


def holds_run(path: Path) -> bool:
    """Whether there is anything of a run in a directory."""
    return (path / CONFIG).exists() or (path / METRICS).exists() or any((path / CHECKPOINTS).glob("step-*"))


def is_own(path: Path, run: Path) -> bool:
    """Whether a path is of something that a run keeps, or will keep, in its directory."""
    path, run = path.resolve(), run.resolve()
    own = (CONFIG, METRICS, CHECKPOINTS, RESULT, ENVIRONMENT, LOCK)
    return path.is_relative_to(run) and path.relative_to(run).parts[:1] in ((), *((name,) for name in own))


def read_fields(path: Path, kinds: Mapping[str, Any], needed: Iterable[str]) -> dict[str, Any]:
    """The object in a JSON file of a run, with fields as of documents.check_fields; empty if there is no such file.

    Raises OutputError for one that is damaged.
    """
    if not path.exists():
        return {}
    try:
        return check_fields(from_json(read(path), str(path)), kinds, str(path), needed)
    except OutputError as error:
        raise OutputError(f"{error}; if you remove it, --resume goes on from the checkpoints") from None


def read_result(run: Path) -> dict[str, Any]:
    """What result.json in a run directory says; empty if there is none. Raises OutputError if it is damaged."""
    return read_fields(run / RESULT, RESULT_KINDS, ("status",))


def write_result(run: Path, result: Mapping[str, Any]) -> None:
    """Replace result.json in a run directory."""
    write_atomically(run / RESULT, to_json(result, indent=2) + "\n")


def update_result(run: Path, outcome: Mapping[str, Any]) -> dict[str, Any]:
    """Change fields of result.json in a run directory, and return all of them; a damaged file is replaced."""
    try:
        before = read_result(run)
    except OutputError:
        before = {}
    result: dict[str, Any] = finite({**before, **outcome})
    write_result(run, result)
    return result


def _numbered(parent: Path, name: str) -> Path:
    """Make the first parent/name-NNN that does not exist; making is the test, so two jobs never share one."""
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
