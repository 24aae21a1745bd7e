"""Checkpoint files that are forged, odd or of another model, and what stands among them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.errors import OutputError
from mpiml.run import checkpoint
from mpiml.run.checkpoint import Checkpoint
from tests.forging import ARRAYS, forge

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
    assert len(problems) == 1


def test_a_directory_that_is_named_like_a_checkpoint_stays_and_does_not_count(tmp_path: Path) -> None:
    odd = tmp_path / checkpoint.file_name(1)
    odd.mkdir()
    for step in range(2, 6):
        checkpoint.save(tmp_path, Checkpoint(step, "", ARRAYS), 2)
    assert odd.is_dir()
    assert checkpoint.listed(tmp_path) == [tmp_path / checkpoint.file_name(step) for step in (5, 4, 1)]


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
