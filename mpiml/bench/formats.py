"""Training a small model on shuffled rows of a file, in each format, against the same rows in memory."""

from __future__ import annotations

import functools
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml.bench.models import Trainer
from mpiml.bench.pairs import ratio
from mpiml.bench.rows import Ratio
from mpiml.data.dataset import Dataset, open_dataset
from mpiml.data.formats import KEYS, Options
from mpiml.data.idx import NAMES
from mpiml.data.sources import extra
from mpiml.nn.layers import Embedding, Layer, Linear
from mpiml.nn.perceptrons import mlp

TEST = 256  # rows
CONTEXT, TOKENS = 128, 256
PERCEPTRON = functools.partial(mlp, outputs=10, hidden=(64, 64))
Arrays = Mapping[str, NDArray[Any]]  # by mpiml.data.formats.KEYS


def float_rows(megabytes: float) -> Arrays:
    """Rows of 784 float32 with labels of 10 classes; `megabytes` to train on."""
    rng, rows = np.random.default_rng(0), int(megabytes * 2**20 / (784 * 4)) + TEST
    return columns(rng.random((rows, 784), np.float32), rng.integers(0, 10, rows))


def image_rows(megabytes: float) -> Arrays:
    """Images of 28 x 28 bytes with labels of 10 classes."""
    rng, rows = np.random.default_rng(0), int(megabytes * 2**20 / 784) + TEST
    return columns(rng.integers(0, 256, (rows, 28, 28), np.uint8), rng.integers(0, 10, rows, np.uint8))


def token_rows(megabytes: float) -> Arrays:
    """Tokens of two bytes, in rows whose labels are the next tokens."""
    rows = int(megabytes * 2**20 / (2 * CONTEXT)) + TEST
    text = np.random.default_rng(0).integers(0, TOKENS, rows * CONTEXT + 1, np.uint16)
    return columns(text[:-1].reshape(rows, CONTEXT), text[1:].reshape(rows, CONTEXT))


def columns(x: NDArray[Any], y: NDArray[Any]) -> Arrays:
    """Split rows: the last TEST to test on, the others to train on."""
    return dict(zip(KEYS, (x[:-TEST], y[:-TEST], x[-TEST:], y[-TEST:]), strict=True))


def write_npy(path: Path, arrays: Arrays, order: Any = "C") -> Path:
    for key, array in arrays.items():
        np.save(path / f"{key}.npy", np.asarray(array, order=order))
    return path


def write_npz(path: Path, arrays: Arrays, save: Callable[..., None] = np.savez) -> Path:
    save(path / "d.npz", allow_pickle=False, **arrays)
    return path / "d.npz"


def write_idx(path: Path, arrays: Arrays) -> Path:
    for key, array in arrays.items():
        header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        (path / NAMES[key]).write_bytes(header + array.tobytes())
    return path


def write_hdf5(path: Path, arrays: Arrays) -> Path:
    h5py = extra("h5py", "hdf5", "this row")
    with h5py.File(path / "d.h5", "w") as file:
        for key, array in arrays.items():
            file[key] = array
    return path / "d.h5"


def write_tokens(path: Path, arrays: Arrays) -> Path:
    for which in ("train", "test"):
        x, y = arrays[f"x_{which}"], arrays[f"y_{which}"]
        (path / f"{which}.bin").write_bytes(x.tobytes() + y[-1, -1:].tobytes())
    return path


def next_token(shape: tuple[int, ...]) -> list[Layer]:
    """Predicts the next token from the last one."""
    return [Embedding(TOKENS, 64), Linear(64, TOKENS)]


@dataclass(frozen=True)
class Format:
    """A file format: how rows are written, how they are made for some megabytes, the model, and the rows of a step."""

    write: Callable[[Path, Arrays], Path]
    arrays: Callable[[float], Arrays] = float_rows
    model: Callable[[tuple[int, ...]], list[Layer]] = PERCEPTRON
    rows: int = 64
    context: int | None = None

    def trainer(self, data: Dataset) -> Trainer:
        """A trainer on one rank."""
        settings = {"batch": self.rows, "microbatches": 1, "optimizer": "momentum"}
        return Trainer(MPI.COMM_SELF, self.model(data.train.x.shape), data, **settings)


FORMATS = {
    "npy": Format(write_npy),
    "npy_columns": Format(functools.partial(write_npy, order="F")),
    "npz": Format(write_npz),
    "npz_compressed": Format(functools.partial(write_npz, save=np.savez_compressed)),
    "idx": Format(write_idx, image_rows),
    "hdf5": Format(write_hdf5),
    "tokens": Format(write_tokens, token_rows, next_token, 8, CONTEXT),
}


def from_file(name: str, megabytes: str) -> Ratio:
    """Samples/s of training on a file over those on the same rows in memory."""
    kind = FORMATS[name]
    arrays = kind.arrays(float(megabytes))
    with tempfile.TemporaryDirectory() as directory:
        data = open_dataset(str(kind.write(Path(directory), arrays)), Options(context=kind.context))
        file, memory = (kind.trainer(of) for of in (data, Dataset.from_arrays(*arrays.values())))
        with file.run.data.ahead, memory.run.data.ahead:
            return ratio(MPI.COMM_SELF, memory.step, file.step, file.repeats)
