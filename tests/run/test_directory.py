"""The run directory: files that are whole at any moment, what is swept out, and what is never taken for a new run."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.errors import DirectoryError, OutputError
from mpiml.run import directory
from mpiml.run.directory import Parts, RunDirectory, replacing, write_atomically


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "a.json", "{}")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127, "日" * 85])
def test_names_as_long_as_a_file_system_takes(tmp_path: Path, name: str) -> None:
    write_atomically(tmp_path / name, "content")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_link_in_place_of_the_unfinished_file_is_not_followed(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "urandom", bytes)  # as if the name could be guessed
    (tmp_path / "other").write_text("somebody's")
    directory.temporary(tmp_path / "a").symlink_to(tmp_path / "other")
    with pytest.raises(OutputError, match="File exists"):
        write_atomically(tmp_path / "a", "content")
    assert (tmp_path / "other").read_text() == "somebody's"


def test_unfinished_names_differ(tmp_path: Path) -> None:
    assert directory.temporary(tmp_path / "a") != directory.temporary(tmp_path / "a")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_after_an_error_the_old_file_stays_and_nothing_else(tmp_path: Path, monkeypatch: Any, call: str) -> None:
    write_atomically(tmp_path / "a", "old")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutputError, match=r"cannot write .*/a: No space left on device"):
        write_atomically(tmp_path / "a", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


def test_a_long_file_goes_to_disk_in_parts_and_says_so(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(directory, "PART", 1000)
    content, synced, moves = os.urandom(4500), list[int](), list[int]()
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    with replacing(tmp_path / "a", moved=lambda: moves.append(len(synced))) as file:
        file.write(content[:1700])
        file.write(memoryview(content)[1700:])
        file.write(b"")
    assert (tmp_path / "a").read_bytes() == content
    assert synced[:-1] == [1000, 2700, 3700, 4500]  # the last is of the directory
    assert moves == [1, 2, 3, 4]


def begun(path: Path) -> Path:
    """As a job leaves it."""
    held = RunDirectory.create(str(path), "n", False)
    (path / "config.toml").write_text("")
    held.close()
    return path


def test_only_what_runs_themselves_leave_is_swept(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    (run / "sub" / "checkpoints").mkdir(parents=True)
    left = [".result.json.17.partial", ".metrics.jsonl.00ff.partial", ".config.toml.1.partial", ".failed-1-2"]
    left += ["checkpoints/.step-000000007.safetensors.12.partial", "checkpoints/.tmpAb3dEf"]
    others = [".film.mkv.partial", ".my.json.partial", ".predictions.csv.17.partial", ".tmpAb3dEf", ".failed-tests"]
    others += ["sub/.result.json.17.partial", "sub/checkpoints/.step-000000007.safetensors.12.partial"]
    others += [f"checkpoints/{name}" for name in (".tmp", ".tmp-notes", ".film.mkv.partial", ".result.json.17.partial")]
    for name in (*left, *others):
        (run / name).write_text("x")
    (run / "checkpoints" / ".tmpFolder").mkdir()
    RunDirectory.create(str(run), "n", True).close()
    assert not [name for name in left if (run / name).exists()]
    assert not [name for name in others if not (run / name).exists()]
    assert (run / "checkpoints" / ".tmpFolder").is_dir()


def test_a_run_is_refused_unless_it_is_to_go_on(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    with pytest.raises(DirectoryError, match="already holds a run"):
        RunDirectory.create(str(run), "n", False)
    RunDirectory.create(str(run), "n", True).close()  # and a refusal leaves no lock
    (run / "config.toml").unlink()
    RunDirectory.create(str(run), "n", False).close()
    (run / "checkpoints" / "step-000000003.safetensors").write_text("")
    with pytest.raises(DirectoryError, match="already holds a run"):
        RunDirectory.create(str(run), "n", False)


@pytest.mark.parametrize("kept", ["config.toml", "metrics.jsonl"])
def test_a_run_whose_checkpoints_have_vanished_is_no_new_one(tmp_path: Path, kept: str) -> None:
    run = begun(tmp_path / "run")
    (run / "config.toml").rename(run / kept)
    (run / "checkpoints").rmdir()
    with pytest.raises(OutputError, match=r"checkpoints is gone: put it back"):
        RunDirectory.create(str(run), "n", True)
    assert not (run / "checkpoints").exists()
    (run / "checkpoints").mkdir()
    RunDirectory.create(str(run), "n", True).close()


def test_what_cannot_be_read_is_no_empty_directory(tmp_path: Path, monkeypatch: Any) -> None:
    """As of a network file system that has lost its server; root reads what others may not."""
    run = begun(tmp_path / "run")

    def stale(path: object) -> list[str]:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(os, "listdir", stale)
    with pytest.raises(OutputError, match=r"cannot read .*run: Stale file handle"):
        RunDirectory.create(str(run), "n", True)


def test_parts_take_arrays_without_values(tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb") as file:
        assert Parts(file, list).write(np.zeros((0, 3)).data) == 0
