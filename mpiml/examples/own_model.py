"""A program of your own, with your own model and data: `mpirun -n 4 python -m mpiml.examples.own_model`.

It takes seconds, also on one rank. Because the number of micro-batches is set, the weights are the same on any number.
"""

import sys

import numpy as np

from mpiml.api import GELU, Config, Dataset, Layer, LayerNorm, Linear, Residual, train

FEATURES, CLASSES, WIDTH = 2, 3, 32
SETTINGS = Config(steps=200, batch=128, microbatches=4, optimizer="adam", lr=0.003, eval_every=50)


def data() -> Dataset:
    """Points of a square; their class is the ring around its middle that they are in. Every rank makes the same."""
    x = np.random.default_rng(seed=0).uniform(-1, 1, (5000, FEATURES)).astype(np.float32)
    y = np.minimum(CLASSES * np.hypot(x[:, 0], x[:, 1]), CLASSES - 1).astype(int)
    return Dataset.from_arrays(x[:4000], y[:4000], x[4000:], y[4000:])  # to train on, and to test on


def model() -> list[Layer]:
    """A residual network. With `Config(pipe=2)`, a pipeline of two stages, it is cut between layers of this list."""
    blocks = [Residual(LayerNorm(WIDTH), Linear(WIDTH, WIDTH), GELU()) for _ in range(3)]
    return [Linear(FEATURES, WIDTH), *blocks, Linear(WIDTH, CLASSES)]


if __name__ == "__main__":
    result = train(SETTINGS, model=model(), data=data())  # what result.json in the run directory holds
    sys.exit(result["exit_code"])  # 0, or 75 if the run was asked to stop and has been saved
