"""Trainers of the package for the benchmark, their models and random rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mpi4py import MPI
from numpy.typing import ArrayLike

from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.nn.layers import Layer, Linear, ReLU, stack_flops
from mpiml.nn.perceptrons import mlp
from mpiml.training.run import unsaved

RATE, MOMENTUM = 0.01, 0.9
ROWS = 8192


class Trainer:
    """Does one step of a run after the other, without log and checkpoints.

    Args:
        settings: besides learning rate and momentum, which are the other side's.
    """

    def __init__(self, comm: MPI.Intracomm, layers: Sequence[Layer], data: Dataset, **settings: object):
        config = Config(lr=RATE, momentum=MOMENTUM, steps=10**9, **settings)  # type: ignore[arg-type]
        self.run, self.number = unsaved(comm, config, data, list(layers)), 0
        operations = 3.0 * config.batch * sum(stack_flops(layers, data.train.x.shape)) / comm.size
        self.repeats = max(1, int(6e9 / operations))  # how many steps to time together: about a sixth of a second

    def step(self) -> None:
        """The next step, or round of workers, as mpiml.train does it."""
        if self.run.config.average_every:
            self.number += len(self.run.advance(self.number + 1).steps)
            return
        self.number += 1
        self.run.step(self.number)


def on_arrays(comm: MPI.Intracomm, layers: Sequence[Layer], x: ArrayLike, y: ArrayLike, **settings: object) -> Trainer:
    """A trainer of these layers on these rows."""
    data = Dataset.from_arrays(x, y, np.asarray(x)[:256], np.asarray(y)[:256])
    return Trainer(comm, layers, data, **settings)


def images() -> tuple[np.ndarray, np.ndarray]:
    """Random images of 784 pixels, and labels of 10 classes."""
    rng = np.random.default_rng(0)
    return rng.random((ROWS, 784), dtype=np.float32), rng.integers(0, 10, ROWS)


def perceptron(
    comm: MPI.Intracomm, hidden: Sequence[int], batch: int, microbatches: int, **settings: object
) -> Trainer:
    """A perceptron 784-hidden-10 on images; trained with momentum unless `settings` say otherwise."""
    settings = {"batch": batch, "microbatches": microbatches, "optimizer": "momentum"} | settings
    x, y = images()
    return on_arrays(comm, mlp((784,), 10, hidden), x, y, **settings)


def tower(comm: MPI.Intracomm, width: int, batch: int, microbatches: int, pipe: int, **settings: object) -> Trainer:
    """Eight linear layers with ReLU, all of one width, cut into equal stages; mean squared error, plain SGD."""
    layers = [layer for _ in range(8) for layer in (Linear(width, width), ReLU())]
    rng = np.random.default_rng(0)
    x, y = (rng.random((4 * batch, width), dtype=np.float32) for _ in range(2))
    cuts = tuple(range(16 // pipe, 16, 16 // pipe))
    settings |= {"batch": batch, "microbatches": microbatches, "optimizer": "sgd", "pipe": pipe, "cuts": cuts}
    return on_arrays(comm, layers, x, y, **settings)
