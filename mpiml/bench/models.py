"""Trainers of the package for the benchmark: models, random rows, and how often to repeat a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mpi4py import MPI
from numpy.typing import ArrayLike

from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.nn.layers import Layer, Linear, ReLU
from mpiml.nn.perceptrons import mlp
from mpiml.training.run import Run, unsaved

RATE, MOMENTUM = 0.01, 0.9
ROWS = 8192


class Trainer:
    """Does one step of a run after the other, without log and checkpoints."""

    def __init__(self, run: Run):
        self.run, self.number = run, 0

    def step(self) -> None:
        """The next step, as mpiml.train does it."""
        self.number += 1
        self.run.step(self.number)


def on_arrays(comm: MPI.Intracomm, layers: Sequence[Layer], x: ArrayLike, y: ArrayLike, **settings: object) -> Trainer:
    """A trainer of these layers on these rows, with the learning rate and momentum of the other side."""
    data = Dataset.from_arrays(x, y, np.asarray(x)[:256], np.asarray(y)[:256])
    config = Config(lr=RATE, momentum=MOMENTUM, steps=10**9, **settings)  # type: ignore[arg-type]
    return Trainer(unsaved(comm, config, data, list(layers)))


def images() -> tuple[np.ndarray, np.ndarray]:
    """Random images of 784 pixels, and labels of 10 classes."""
    rng = np.random.default_rng(0)
    return rng.random((ROWS, 784), dtype=np.float32), rng.integers(0, 10, ROWS)


def perceptron(
    comm: MPI.Intracomm,
    hidden: Sequence[int],
    batch: int,
    microbatches: int,
    optimizer: str = "momentum",
    **settings: object,
) -> Trainer:
    """A perceptron 784-hidden-10 on images."""
    settings |= {"batch": batch, "microbatches": microbatches, "optimizer": optimizer}
    x, y = images()
    return on_arrays(comm, mlp((784,), 10, hidden), x, y, **settings)


def tower(comm: MPI.Intracomm, width: int, batch: int, microbatches: int, pipe: int) -> Trainer:
    """Eight linear layers with ReLU, all of one width, cut into equal stages; mean squared error, plain SGD."""
    layers: list[Layer] = []
    for _ in range(8):
        layers += [Linear(width, width), ReLU()]
    rng = np.random.default_rng(0)
    x, y = (rng.random((4 * batch, width), dtype=np.float32) for _ in range(2))
    cuts = tuple(range(16 // pipe, 16, 16 // pipe))
    settings = {"batch": batch, "microbatches": microbatches, "optimizer": "sgd", "pipe": pipe, "cuts": cuts}
    return on_arrays(comm, layers, x, y, **settings)


def repeats(operations: float) -> int:
    """How many steps to time together: about a sixth of a second of a core's work."""
    return max(1, int(6e9 / operations))


def perceptron_operations(hidden: Sequence[int], batch: int) -> float:
    """Floating-point operations of a training step, of one rank."""
    return 6.0 * batch * sum(a * b for a, b in zip([784, *hidden], [*hidden, 10], strict=True))
