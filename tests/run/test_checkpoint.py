"""Checkpoint files: what others read, where a watch sees the writing go on, which is the newest, and forged ones."""

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
from tests.forging import ARRAYS, forge

STATE = {
    "a.wide": np.arange(12, dtype=np.float32).reshape(3, 4).T,  # not as it lies in memory
    "b": np.array(2.5),
    "c": np.zeros((0, 3)),
    "d.big": np.arange(5, dtype=">f8"),
    **{f"e.{name}": np.array([1, 0, 1]).astype(name) for name in ("bool", "int8", "int64", "uint16", "float16")},
}


def state(step: int, arrays: Any = STATE) -> Checkpoint:
    return Checkpoint(step, 'data = "ü"\n', arrays, "{}", "[1]")


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(3), 1)
    for arrays in (load_file(path), checkpoint.load(path).arrays):
        assert {name: (a.shape, a.dtype.name) for name, a in arrays.items()} == {
            name: (a.shape, a.dtype.name) for name, a in STATE.items()
        }
        assert all((arrays[name] == STATE[name]).all() for name in STATE)
    read = checkpoint.load(path)
    assert (read.step, read.config, read.task, read.constants) == (3, 'data = "ü"\n', "{}", "[1]")
    length, content = int.from_bytes(path.read_bytes()[:8], "little"), path.read_bytes()[8:]
    for name, entry in json.loads(content[:length]).items():
        if name in STATE:  # aligned: it may be mapped into memory
            assert (8 + length + entry["data_offsets"][0]) % STATE[name].dtype.itemsize == 0


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


KINDS = {"layers.0.weight": ("float32", (4, 3)), "layers.0.bias": ("float32", (3,))}


def test_a_forged_one_with_a_right_hash_is_read(tmp_path: Path) -> None:
    saved = checkpoint.load(forge(tmp_path / "step-1.safetensors"))
    assert (saved.step, saved.origin) == (6, str(tmp_path / "step-1.safetensors"))


@pytest.mark.parametrize("step", ["", "abc", "-5", "1" + 30 * "0", "9" * 5000, "1.5", "\u0664"])
def test_a_step_that_is_none(tmp_path: Path, step: str) -> None:
    path = forge(tmp_path / "step-1.safetensors", step=step)
    with pytest.raises(OutputError) as error:
        checkpoint.load(path)
    assert str(error.value).startswith(f"{path} is damaged: step is ")
    assert len(str(error.value)) < len(str(path)) + 100


@pytest.mark.parametrize(
    "make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "directory", "device"]
)
def test_what_is_no_regular_file_is_not_opened(tmp_path: Path, make: Any) -> None:
    path = tmp_path / checkpoint.file_name(9)
    make(path)
    for read in (checkpoint.load, checkpoint.kinds):
        with pytest.raises(OutputError, match="is not a regular file"):
            read(path)
    checkpoint.save(tmp_path, Checkpoint(6, "", ARRAYS), 3)
    newest, problems = checkpoint.newest(tmp_path)
    assert newest
    assert newest.step == 6
    assert not problems


def test_a_directory_that_is_named_like_a_checkpoint_stays_and_does_not_count(tmp_path: Path) -> None:
    odd = tmp_path / checkpoint.file_name(1)
    odd.mkdir()
    for step in range(2, 6):
        checkpoint.save(tmp_path, Checkpoint(step, "", ARRAYS), 2)
    assert odd.is_dir()
    assert checkpoint.listed(tmp_path) == [tmp_path / checkpoint.file_name(step) for step in (5, 4)]


def test_kinds_of_arrays_are_read_from_the_header_and_compared(tmp_path: Path) -> None:
    path = forge(tmp_path / "a.safetensors", arrays=ARRAYS | {"optimizer.mean.layers.0.bias": np.zeros(3)})
    kinds = checkpoint.kinds(path)
    assert kinds == KINDS | {"optimizer.mean.layers.0.bias": ("float64", (3,))}
    assert kinds == checkpoint.kinds_of(checkpoint.load(path).arrays)
    checkpoint.check_kinds("a", kinds, KINDS)
    for needed, words in (
        (KINDS | {"layers.2.bias": ("float32", (3,))}, "a has no layers.2.bias: it is of another model"),
        (
            KINDS | {"layers.0.bias": ("float32", (4,))},
            r"a: layers.0.bias is float32 \(3,\), the model's float32 \(4,\)",
        ),
        (KINDS | {"layers.0.bias": ("float64", (3,))}, "layers.0.bias is float32 .*, the model's float64"),
        ({"layers.0.weight": KINDS["layers.0.weight"]}, "a has layers.0.bias, which the model does not have"),
    ):
        with pytest.raises(OutputError, match=words):
            checkpoint.check_kinds("a", kinds, needed)


def test_one_header_that_fits_is_enough_and_none_that_does_is_refused(tmp_path: Path) -> None:
    checkpoint.check_newest(tmp_path, KINDS)
    (tmp_path / checkpoint.file_name(9)).write_bytes(b"damaged")
    checkpoint.check_newest(tmp_path, KINDS)  # whoever reads it whole will say what is wrong
    forge(tmp_path / checkpoint.file_name(8), arrays={"layers.0.weight": np.zeros((4, 5), np.float32)})
    with pytest.raises(OutputError, match=r"step-000000008.safetensors: layers.0.weight is float32 \(4, 5\)"):
        checkpoint.check_newest(tmp_path, KINDS)
    forge(tmp_path / checkpoint.file_name(7))
    checkpoint.check_newest(tmp_path, KINDS)
