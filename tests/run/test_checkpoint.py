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
from safetensors.numpy import load_file, save_file

from mpiml.clock import Clock
from mpiml.errors import NotFiniteError, OutputError
from mpiml.run import checkpoint, step_files, verified
from mpiml.run.checkpoint import Header
from mpiml.vectors import BLOCK
from tests.forging import ARRAYS, forge, in_format_before, save

STATE = {
    "a.wide": np.arange(12, dtype=np.float32).reshape(3, 4).T,  # not as it lies in memory
    "b": np.array(2.5),
    "c": np.zeros((0, 3)),
    "d.big": np.arange(5, dtype=">f8"),
    **{f"e.{name}": np.array([1, 0, 1]).astype(name) for name in ("bool", "int8", "int64", "uint16", "float16")},
}


def saved(path: Path, step: int = 3, arrays: Any = STATE, **more: Any) -> Path:
    return save(path, step, arrays, 'data = "ü"\n', "{}", {"c": "array"}, **more)


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = saved(tmp_path, 3)
    for arrays in (load_file(path), checkpoint.load(path).arrays):
        assert {name: (a.shape, a.dtype.name) for name, a in arrays.items()} == {
            name: (a.shape, a.dtype.name) for name, a in STATE.items()
        }
        assert all((arrays[name] == STATE[name]).all() for name in STATE)
    read = checkpoint.load(path)
    assert (read.step, read.config, read.task, read.constants) == (3, 'data = "ü"\n', "{}", {"c": "array"})
    length, content = int.from_bytes(path.read_bytes()[:8], "little"), path.read_bytes()[8:]
    for name, entry in json.loads(content[:length]).items():
        if name in STATE:  # aligned: it may be mapped into memory
            assert (8 + length + entry["data_offsets"][0]) % STATE[name].dtype.itemsize == 0


def test_the_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = saved(tmp_path, 3)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_each_part_of_reading_and_verifying_is_progress(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(verified, "PART", BLOCK)
    moves, arrays = [], {"w": np.ones(3 * BLOCK), "v": np.ones(BLOCK + 1)}
    path = saved(tmp_path, 1, arrays)
    assert checkpoint.newest(tmp_path, progress=lambda: moves.append(1))[0]
    assert len(moves) == 2 * (3 + 2)
    clock = Clock()
    assert saved(tmp_path, 1, arrays, clock=clock) == path
    assert clock.moves >= 2 * (3 + 2)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_save_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: Any, call: str) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutputError, match=r"cannot write the checkpoint .*/step-000000003.safetensors: No space"):
        saved(tmp_path, 3)
    assert not list(tmp_path.iterdir())


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    steps = (7, 999_999_999, 1_000_000_000, 20_000_000_000)
    for step in steps:
        saved(tmp_path, step, keep=3)
    found, problems = checkpoint.newest(tmp_path)
    assert (found.step if found else None, problems) == (steps[-1], [])
    assert [path.name for path in step_files.listed(tmp_path)] == [
        step_files.file_name(step) for step in reversed(steps[1:])
    ]


def test_only_files_of_checkpoints_are_listed(tmp_path: Path) -> None:
    (tmp_path / step_files.file_name(5)).mkdir()
    for name in ("step-x.safetensors", "step-000000004.damaged", "step-000000004.safetensors.bak", "other"):
        (tmp_path / name).write_text("")
    assert step_files.listed(tmp_path) == []
    saved(tmp_path, 1)
    assert step_files.listed(tmp_path) == [tmp_path / step_files.file_name(1)]


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
        saved(tmp_path, step, keep=9)
    listed = step_files.listed

    def and_tidied(path: Path) -> list[Path]:
        there = listed(path)
        (path / step_files.file_name(1)).unlink()
        return there

    monkeypatch.setattr(step_files, "listed", and_tidied)
    saved(tmp_path, 3)
    assert listed(tmp_path) == [tmp_path / step_files.file_name(3)]


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
    path = tmp_path / step_files.file_name(9)
    make(path)
    for read in (checkpoint.load, checkpoint.header):
        with pytest.raises(OutputError, match="is not a regular file"):
            read(path)
    saved(tmp_path, 6, ARRAYS)
    newest, problems = checkpoint.newest(tmp_path)
    assert newest
    assert newest.step == 6
    assert not problems


def test_a_directory_that_is_named_like_a_checkpoint_stays_and_does_not_count(tmp_path: Path) -> None:
    odd = tmp_path / step_files.file_name(1)
    odd.mkdir()
    for step in range(2, 6):
        saved(tmp_path, step, ARRAYS, keep=2)
    assert odd.is_dir()
    assert step_files.listed(tmp_path) == [tmp_path / step_files.file_name(step) for step in (5, 4)]


def test_kinds_of_arrays_are_read_from_the_header_and_compared(tmp_path: Path) -> None:
    path = forge(tmp_path / "a.safetensors", arrays=ARRAYS | {"optimizer.mean.layers.0.bias": np.zeros(3)})
    kinds = checkpoint.header(path).kinds
    assert kinds == KINDS | {"optimizer.mean.layers.0.bias": ("float64", (3,))}
    assert kinds == verified.kinds_of(checkpoint.load(path).arrays)
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
    def check(saved: Header) -> None:
        checkpoint.check_kinds(saved.origin, saved.kinds, KINDS)

    checkpoint.check_newest(tmp_path, check)
    (tmp_path / step_files.file_name(9)).write_bytes(b"damaged")
    checkpoint.check_newest(tmp_path, check)  # whoever reads it whole will say what is wrong
    forge(tmp_path / step_files.file_name(8), arrays={"layers.0.weight": np.zeros((4, 5), np.float32)})
    with pytest.raises(OutputError, match=r"step-000000008.safetensors: layers.0.weight is float32 \(4, 5\)"):
        checkpoint.check_newest(tmp_path, check)
    forge(tmp_path / step_files.file_name(7))
    checkpoint.check_newest(tmp_path, check)


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1}', "[" * 100_000])
def test_constants_are_texts_by_name(tmp_path: Path, text: str) -> None:
    path = forge(tmp_path / "step-1.safetensors", constants=text)
    for read in (checkpoint.load, checkpoint.header):
        with pytest.raises(OutputError, match=r"step-1.safetensors: constants is damaged: ") as error:
            read(path)
        assert len(str(error.value)) < len(str(path)) + 150


def test_constants_of_any_kind_and_value_come_back(tmp_path: Path) -> None:
    arrays = {"w": np.ones(2), "mask": np.array([[0, -np.inf], [np.nan, -0.0]], "f4"), "c": np.array(7)}
    arrays |= {
        "narrow": np.arange(6, dtype="u1").reshape(2, 3).T,
        "on": np.array([True, False]),
        "none": np.ones((0, 2)),
    }
    told = {name: "array" for name in arrays if name != "w"} | {"beside": "1a2b3c4d"}
    path = save(tmp_path, 3, arrays, constants=told)
    read, header = checkpoint.load(path), checkpoint.header(path)
    assert read.constants == header.constants == told
    assert header == read.header
    for name, array in arrays.items():
        assert header.kinds[name] == (array.dtype.name, array.shape)
        assert read.arrays[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, bad: float) -> None:
    with pytest.raises(NotFiniteError, match=r"^v is not finite, so nothing is saved$"):
        saved(tmp_path, 3, {"a": np.ones(3), "v": np.array([1.0, bad])})
    assert not list(tmp_path.iterdir())


def test_the_newest_are_kept_and_later_ones_do_not_count(tmp_path: Path) -> None:
    for step in (8, 9, 1, 2, 3):  # as of a run that went on after step 0, its later checkpoints being damaged, say
        saved(tmp_path, step, keep=2)
    assert [step_files.step_of(path) for path in step_files.listed(tmp_path)] == [9, 8, 3, 2]


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, (), [9, 8, 4, 3]),
        (1, (1, 2), [9, 8, 4, 2, 1]),
        (1, (4,), [9, 8, 4]),
        (2, (7, 8, 1), [9, 8, 4, 3, 1]),  # of step 7 there is none
        (9, (1,), [9, 8, 4, 3, 2, 1]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path: Path, keep: int, best: tuple[int, ...], left: list[int]) -> None:
    for step in (1, 2, 3, 4, 8, 9):
        (tmp_path / step_files.file_name(step)).write_text("damaged or not")
    step_files.prune(tmp_path, 5, keep, best)
    assert [step_files.step_of(path) for path in step_files.listed(tmp_path)] == left


def test_nothing_is_removed_before_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1)
    saved(tmp_path, 2, best=[1])
    assert len(step_files.listed(tmp_path)) == 2

    def failing(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(OutputError):
            saved(tmp_path, 3)
    assert len(step_files.listed(tmp_path)) == 2
    saved(tmp_path, 3, best=[2])
    assert [step_files.step_of(path) for path in step_files.listed(tmp_path)] == [3, 2]


def test_a_whole_file_is_left_alone_and_a_damaged_one_kept_aside(tmp_path: Path) -> None:
    path = saved(tmp_path, 3)
    before = path.stat().st_ino
    assert saved(tmp_path, 3, {"other": np.ones(3)}) == path
    assert path.stat().st_ino == before
    for number in range(3):
        path.write_bytes(b"damaged %d" % number)
        assert saved(tmp_path, 3) == path
        assert checkpoint.load(path).step == 3
    aside = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file != path}
    assert aside == {
        "step-000000003.damaged": b"damaged 0",
        "step-000000003.damaged1": b"damaged 1",
        "step-000000003.damaged2": b"damaged 2",
    }


def test_the_newest_that_verifies_is_read_and_what_is_wrong_with_newer_ones_is_said(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) == (None, [])
    for step in (1, 2, 3):
        saved(tmp_path, step, keep=9)
    for path in step_files.listed(tmp_path)[:2]:
        path.write_bytes(path.read_bytes()[:-1])
    newest, problems = checkpoint.newest(tmp_path)
    assert newest
    assert (newest.step, newest.origin) == (1, str(tmp_path / step_files.file_name(1)))
    named = [text.partition(" is damaged: ")[0] for text in problems]
    assert named == [str(tmp_path / step_files.file_name(step)) for step in (3, 2)]
    step_files.listed(tmp_path)[-1].write_bytes(b"")
    with pytest.raises(OutputError) as error:
        checkpoint.newest(tmp_path)
    assert str(error.value).startswith(f"no checkpoint in {tmp_path} can be used: {problems[0]}; {problems[1]}; ")


def in_format_of_now(path: Path) -> Path:
    return path


@pytest.mark.parametrize("written", [in_format_of_now, in_format_before])
def test_a_byte_that_has_changed_is_noticed_wherever_it_is(tmp_path: Path, written: Any) -> None:
    path = written(saved(tmp_path, 3, {"w": np.arange(4.0)}))
    assert checkpoint.load(path).step == 3
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(OutputError, match=r"step-000000003.safetensors is (damaged: |not a checkpoint of mpiml)"):
            checkpoint.load(path)
    for length in range(0, len(whole), 9):
        path.write_bytes(whole[:length])
        with pytest.raises(OutputError, match=r"step-000000003.safetensors is damaged: "):
            checkpoint.load(path)


def test_a_checkpoint_in_the_format_before_is_read_and_kept(tmp_path: Path) -> None:
    path = in_format_before(saved(tmp_path, 3))
    read = checkpoint.load(path)
    assert (read.step, read.config, read.task, read.constants) == (3, 'data = "ü"\n', "{}", {"c": "array"})
    assert read.contents.digests is None
    assert checkpoint.header(path) == read.header
    for name, array in STATE.items():
        assert read.arrays[name].tobytes() == np.ascontiguousarray(array.astype(read.arrays[name].dtype)).tobytes()
    before = path.read_bytes()
    assert saved(tmp_path, 3).read_bytes() == before


def test_a_file_of_another_program_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / step_files.file_name(3)
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": np.ones(3)}, path, metadata)
        with pytest.raises(OutputError, match=r"step-000000003.safetensors is not a checkpoint of mpiml"):
            checkpoint.load(path)


def of_model(name: str) -> bool:
    return not name.startswith("optimizer.")


def test_only_arrays_that_are_wanted_are_read_and_verified(tmp_path: Path) -> None:
    """Of a file with one SHA-256 of all that it says, all are."""
    arrays = {"a": np.ones(3), "optimizer.mean.a": np.zeros(3)}
    path, before = saved(tmp_path, 3, arrays), in_format_before(saved(tmp_path, 4, arrays, keep=2))
    for damaged, refused in ((path, False), (before, True)):
        assert list(checkpoint.load(damaged, of_model).arrays) == ["a"]
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"\1")  # of the one that is not wanted
        with pytest.raises(OutputError, match="does not match its SHA-256"):
            checkpoint.load(damaged)
        if refused:
            with pytest.raises(OutputError, match="its content does not match its SHA-256"):
                checkpoint.load(damaged, of_model)
        else:
            assert list(checkpoint.load(damaged, of_model).arrays) == ["a"]
    with pytest.raises(OutputError, match=r"step-000000003.safetensors is damaged: optimizer.mean.a does not match"):
        checkpoint.load(path, lambda name: name.startswith("optimizer."))


def test_the_last_step_is_that_of_the_newest_file(tmp_path: Path) -> None:
    assert step_files.last_step(tmp_path) == 0
    for step in (30, 4):
        (tmp_path / step_files.file_name(step)).write_bytes(b"whatever it holds")
    assert step_files.last_step(tmp_path) == 30
