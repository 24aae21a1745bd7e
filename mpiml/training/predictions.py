"""Predictions of all test rows in one file, in row order; each replica keeps its own until rank 0 writes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpiml.errors import ConfigError
from mpiml.flags import quoted
from mpiml.nn.losses import sigmoid, softmax
from mpiml.nn.outputs import Outputs
from mpiml.nn.parameters import Shape
from mpiml.parallel.stage import Computation
from mpiml.partition import part
from mpiml.run.directory import Parts, replacing
from mpiml.team import wait
from mpiml.training.evaluation import Evaluation
from mpiml.training.task import Task

Rows = NDArray[Any]
SUFFIXES = (".npy", ".csv")


class Predicted(NamedTuple):
    """What is to be written of each row: to which file, if to any, and whether probabilities."""

    file: str | None
    probabilities: bool


def check_path(predicted: Predicted) -> None:
    """Raise ConfigError if predictions are asked for and cannot be written there: before the work, not after it."""
    if predicted.probabilities and not predicted.file:
        raise ConfigError("--probabilities: say to which file, with --predictions FILE")
    if predicted.file is None:
        return
    path = Path(predicted.file)
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--predictions {path}: must end in {' or '.join(SUFFIXES)}")
    if path.is_dir():
        raise ConfigError(f"--predictions {path}: is a directory")
    if not path.parent.is_dir():
        raise ConfigError(f"--predictions {path}: there is no directory {path.parent}")


class Predictions:
    """Predictions of this replica's test rows, made on its last stage: of each, in the shape of its labels, classes,
    words or values. Probabilities of classes have one more axis, the last.

    Args:
        here: what this rank's stage computes; from now on, what it scores is kept.
        task: what the model is for.
        outputs: how outputs meet the labels. If only a user's own loss and metric know, outputs stay as they are.
        binary: whether outputs predict labels of 0 and 1, each by itself.
        probabilities: of classes, or of 1, instead of the likeliest.

    Raises ConfigError for probabilities that the outputs do not have.
    """

    def __init__(
        self, here: Computation, task: Task, outputs: Outputs | None, binary: bool = False, probabilities: bool = False
    ):
        if probabilities and outputs is None:
            raise ConfigError(
                "--probabilities: the model's outputs do not fit the labels, so that they count no classes"
            )
        self._outputs, self._binary, self._probabilities = outputs, binary, probabilities
        classes = outputs is not None and outputs.axis is not None
        several = (task.outputs,) if classes and probabilities else ()
        self.shape: Shape = (*task.labels, *several) if outputs else here.y_shape
        labels = outputs is not None and (classes or binary) and not probabilities
        self.dtype: DTypeLike = np.int64 if labels else here.dtype
        self.words = task.words if classes else ()
        self._kept: list[Rows] = []
        self._array = here.array
        self._score, here.objective = here.objective, self._objective

    def _objective(
        self, y: Rows, labels: Rows, weights: Rows | None, measured: bool, at: Any
    ) -> tuple[list[float], Rows]:
        predicted = np.ascontiguousarray(self._predicted(self._array(y)), self.dtype)
        self._kept.append(predicted.reshape(len(y), *self.shape))
        return self._score(y, labels, weights, measured, at)

    def _predicted(self, y: Rows) -> Rows:
        if self._outputs is None:
            return y.copy()
        if self._outputs.axis is None:
            return (sigmoid(y) if self._probabilities else y >= 0) if self._binary else y.copy()
        scores = self._outputs.classes_last(y)
        predicted: Rows = softmax(scores) if self._probabilities else scores.argmax(axis=-1)
        return predicted

    def write(self, path: Path, tests: Evaluation) -> None:
        """Write those of all replicas; collective. Raises OutputError, on all ranks alike, if that fails."""
        grid, clock = tests.grid, tests.grid.team.clock
        words = np.array([quoted(word) for word in self.words] if path.suffix == ".csv" else self.words)
        about = self.shape, self.dtype, words
        shape, dtype, words = grid.team.broadcast(about, grid.rank_of(grid.stages - 1, 0))
        arrays = self._gathered(tests, shape, dtype)

        def written() -> None:
            clock("log")
            try:
                with replacing(path, progress=clock.progress) as file:
                    rows = len(tests.split), *shape
                    if words.size and not self._probabilities:
                        _write(file, path.suffix, (words[array] for array in arrays), rows, words.dtype)
                    else:
                        _write(file, path.suffix, arrays, rows, dtype, words.tolist())
            finally:
                for _ in arrays:  # whatever happened: others wait until their messages are taken
                    pass

        sends = grid.comm.rank > 0 and grid.stage == grid.stages - 1
        sent = [grid.comm.Isend(array, 0) for array in self._kept] if sends else []
        grid.team.on_rank_0(written)
        grid.team.wait(sent)

    def _gathered(self, tests: Evaluation, shape: Shape, dtype: DTypeLike) -> Iterator[Rows]:
        """On rank 0, all chunks in their order."""
        grid = tests.grid
        for replica in range(grid.replicas):
            source = grid.rank_of(grid.stages - 1, replica)
            if source == 0:
                yield from self._kept
                continue
            for chunk in range(*part(replica, grid.replicas, tests.chunks)):
                rows = min(tests.chunk_rows, len(tests.split) - chunk * tests.chunk_rows)
                array = np.empty((rows, *shape), dtype)
                wait([grid.comm.Irecv(array, source)])
                yield array


def _write(
    file: Parts, suffix: str, arrays: Iterator[Rows], shape: Shape, dtype: DTypeLike, names: Sequence[str] = ()
) -> None:
    """Write rows of `shape`; `names` are those of a table's columns, if they have any."""
    if suffix == ".npy":
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for array in arrays:
            file.write(array.tobytes())
        return
    rows, columns = shape[0], int(np.prod(shape[1:]))
    names = names or (["prediction"] if len(shape) == 1 else [f"prediction{column}" for column in range(columns)])
    file.write((",".join(["row", *names]) + "\n").encode())
    lines = (line for array in arrays for line in array.reshape(len(array), columns).astype(str).tolist())
    for row, line in zip(range(rows), lines, strict=True):
        file.write((",".join([str(row), *line]) + "\n").encode())
