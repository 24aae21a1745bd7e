"""What a file holds and where, and its header."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from mpiml.errors import OutputError
from mpiml.run.contents import CODES, DIGESTS, Contents, bytes_of, contents_in
from mpiml.run.digests import SIZE
from tests.forging import ARRAYS, forge, forge_before

KINDS = {
    "a": ("float32", (3, 4)),
    "b": ("float64", ()),
    "c": ("uint8", (7,)),
    "d": ("float64", (0, 3)),
    "e": ("bool", (3,)),
    "f": ("float16", (5,)),
    "ü": ("int64", (2,)),
}


def written(path: Path, contents: Contents) -> Contents:
    path.write_bytes(contents.header({name: name.encode().ljust(SIZE) for name in contents.kinds}))
    with open(path, "r+b") as file:
        file.truncate(contents.size)
    return contents


@pytest.mark.parametrize("kinds", [KINDS, {}, dict(list(KINDS.items())[:1])], ids=["many", "none", "one"])
def test_a_header_is_read_as_it_was_written(tmp_path: Path, kinds: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    made = written(tmp_path / "f", Contents.of(kinds, {"step": "3", "config": 'data = "ü"\n'}))
    read = contents_in(tmp_path / "f")
    assert read.digests == {name: name.encode().ljust(SIZE) for name in kinds}
    assert (read.kinds, read.texts, read.starts, read.size) == (made.kinds, made.texts, made.starts, made.size)
    assert read.first == made.first
    with safe_open(tmp_path / "f", "numpy") as file:
        assert set(file.keys()) == set(kinds)


def test_arrays_lie_one_after_another_and_aligned() -> None:
    contents = Contents.of(KINDS, {})
    assert contents.first % 8 == 0
    ends = sorted((start, start + bytes_of(KINDS[name])) for name, start in contents.starts.items())
    assert [start for start, _ in ends] == [contents.first, *(end for _, end in ends[:-1])]
    assert ends[-1][1] == contents.size
    assert all(start % np.dtype(KINDS[name][0]).itemsize == 0 for name, start in contents.starts.items())


def test_every_dtype_has_the_librarys_name(tmp_path: Path) -> None:
    """bfloat16, which NumPy has not, is read alone."""
    arrays = {name: np.zeros(2, name) for name in CODES if name != "bfloat16"}
    save_file(arrays, tmp_path / "f")
    read = contents_in(tmp_path / "f")
    assert read.kinds == {name: (name, (2,)) for name in arrays}
    assert (read.digests, read.texts) == (None, {})
    written(tmp_path / "g", Contents.of(read.kinds, {}))
    with safe_open(tmp_path / "g", "numpy") as file:
        assert {name: file.get_tensor(name).dtype.name for name in file.keys()} == {name: name for name in arrays}  # noqa: SIM118


def test_a_header_is_verified_without_the_arrays(tmp_path: Path) -> None:
    path = forge(tmp_path / "f")
    content = path.read_bytes()
    known = contents_in(path)
    assert known.texts.keys() == {"format", "step", "config", "task"}
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert contents_in(path) == known
    for text in (b'"step": "6"', b"layers.0.bias", known.digests["layers.0.bias"].hex().encode()):  # type: ignore[index]
        place = content.index(text) + len(text) - 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(OutputError, match="f is damaged: its header does not match its SHA-256"):
            contents_in(path)


@pytest.mark.parametrize("every", ["", "00", "zz" * SIZE * 2, "00" * SIZE * 3])
def test_digests_that_are_none_or_of_other_arrays_are_damage(tmp_path: Path, every: str) -> None:
    """Though the header has the SHA-256 that goes with it."""
    import hashlib

    path = forge(tmp_path / "f")
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    fields = json.loads(content[8 : 8 + size])
    fields["__metadata__"] |= {"sha256": "0" * 2 * SIZE, DIGESTS: every}
    head = json.dumps(fields).encode()
    head = head.replace(b"0" * 2 * SIZE, hashlib.sha256(head).hexdigest().encode(), 1)
    path.write_bytes(len(head).to_bytes(8, "little") + head + content[8 + size :])
    with pytest.raises(OutputError, match="f is damaged: its header does not match its SHA-256"):
        contents_in(path)


def test_a_file_with_one_sha256_of_all_keeps_it_among_its_texts(tmp_path: Path) -> None:
    read = contents_in(forge_before(tmp_path / "f"))
    assert read.digests is None
    assert len(read.texts["sha256"]) == 2 * SIZE
    assert read.kinds == {name: (array.dtype.name, array.shape) for name, array in ARRAYS.items()}


def test_bytes_of_very_large_arrays_are_counted() -> None:
    assert bytes_of(("float64", (1 << 40, 1 << 40))) == 1 << 83
    assert (bytes_of(("float16", ())), bytes_of(("bool", (3, 0)))) == (2, 0)
