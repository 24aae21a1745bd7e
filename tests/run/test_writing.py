"""Spans of a file on one rank: written in parts, flushed as it goes, and nothing left of a file that cannot be."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.run import writing
from mpiml.run.segments import Span
from mpiml.run.writing import create_empty, write


def spans() -> tuple[bytes, list[Span]]:
    content = np.random.default_rng(1).bytes(10_000)
    return content, [Span(a, memoryview(content)[a:b]) for a, b in ((7000, 10_000), (0, 4), (4, 7000))]


def opened(path: Path) -> int:
    create_empty(path, 10_000)
    return os.open(path, os.O_WRONLY)


@pytest.mark.parametrize("most", [1 << 30, 1, 700])
def test_all_of_each_span_is_written_where_it_belongs(tmp_path: Path, monkeypatch: Any, most: int) -> None:
    """Though the system may write less than it is asked to."""
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, content, at: pwrite(descriptor, content[:most], at))
    content, every = spans()
    write(descriptor := opened(tmp_path / "f"), every, lambda: None)
    assert (tmp_path / "f").read_bytes() == content
    with pytest.raises(OSError, match="Bad file"):
        os.close(descriptor)


def test_between_two_flushes_there_is_progress_and_not_much_to_write(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(writing, "PART", 1000)
    moves, at_sync, written = [0], list[int](), [0]
    fsync, pwrite = os.fsync, os.pwrite

    def counted(descriptor: int) -> None:
        at_sync.append(moves[0])
        assert written[0] <= 2000
        written[0] = 0
        fsync(descriptor)

    def noted(descriptor: int, content: Any, at: int) -> int:
        count = pwrite(descriptor, content, at)
        written[0] += count
        return count

    def progress() -> None:
        moves[0] += 1

    monkeypatch.setattr(os, "fsync", counted)
    monkeypatch.setattr(os, "pwrite", noted)
    write(opened(tmp_path / "f"), spans()[1], progress)
    assert len(at_sync) >= 9
    assert len(set(at_sync)) >= len(at_sync) - 1
    assert written == [0], "all is on disk"


def test_a_failure_closes_the_file(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    descriptor = opened(tmp_path / "f")
    with pytest.raises(OSError, match="No space"):
        write(descriptor, spans()[1], lambda: None)
    with pytest.raises(OSError, match="Bad file"):
        os.close(descriptor)


def test_a_file_that_is_too_large_is_not_left(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            create_empty(tmp_path / "f", 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
    create_empty(tmp_path / "f", 10_000)
    with pytest.raises(FileExistsError):
        create_empty(tmp_path / "f", 10_000)
    assert (tmp_path / "f").read_bytes() == bytes(10_000)
