"""A rank keeps and reads its share of the data, not all of them: 1 GB over 4 ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.format import open_memmap

from tests.conftest import launch

pytestmark = pytest.mark.contract

RANKS, ROWS, WIDTH = 4, 1 << 18, 1 << 12  # rows of 4 KiB: 1 GiB, sparse on disk
SHARE = ROWS * WIDTH // RANKS
SLACK = 96 << 20  # the program itself, as it grows while it trains, and what is looked at together


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)


def npy(path: Path) -> Path:
    for which, rows in (("train", ROWS), ("test", 64)):
        open_memmap(path / f"x_{which}.npy", "w+", np.uint8, (rows, WIDTH)).flush()
        np.save(path / f"y_{which}.npy", np.arange(rows) % 4)
    return path


def hdf5(path: Path) -> Path:
    import h5py

    written = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    written.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    written.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    written.set_chunk((64, WIDTH))  # what lies in one piece is mapped, as .npy files are
    with h5py.File(path / "d.h5", "w") as file:
        for which, rows in (("train", ROWS), ("test", 64)):
            space = h5py.h5s.create_simple((rows, WIDTH))
            h5py.h5d.create(file.id, f"x_{which}".encode(), h5py.h5t.NATIVE_UINT8, space, written)
            file[f"y_{which}"] = np.arange(rows) % 4
    return path / "d.h5"


@pytest.mark.parametrize(("write", "most"), [(npy, SHARE + SLACK), (hdf5, SLACK)], ids=["mapped", "hdf5"])
def test_resident_memory_is_the_ranks_share(directory: Path, write, most: int) -> None:
    script = str(Path(__file__).with_name("memory.py"))
    flags = f"--data {write(directory)} --out {directory / 'run'} --hidden 4 --batch 64 --steps 5 --quiet"
    done = launch(RANKS, script, *flags.split(), "--shuffle", "blocks")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for rank in found["ranks"]:
        assert rank["grown"] < most < ROWS * WIDTH / 2, found
        assert rank["x"] == rank["y"] == rank["rows"] // RANKS
    assert found["once"]
