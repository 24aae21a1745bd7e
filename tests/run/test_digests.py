"""Digests of arrays, and that what the page says of them computes the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import mpiml
from mpiml.config import Config
from mpiml.run import digests
from mpiml.run.contents import contents_in
from mpiml.run.digests import blocks_in, little, of_array, of_arrays, of_blocks
from mpiml.train import train
from mpiml.vectors import BLOCK
from tests.forging import digest_of_array, weights_sha256

PAGE = Path(mpiml.__file__).parent / "run" / "README.md"


def whole(name: str, array: Any) -> bytes:
    return of_array(name, (array.dtype.name, array.shape), of_blocks(little(array).reshape(-1)))


@pytest.mark.parametrize("dtype", ["f8", ">f8", "f2", "?", "u1", ">i4", "c8"])
@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_a_digest_is_a_tree_of_blocks(size: int, dtype: str) -> None:
    array = (np.arange(size) % 251).astype(dtype)
    assert whole("w", array) == digest_of_array("w", array)
    assert len(of_blocks(little(array))) == digests.SIZE * blocks_in(size)


def test_ranges_that_begin_with_blocks_have_the_digests_of_the_whole() -> None:
    array = np.arange(5.0 * BLOCK + 3)
    parts = (array[: 2 * BLOCK], array[2 * BLOCK : 3 * BLOCK], array[3 * BLOCK :])
    assert b"".join(map(of_blocks, parts)) == of_blocks(array)


def test_a_digest_is_of_name_shape_dtype_and_values_however_they_lie_in_memory() -> None:
    array = np.arange(6.0).reshape(2, 3)
    assert whole("w", array.astype(">f8")) == whole("w", np.asfortranarray(array)) == whole("w", array)
    others = [whole("v", array), whole("w", array.reshape(-1)), whole("w", array.view(np.int64)), whole("w", array + 1)]
    assert len({whole("w", array), *others}) == 5


def test_the_digest_of_several_is_in_the_order_of_their_names() -> None:
    arrays = {"b": np.ones(3), "a.10": np.zeros(2), "a.2": np.ones(2)}
    known = {name: whole(name, array) for name, array in arrays.items()}
    assert of_arrays(known) == of_arrays(dict(sorted(known.items()))) == weights_sha256(arrays)
    assert of_arrays(known) != of_arrays(known | {"b": known["a.2"], "a.2": known["b"]})


def test_what_the_page_says_computes_the_digest_of_weights(
    tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the digests of arrays that the file has."""
    (code,) = re.findall(r"```python\n(import hashlib, json\n.*?)```", PAGE.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {"hidden": (300,), "ema": 0.9, "normalize": True, "quiet": True, "steps": 1}
    result = train(Config(**settings, rates=("layers.3=0",), out="runs/sum"), MPI.COMM_SELF)
    file = Path("runs/sum/checkpoints/step-000000001.safetensors")
    file.rename(file.with_name("step-000000010.safetensors"))
    said: dict[str, Any] = {}
    exec(code, said)
    assert capsys.readouterr().out.split() == [result["weights_sha256"]]
    known = contents_in(file.with_name("step-000000010.safetensors")).digests
    assert known
    from safetensors.numpy import load_file

    for name, array in load_file(file.with_name("step-000000010.safetensors")).items():
        assert known[name] == said["digest"](name, array)
