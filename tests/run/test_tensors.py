"""Safetensors files of other programs, and files that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mpiml.errors import OutputError
from mpiml.run import tensors
from tests.forging import ARRAYS, forge

VALUES = {"a": np.arange(6.0, dtype="f").reshape(2, 3), "z": np.array([1 + 2j], "complex64"), "n": np.array(7)}


def written(path: Path, arrays: dict[str, tuple[str, list[int], bytes]]) -> Path:
    """A file with arrays of types that NumPy does not have."""
    header, end = {}, 0
    for name, (dtype, shape, content) in arrays.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(content)]}
        end += len(content)
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(content for *_, content in arrays.values()))
    return path


def test_arrays_of_another_program(tmp_path: Path) -> None:
    save_file(VALUES, tmp_path / "f.safetensors", {"format": "pt", "config": "{}"})
    header, foreign = tensors.header(tmp_path / "f.safetensors")
    assert foreign
    assert header.kinds == {"a": ("float32", (2, 3)), "z": ("float32", (1, 2)), "n": ("int64", ())}
    z, a, n = tensors.arrays(tmp_path / "f.safetensors", ["z", "a", "n"])
    assert (z.tolist(), n) == ([[1, 2]], 7)
    np.testing.assert_array_equal(a, VALUES["a"])
    (own,) = tensors.arrays(tmp_path / "f.safetensors", ["z"], foreign=False)
    assert own.tolist() == VALUES["z"].tolist()


def test_bfloat16_is_the_upper_half_of_float32(tmp_path: Path) -> None:
    values = np.array([[1.5, -2.0], [np.inf, 2.0**-130]], "f")
    upper = (values.view("<u4") >> 16).astype("<u2").tobytes()
    file = written(
        tmp_path / "f", {"first": ("U8", [3], b"abc"), "b": ("BF16", [2, 2], upper), "o": ("BF16", [0], b"")}
    )
    assert tensors.header(file)[0].kinds["b"] == ("bfloat16", (2, 2))
    b, first, o = tensors.arrays(file, ["b", "first", "o"])
    assert b.dtype == np.float32
    np.testing.assert_array_equal(b, values)
    assert (bytes(first), o.shape) == (b"abc", (0,))


def test_a_checkpoint_is_none_of_another_program(tmp_path: Path) -> None:
    header, foreign = tensors.header(forge(tmp_path / "c.safetensors"))
    assert not foreign
    assert header.kinds.keys() == ARRAYS.keys()
    assert not tensors.header(forge(tmp_path / "other.safetensors", format="mpiml-2"))[1]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.pt", b"PK\3\4archive", r"is a pickle, .*safetensors.torch.save_file\(model.state_dict\(\)"),
        ("model", b"\x80\2}q\0.", "is a pickle"),
        ("pytorch_model.bin", b"anything", "is a pickle"),
        ("model.gguf", b"GGUF\3\0\0\0\0\0", "is a GGUF file; give the safetensors file"),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {}}',
            "is JSON, as an index of several files is; give one safetensors file: in Python, ",
        ),
        ("arrays.npz", b"PK\3\4arrays", "arrays.npz is damaged"),
        ("notes.txt", b"What I did", "is damaged, or not a safetensors file: its header does not begin with {$"),
        ("short.safetensors", b"\1\0", "short.safetensors is damaged"),
    ],
)
def test_other_files_are_refused_with_what_to_do(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OutputError, match=words) as error:
        tensors.header(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_what_is_not_there_and_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot read .*/none: No such file"):
        tensors.header(tmp_path / "none")
    with pytest.raises(OutputError, match="is not a regular file"):
        tensors.header(Path("/dev/zero"))


def test_a_safetensors_file_may_begin_as_a_pickle_does(tmp_path: Path) -> None:
    """Its first byte is the lowest of its header's length."""
    pad: Any = {f"{'x' * n}": ("U8", [0], b"") for n in range(1, 4)}
    size = len(json.dumps({n: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in pad}))
    name = "y" * (0x180 - size - len(', "": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}'))
    file = written(tmp_path / "f", {**pad, name: ("U8", [0], b"")})
    assert file.read_bytes()[0] == 0x80
    assert name in tensors.header(file)[0].kinds
