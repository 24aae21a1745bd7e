"""Checkpoint files: what others read, where a watch sees the writing go on, and which is the newest."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mpiml.errors import OutputError
from mpiml.run import checkpoint, directory
from mpiml.run.checkpoint import Checkpoint

ARRAYS = {
    "a.wide": np.arange(12, dtype=np.float32).reshape(3, 4).T,  # not as it lies in memory
    "b": np.array(2.5),
    "c": np.zeros((0, 3)),
    "d.big": np.arange(5, dtype=">f8"),
    **{f"e.{name}": np.array([1, 0, 1]).astype(name) for name in ("bool", "int8", "int64", "uint16", "float16")},
}


def state(step: int, arrays: Any = ARRAYS) -> Checkpoint:
    return Checkpoint(step, 'data = "ü"\n', arrays, "{}", "[1]")


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(3), 1)
    for arrays in (load_file(path), checkpoint.load(path).arrays):
        assert {name: (a.shape, a.dtype.name) for name, a in arrays.items()} == {
            name: (a.shape, a.dtype.name) for name, a in ARRAYS.items()
        }
        assert all((arrays[name] == ARRAYS[name]).all() for name in ARRAYS)
    read = checkpoint.load(path)
    assert (read.step, read.config, read.task, read.constants) == (3, 'data = "ü"\n', "{}", "[1]")
    length, content = int.from_bytes(path.read_bytes()[:8], "little"), path.read_bytes()[8:]
    for name, entry in json.loads(content[:length]).items():
        if name in ARRAYS:  # aligned: it may be mapped into memory
            assert (8 + length + entry["data_offsets"][0]) % ARRAYS[name].dtype.itemsize == 0


def test_the_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = checkpoint.save(tmp_path, state(3), 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_each_part_of_looking_hashing_writing_and_reading_is_progress(tmp_path: Path, monkeypatch: Any) -> None:
    """Between two fsyncs there is a sign of life, and none has much to do."""
    for module in (checkpoint, directory):
        monkeypatch.setattr(module, "PART", 1 << 10)
    moves, at_sync, fsync = [], list[int](), os.fsync

    def counted(descriptor: int) -> None:
        at_sync.append(len(moves))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", counted)
    arrays = {"w": np.ones(1000), "v": np.ones(500)}
    path = checkpoint.save(tmp_path, state(1, arrays), 1, lambda: moves.append(1))
    assert len(at_sync) >= 12
    assert len(set(at_sync[:-1])) == len(at_sync[:-1])
    assert at_sync[0] >= 2 + 8 + 4  # looked at, and hashed
    moves.clear()
    assert checkpoint.newest(tmp_path, moved=lambda: moves.append(1))[0]
    assert len(moves) == 8 + 4
    assert checkpoint.save(tmp_path, state(1, arrays), 1, lambda: moves.append(1)) == path


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_save_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: Any, call: str) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutputError, match=r"cannot write the checkpoint .*/step-000000003.safetensors: No space"):
        checkpoint.save(tmp_path, state(3), 1)
    assert not list(tmp_path.iterdir())


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    steps = (7, 999_999_999, 1_000_000_000, 20_000_000_000)
    for step in steps:
        checkpoint.save(tmp_path, state(step), 3)
    found, problems = checkpoint.newest(tmp_path)
    assert (found.step if found else None, problems) == (steps[-1], [])
    assert [path.name for path in checkpoint.listed(tmp_path)] == [
        checkpoint.file_name(step) for step in reversed(steps[1:])
    ]


def test_only_files_of_checkpoints_are_listed(tmp_path: Path) -> None:
    (tmp_path / checkpoint.file_name(5)).mkdir()
    for name in ("step-x.safetensors", "step-000000004.damaged", "step-000000004.safetensors.bak", "other"):
        (tmp_path / name).write_text("")
    assert checkpoint.listed(tmp_path) == []
    checkpoint.save(tmp_path, state(1), 1)
    assert checkpoint.listed(tmp_path) == [tmp_path / checkpoint.file_name(1)]


def test_a_directory_that_cannot_be_read_is_not_empty(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(OutputError, match=r"cannot read .*gone: No such file"):
        checkpoint.newest(tmp_path / "gone")

    def forbidden(path: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(OutputError, match=r"cannot read .*: Permission denied"):
        checkpoint.newest(tmp_path)


def test_who_tidies_up_at_the_same_time_fails_no_save(tmp_path: Path, monkeypatch: Any) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step), 9)
    listed = checkpoint.listed

    def and_tidied(path: Path) -> list[Path]:
        there = listed(path)
        (path / checkpoint.file_name(1)).unlink()
        return there

    monkeypatch.setattr(checkpoint, "listed", and_tidied)
    checkpoint.save(tmp_path, state(3), 1)
    assert listed(tmp_path) == [tmp_path / checkpoint.file_name(3)]
