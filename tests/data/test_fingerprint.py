"""Fingerprints: the same for the same data wherever they lie, another when a file, or an array, has changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from mpiml.data import fingerprint
from mpiml.data.dataset import Dataset, Split, open_dataset
from mpiml.data.fingerprint import SAMPLE, difference, of_array, of_files, properties
from mpiml.data.formats import Options
from mpiml.data.sources import ArraySource
from mpiml.errors import DataError
from tests.data.samples import FORMATS, OPTIONS


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_wherever_the_files_lie(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").mkdir()
    spec = FORMATS[name](tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    one, other = (
        open_dataset(str(p), OPTIONS).fingerprint for p in (spec, tmp_path / "b" / spec.relative_to(tmp_path / "a"))
    )
    assert one == other
    assert difference(one, other, "there") is None


@pytest.mark.parametrize("size", [1, SAMPLE - 1, SAMPLE, SAMPLE + 1, 16 * SAMPLE, 200 * SAMPLE])
@pytest.mark.parametrize("where", ["first", "last"])
def test_first_and_last_byte_count_always(tmp_path: Path, size: int, where: str) -> None:
    path = tmp_path / "d.bin"
    path.write_bytes(bytes(size))
    before = of_files([path])
    with open(path, "r+b") as file:
        file.seek(0 if where == "first" else size - 1)
        file.write(b"\1")
    text = difference(of_files([path]), before, "before")
    assert text is not None
    assert text.startswith(f"d.bin has {size:,} bytes, samples ")
    assert text.endswith(" before")


def test_what_is_known_of_a_file_is_not_that_of_another_one(tmp_path: Path) -> None:
    """Ranks of a node that read files in turn may have different files of one name."""
    here, there = tmp_path / "here", tmp_path / "there"
    for directory, content in ((here, b"one"), (there, b"two")):
        directory.mkdir()
        (directory / "d.bin").write_bytes(content)
        os.utime(directory / "d.bin", (1, 1))
    known = dict.fromkeys(properties([here / "d.bin"]), "known")
    assert of_files([here / "d.bin"], known) == [["d.bin", "known"]]
    assert of_files([there / "d.bin"], known) == of_files([there / "d.bin"])
    (here / "link").symlink_to(here / "d.bin")
    assert of_files([here / "link"], known)[0][1] == "known"
    (here / "d.bin").write_bytes(b"longer")
    assert of_files([here / "d.bin"], known)[0][1] == properties([here / "d.bin"]).popitem()[1]


def test_every_byte_of_a_small_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "d.bin"
    prints = set()
    for place in range(0, 4 * SAMPLE, SAMPLE // 3):
        path.write_bytes(bytes(place) + b"\1" + bytes(4 * SAMPLE - place))
        prints.add(of_files([path])[0][1])
    assert len(prints) == len(range(0, 4 * SAMPLE, SAMPLE // 3))


@pytest.mark.parametrize("row", [(), (3,), (SAMPLE,), (SAMPLE - 1, 3)])
@pytest.mark.parametrize("where", [0, -1, SAMPLE])
def test_a_changed_value_of_a_small_array_counts(row: tuple[int, ...], where: int) -> None:
    array = np.zeros((40, *row), np.uint8) if row else np.zeros(3 * SAMPLE, np.uint8)
    before = of_array(array)
    array.reshape(-1)[where % array.size] = 1
    assert of_array(array) != before


def test_of_a_big_array_samples_count_from_its_first_row_to_its_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "ARRAY", 4 * SAMPLE)
    array = np.arange(100 * SAMPLE, dtype=np.uint8).reshape(-1, 64)
    before = of_array(array)
    assert of_array(np.asfortranarray(array)) == before
    rows = SAMPLE // 64
    for first in (0, 33 * rows, 66 * rows, 99 * rows):
        for row in (first, first + rows - 1):
            array[row] += 1
            assert of_array(array) != before
            array[row] -= 1
    array[rows : 33 * rows] += 1
    assert of_array(array) == before


def test_arrays_in_memory_are_told_by_their_values_and_those_of_files_by_the_files(tmp_path: Path) -> None:
    def made(value: float, files: list[Path]) -> Dataset:
        sources = [ArraySource(np.full((9, 2), value)), ArraySource(np.arange(9) % 3)]
        return Dataset(Split(*sources), Split(*sources), files=files)

    one, other = made(1.0, []).fingerprint, made(2.0, []).fingerprint
    assert one == made(1.0, []).fingerprint
    text = difference(one, other, "on rank 0")
    assert text is not None
    assert text.startswith("x_train has 9 rows of (2,) float64, samples ")
    (file := tmp_path / "f").write_text("values")
    assert made(1.0, [file]).fingerprint == made(2.0, [file]).fingerprint


def test_files_are_told_by_their_place_below_the_directory(tmp_path: Path) -> None:
    for name in ("a/1.txt", "b/1.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(bytes(100))
    data = open_dataset(str(tmp_path), Options(context=4))
    assert [name for name, _ in data.fingerprint][:2] == ["a/1.txt", "b/1.txt"]
    (tmp_path / "c.txt").write_bytes(bytes(9))
    more = open_dataset(str(tmp_path), Options(context=4)).fingerprint
    assert difference(data.fingerprint, more, "there") == "x_train here, but c.txt there"
    assert difference(more[:2], more, "there") == "2 files and columns here, but 7 there"


def test_the_name_of_a_single_file_does_not_count(tmp_path: Path) -> None:
    for name, values in (("d.txt", 0), ("renamed.txt", 0), ("other.txt", 1)):
        (tmp_path / name).write_bytes(bytes([values]) * 100)
    first, renamed, other = (
        open_dataset(str(tmp_path / name), Options(context=4)).fingerprint
        for name in ("d.txt", "renamed.txt", "other.txt")
    )
    assert first[0][0] == "d.txt"  # as ever, for runs that have it in writing
    assert difference(renamed, first, "there") is None
    assert str(difference(other, first, "there")).startswith("other.txt has 100 bytes, samples ")
    assert difference([*renamed, renamed[0]], [*first, first[0]], "there") == "renamed.txt here, but d.txt there"
    assert difference(renamed[1:], first[1:], "there") is None
    assert difference([["x", "1 row"]], [["y", "1 row"]], "there") == "x here, but y there"


def test_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*d\.bin"):
        of_files([tmp_path / "d.bin"])
