"""Text and tokens in more files than a process may have open."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mpiml.data.dataset import open_dataset
from mpiml.data.formats import Options
from mpiml.errors import DataError

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
