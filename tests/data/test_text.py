"""Text and tokens: windows of any number of files; and bad ones."""

from __future__ import annotations

import io
import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.data.dataset import Dataset, open_dataset
from mpiml.data.formats import Options
from mpiml.errors import DataError
from tests.data.damage import refusal
from tests.data.samples import csv, npy

FILES = 200
CONTEXT = 16


@pytest.fixture
def few_files() -> Iterator[None]:
    """For as long as a test, this process may have only some more files open than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def write(path: Path, suffix: str) -> np.ndarray:
    """Files of unequal length, an empty one among them. Returns all tokens."""
    tokens = np.arange(FILES * 30, dtype=np.uint16) % (256 if suffix == ".txt" else 5000)
    parts = np.split(tokens, np.sort(np.random.default_rng(0).integers(0, len(tokens), FILES - 1)))
    for number, part in enumerate([*parts[:50], parts[0][:0], *parts[50:]]):
        file = path / f"{number:04d}{suffix}"
        np.save(file, part) if suffix == ".npy" else file.write_bytes(
            part.astype("u1" if suffix == ".txt" else "<u2").tobytes()
        )
    return tokens


@pytest.mark.parametrize("suffix", [".txt", ".npy", ".bin"])
def test_more_files_than_may_be_open(tmp_path: Path, few_files: None, suffix: str) -> None:
    tokens = write(tmp_path, suffix)
    data = open_dataset(str(tmp_path), Options(context=CONTEXT, held_out=0.1))
    assert data.fingerprint
    rows = len(data.train)
    orders = [np.random.default_rng(thread).permutation(rows) for thread in range(2)]
    with ThreadPoolExecutor(2) as threads:  # one that reads ahead, and one that evaluates
        inputs, labels = threads.map(lambda source, order: source.rows(order), (data.train.x, data.train.y), orders)
    windows = tokens[: rows * CONTEXT + 1]
    assert (inputs == windows[:-1].reshape(rows, CONTEXT)[orders[0]]).all()
    assert (labels == windows[1:].reshape(rows, CONTEXT)[orders[1]]).all()


def test_a_file_that_is_gone_when_it_is_read_is_named(tmp_path: Path) -> None:
    write(tmp_path, ".txt")
    data = open_dataset(str(tmp_path), Options(context=CONTEXT))
    (tmp_path / "0003.txt").unlink()
    with pytest.raises(DataError, match=r"cannot read .*/0003.txt: No such file"):
        data.train.x.rows(np.arange(len(data.train)))


TEXT = bytes(range(32, 127)) * 3


def windows(data: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    count = (len(data) - 1) // context
    x, y = data[: count * context], data[1 : count * context + 1]
    return x.reshape(count, context), y.reshape(count, context)


def check(data: Dataset, train: np.ndarray, test: np.ndarray, context: int) -> None:
    for split, expected in ((data.train, train), (data.test, test)):
        x, y = windows(expected, context)
        everything = np.arange(len(split))
        np.testing.assert_array_equal(split.x.rows(everything), x)
        np.testing.assert_array_equal(split.y.rows(everything[::-1]), y[::-1])
    assert data.language_model


@pytest.mark.parametrize("context", [1, 7, 20])
def test_text_in_windows(tmp_path: Path, context: int) -> None:
    (tmp_path / "book.txt").write_bytes(TEXT)
    data = open_dataset(str(tmp_path / "book.txt"), Options(context=context, held_out=0.2))
    assert (data.classes, data.name) == (256, "book")
    text = np.frombuffer(TEXT, np.uint8)
    check(data, text[: -len(text) // 5], text[-len(text) // 5 :], context)


def test_files_of_a_text_follow_each_other(tmp_path: Path) -> None:
    pieces = {
        "b/2.py": TEXT[50:90],
        "a.py": TEXT[:50],
        "b/3.py": b"",
        "c.py": TEXT[90:],
        ".hidden.py": b"no",
        "d.o": b"no",
    }
    for name, content in pieces.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    text = np.frombuffer(TEXT, np.uint8)
    data = open_dataset(f"{tmp_path}/**/*.py", Options(context=9))
    check(data, text[: len(text) - round(len(text) / 10)], text[len(text) - round(len(text) / 10) :], 9)
    (tmp_path / "d.o").unlink()
    assert [file.name for file in open_dataset(str(tmp_path), Options(context=9)).files] == [
        "a.py",
        "2.py",
        "3.py",
        "c.py",
    ]


@pytest.mark.parametrize("kind", ["txt", "dir", "val"])
def test_a_text_of_its_own_to_test_on(tmp_path: Path, kind: str) -> None:
    if kind == "dir":
        (tmp_path / "train").mkdir()
        (tmp_path / "test").mkdir()
    suffix, other = {"txt": (".txt", "test"), "dir": ("/1", "test"), "val": (".bin", "val")}[kind]
    train, test = np.arange(200, dtype="<u2"), np.arange(100, dtype="<u2")
    dtype = "<u2" if kind == "val" else "u1"
    (tmp_path / f"train{suffix}").write_bytes(train.astype(dtype).tobytes())
    (tmp_path / f"{other}{suffix}").write_bytes(test.astype(dtype).tobytes())
    check(open_dataset(str(tmp_path), Options(context=8)), train, test, 8)


@pytest.mark.parametrize(
    ("suffix", "dtype"), [(".bin", "uint16"), (".bin", "uint32"), (".npy", "uint16"), (".npy", "int64")]
)
def test_tokens(tmp_path: Path, suffix: str, dtype: str) -> None:
    tokens = np.random.default_rng(0).integers(0, 50_000, 500).astype(dtype)
    path = tmp_path / f"tokens{suffix}"
    np.save(path, tokens) if suffix == ".npy" else path.write_bytes(tokens.tobytes())
    data = open_dataset(str(path), Options(context=16, tokens="uint32" if dtype == "uint32" else "uint16"))
    assert (data.train.x.dtype, data.classes) == (np.dtype(dtype), None)
    check(data, tokens[:450], tokens[450:], 16)


@pytest.mark.parametrize("write", [npy, csv])
def test_context_is_for_text(tmp_path: Path, write: Any) -> None:
    with pytest.raises(DataError, match=r"--context 8: .* is neither text nor tokens"):
        open_dataset(str(write(tmp_path)), Options(label="kind", context=8))


def test_text_needs_a_context(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(TEXT)
    with pytest.raises(DataError, match="text and tokens need --context T"):
        open_dataset(str(tmp_path / "book.txt"))


def saved(array: object) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(array))
    return file.getvalue()


BAD_TOKENS: dict[str, tuple[str, bytes, str]] = {
    "text too short": ("t.txt", b"hello", "5 tokens to train on are too few: a row needs 8 + 1"),
    "too short to test on": ("t.txt", b"hello, wide world", "2 tokens to test on are too few"),
    "empty": ("t.txt", b"", "0 tokens to train on"),
    "half a token": ("t.bin", bytes(401), "t.bin: its 401 bytes are not a whole number of uint16 tokens"),
    "floats": ("t.npy", saved(np.zeros(400)), "t.npy is float64"),
    "a table": ("t.npy", saved(np.zeros((400, 2), int)), "t.npy is int64 in rows of (2,)"),
    "pickled": ("t.npy", saved(np.array([{}], object)), "pickled objects are never read"),
    "truncated": ("t.npy", saved(np.zeros(400, int))[:-8], "t.npy: its header declares 3,200 bytes, but"),
    "negative": ("t.npy", saved(np.r_[np.arange(300) % 9, -5, np.zeros(99, int)]), "token -5 is below 0"),
    "its row": ("t.npy", saved(np.r_[np.arange(300) % 9, -5, np.zeros(99, int)]), "in row 37"),
}


@pytest.mark.parametrize("what", BAD_TOKENS)
def test_bad_text_and_tokens_are_refused_in_a_line(tmp_path: Path, what: str) -> None:
    name, content, words = BAD_TOKENS[what]
    (tmp_path / name).write_bytes(content)
    assert words in refusal(tmp_path / name, Options(context=8))


def test_no_text_at_all(tmp_path: Path) -> None:
    assert "there are no files" in refusal(tmp_path, Options(context=8))
    assert "there are no files" in refusal(tmp_path / "*.py", Options(context=8))
    assert "none.txt: No such file" in refusal(tmp_path / "none.txt", Options(context=8))
    for name, dtype in (("a.npy", int), ("b.npy", np.uint16)):
        np.save(tmp_path / name, np.zeros(100, dtype))
    assert f"b.npy is uint16, but {tmp_path}/a.npy is int64" in refusal(tmp_path, Options(context=8))
