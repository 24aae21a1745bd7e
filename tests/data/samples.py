"""The same small data set in every format, for tests."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mpiml.data.dataset import Dataset, open_dataset
from mpiml.data.formats import KEYS, Options

RANDOM = np.random.default_rng(5)
TRAIN, TEST = 23, 7
ARRAYS = {
    "x_train": RANDOM.integers(0, 256, (TRAIN, 4, 3), np.uint8),
    "y_train": np.arange(TRAIN, dtype=np.uint8) % 3,
    "x_test": RANDOM.integers(0, 256, (TEST, 4, 3), np.uint8),
    "y_test": np.arange(TEST, dtype=np.uint8) % 3,
}
Write = Callable[[Path], Path]


def flat(key: str) -> np.ndarray:
    return ARRAYS[key].reshape(len(ARRAYS[key]), -1)


def idx(array: np.ndarray, kind: int = 8, dtype: str = ">u1") -> bytes:
    """An array as an IDX file."""
    return (
        bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(dtype).tobytes()
    )


def npz(path: Path) -> Path:
    np.savez(path / "d.npz", **ARRAYS)
    return path / "d.npz"


def compressed_npz(path: Path) -> Path:
    np.savez_compressed(path / "d.npz", **ARRAYS)
    return path / "d.npz"


def npy(path: Path) -> Path:
    for key in KEYS:
        np.save(path / f"{key}.npy", ARRAYS[key])
    return path


def plain_idx(path: Path) -> Path:
    for name, key in zip(
        ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"), KEYS, strict=True
    ):
        (path / f"{name}-ubyte").write_bytes(idx(ARRAYS[key]))
    return path


def gzipped_idx(path: Path) -> Path:
    for file in plain_idx(path).iterdir():
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    return path


def hdf5(path: Path, chunks: bool = False) -> Path:
    import h5py

    with h5py.File(path / "d.h5", "w") as file:
        for key in KEYS:
            file.create_dataset(key, data=ARRAYS[key], chunks=chunks or None)
    return path / "d.h5"


def chunked_hdf5(path: Path) -> Path:
    return hdf5(path, chunks=True)


def csv(path: Path) -> Path:
    for which in ("train", "test"):
        x, y = flat(f"x_{which}"), ARRAYS[f"y_{which}"]
        lines = ["a,b,kind," + ",".join(f"c{i}" for i in range(10))]
        lines += [",".join(map(str, [*row[:2], label, *row[2:]])) for row, label in zip(x, y, strict=True)]
        (path / f"{which}.csv").write_text("\n".join(lines) + "\n")
    return path


def parquet(path: Path) -> Path:
    import pyarrow as pa
    from pyarrow import parquet as pq

    for which in ("train", "test"):
        x, y = flat(f"x_{which}"), ARRAYS[f"y_{which}"]
        columns = {f"c{i}": x[:, i] for i in range(2)} | {"kind": y} | {f"c{i}": x[:, i] for i in range(2, 12)}
        pq.write_table(pa.table(columns), path / f"{which}.parquet", row_group_size=4)
    return path


IMAGES: dict[str, Write] = {
    write.__name__: write for write in (npz, compressed_npz, npy, plain_idx, gzipped_idx, hdf5, chunked_hdf5)
}
TABLES: dict[str, Write] = {write.__name__: write for write in (csv, parquet)}
FORMATS = IMAGES | TABLES
OPTIONS = Options(label="kind")


def values(name: str, key: str) -> np.ndarray:
    """What a format should give for a column."""
    return flat(key) if name in TABLES and key.startswith("x") else ARRAYS[key]


def table(tmp_path: Path, text: str, test: str | None = None, **options: Any) -> Dataset:
    """CSV files with this text, which is to test on, too, if no other is given."""
    for which, lines in (("train", text), ("test", test or text)):
        (tmp_path / f"{which}.csv").write_bytes(lines.encode())
    return open_dataset(str(tmp_path), Options(**{"label": "y"} | options))


def values_of(data: Dataset) -> tuple[list[Any], list[Any]]:
    """Inputs and labels of all training rows."""
    every = np.arange(len(data.train))
    for source in (data.train.x, data.train.y):
        source.hold(every)
    return data.train.x.rows(every).tolist(), data.train.y.rows(every).tolist()


def rows(**columns: object) -> Callable[[Path], None]:
    """Put another table in place of a Parquet file."""

    def write(path: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet as pq

        pq.write_table(pa.table(columns), path, row_group_size=3, compression="none", write_page_checksum=True)

    return write
