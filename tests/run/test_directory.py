"""The run directory: files that are whole at any moment, what is swept out, and what its small files say."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.errors import DirectoryError, OutputError
from mpiml.run import directory, environment
from mpiml.run.directory import (
    Parts,
    RunDirectory,
    replacing,
    write_atomically,
)
from mpiml.run.result import read_result, update_result, write_result


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
    with replacing(tmp_path / "a", progress=lambda: moves.append(len(synced))) as file:
        file.write(content[:1700])
        file.write(memoryview(content)[1700:])
        file.write(b"")
    assert (tmp_path / "a").read_bytes() == content
    assert synced[:-1] == [1000, 2700, 3700, 4500]  # the last is of the directory
    assert moves == [1, 2, 3, 4]


def opened(path: Path, resume: bool) -> RunDirectory:
    held = RunDirectory(str(path), "n")
    try:
        held.prepare(resume)
    except BaseException:
        held.close()
        raise
    return held


def begun(path: Path) -> Path:
    """As a job leaves it."""
    held = opened(path, resume=False)
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
    opened(run, resume=True).close()
    assert not [name for name in left if (run / name).exists()]
    assert not [name for name in others if not (run / name).exists()]
    assert (run / "checkpoints" / ".tmpFolder").is_dir()


def test_a_run_is_refused_unless_it_is_to_go_on(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    with pytest.raises(DirectoryError, match="already holds a run"):
        opened(run, resume=False)
    opened(run, resume=True).close()  # and a refusal leaves no lock
    (run / "config.toml").unlink()
    opened(run, resume=False).close()
    (run / "checkpoints" / "step-000000003.safetensors").write_text("")
    with pytest.raises(DirectoryError, match="already holds a run"):
        opened(run, resume=False)


@pytest.mark.parametrize("kept", ["config.toml", "metrics.jsonl"])
def test_a_run_whose_checkpoints_have_vanished_is_no_new_one(tmp_path: Path, kept: str) -> None:
    run = begun(tmp_path / "run")
    (run / "config.toml").rename(run / kept)
    (run / "checkpoints").rmdir()
    with pytest.raises(OutputError, match=r"checkpoints is gone: put it back"):
        opened(run, resume=True)
    assert not (run / "checkpoints").exists()
    (run / "checkpoints").mkdir()
    opened(run, resume=True).close()


def test_what_cannot_be_read_is_no_empty_directory(tmp_path: Path, monkeypatch: Any) -> None:
    """As of a network file system that has lost its server; root reads what others may not."""
    run = begun(tmp_path / "run")

    def stale(path: object) -> list[str]:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(os, "listdir", stale)
    with pytest.raises(OutputError, match=r"cannot read .*run: Stale file handle"):
        opened(run, resume=True)


def test_parts_take_arrays_without_values(tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb") as file:
        assert Parts(file, list).write(np.zeros((0, 3)).data) == 0


GOOD = {"status": "running", "exit_code": None, "reason": None, "rank": None, "step": 0, "accuracy": 0.5}


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "[" * 100_000, "\0" * 50, '{"step": 5}', '{"status": null}', '{"status": "done", "step": "9"}',
     '{"status": "done", "step": null}', '{"status": "done", "exit_code": "0"}', '{"status": "failed", "reason": 5}'],
)  # fmt: skip
def test_a_damaged_result_is_one_line_and_is_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(OutputError) as error:
        read_result(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'result.json'} is damaged: ")
    assert str(error.value).endswith("if you remove it, --resume goes on from the checkpoints")
    assert "\n" not in str(error.value)
    update_result(tmp_path, GOOD)  # the reason of a failure must not be lost for it
    assert read_result(tmp_path) == GOOD


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["pipe", "directory"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, make: Any) -> None:
    for name in ("result.json", "environment.json"):
        make(tmp_path / name)
    with pytest.raises(OutputError, match=r"result.json: is not a regular file"):
        read_result(tmp_path)
    with pytest.raises(OutputError, match=r"environment.json: is not a regular file"):
        environment.data(tmp_path)


def test_no_result_is_none(tmp_path: Path) -> None:
    assert read_result(tmp_path) == {}


def test_a_result_is_json_whatever_a_metric_is(tmp_path: Path) -> None:
    write_result(tmp_path, GOOD)
    assert update_result(tmp_path, {"accuracy": math.nan, "step": 3}) == GOOD | {"accuracy": None, "step": 3}
    text = (tmp_path / "result.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == GOOD | {"accuracy": None, "step": 3}


def test_a_reason_without_its_traceback_is_better_than_half_of_both(tmp_path: Path) -> None:
    """The disk is full: the file has the block that it has, and may not become longer."""
    write_result(tmp_path, {"status": "running", "ranks": 1})
    script = f"""
import resource
from pathlib import Path
from mpiml.run.result import update_result
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
update_result(Path({str(tmp_path)!r}), {{"status": "failed", "reason": "the loss", "traceback": "x" * 8000}})
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_result(tmp_path) == {"status": "failed", "ranks": 1, "reason": "the loss"}


def test_runs_without_a_name_of_their_own_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = []
    for name in ("digits", "digits", "other"):
        held = RunDirectory(None, name)
        held.close()
        made.append(str(held.path))
    Path("runs/digits-004").touch()
    for _ in range(2):  # nothing that is there is taken, whatever it is
        held = RunDirectory(None, "digits")
        held.close()
        made.append(str(held.path))
    assert made == [f"runs/{name}" for name in ("digits-001", "digits-002", "other-001", "digits-003", "digits-005")]


def test_a_directory_is_made_with_those_above_it(tmp_path: Path) -> None:
    held = RunDirectory(str(tmp_path / "a" / "b"), "n")
    assert held.path.is_dir()
    assert held.notes == []
    held.close()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot create the run directory .*/file: File exists"):
        RunDirectory(str(tmp_path / "file"), "n")


def test_where_runs_cannot_be_made_the_place_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").touch()
    with pytest.raises(OutputError, match=rf"cannot create the run directory in {tmp_path}/runs: File exists"):
        RunDirectory(None, "n")


def test_a_directory_that_cannot_be_locked_is_worth_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = RunDirectory(str(tmp_path / "run"), "n")
    monkeypatch.setattr(held._lock, "kernel_locks", False)
    (note,) = held.notes
    assert note.startswith(f"warning: {tmp_path / 'run'} cannot be locked: a second job in it is noticed only when")
    held.close()


def test_of_two_jobs_in_a_directory_the_second_is_refused(tmp_path: Path) -> None:
    held = opened(tmp_path / "run", resume=False)
    with pytest.raises(DirectoryError, match="is in use by another job"):
        RunDirectory(str(tmp_path / "run"), "n")
    held.close()
    opened(tmp_path / "run", resume=False).close()


@pytest.mark.parametrize(
    ("files", "holds"),
    [
        ([], False),
        (["notes.txt", "result.json", "environment.json", "checkpoints/"], False),
        (["config.toml"], True),
        (["metrics.jsonl"], True),
        (["checkpoints/", "checkpoints/notes"], False),
        (["checkpoints/", "checkpoints/step-000000001.safetensors"], True),
    ],
)
def test_what_makes_a_directory_that_of_a_run(tmp_path: Path, files: list[str], holds: bool) -> None:
    for name in files:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    assert directory.holds_run(tmp_path) == holds


@pytest.mark.parametrize(
    ("path", "own"),
    [
        ("run", True),
        ("run/config.toml", True),
        ("run/checkpoints/step-000000001.safetensors", True),
        ("run/../run/.lock", True),
        ("link/result.json", True),
        ("run/my.json", False),
        ("run/sub/config.toml", False),
        ("config.toml", False),
        ("run2/config.toml", False),
    ],
)
def test_what_belongs_to_a_run(tmp_path: Path, path: str, own: bool) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    assert directory.is_own(tmp_path / path, tmp_path / "run") == own


def test_a_file_and_its_directory_are_put_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("content")
    synced: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(stat.S_ISDIR(os.fstat(descriptor).st_mode)))
    directory.sync_file(tmp_path / "a")
    assert synced == [False, True]
    directory.sync_file(tmp_path / "none")
    assert synced == [False, True]


def test_after_an_error_in_the_block_the_old_file_stays(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "old")

    def write_half() -> None:
        with replacing(tmp_path / "a") as file:
            file.write(b"half of the new")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


def test_the_old_file_is_there_until_the_new_one_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "a", list[str]()
    write_atomically(path, "old")
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        seen.append(path.read_text())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    write_atomically(path, "new")
    assert seen == ["old", "new"]  # that of the file, and that of the directory
