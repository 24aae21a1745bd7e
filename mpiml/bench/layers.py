"""Layers against PyTorch's on one core: both train the same model on the same rows, forward, backward and update."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml.bench.models import Trainer, images, on_arrays
from mpiml.bench.pairs import ratio
from mpiml.bench.processes import resident
from mpiml.bench.rows import Ratio
from mpiml.nn import convolution
from mpiml.nn.convnets import cnn
from mpiml.nn.layers import Conv2d, Layer, stack_shapes
from mpiml.nn.perceptrons import mlp
from mpiml.nn.tiling import tiles
from mpiml.nn.transformers import gpt

Product = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]  # both factors, and an array for the product
CHANNELS = 32
PLACES, TOKENS = 128, 256


@dataclass
class Duel:
    """The same training for both sides: the package's layers and rows, and builder and sizes of PyTorch's module."""

    layers: list[Layer]
    x: NDArray[Any]
    y: NDArray[Any]
    rows: int
    optimizer: str
    module: tuple[str, tuple[Any, ...]]

    def ours(self) -> Trainer:
        """A trainer of the package."""
        settings = {"batch": self.rows, "microbatches": 1, "optimizer": self.optimizer}
        return on_arrays(MPI.COMM_SELF, self.layers, self.x, self.y, **settings)

    def theirs(self, memory_format: str) -> Any:
        """A trainer of PyTorch."""
        from mpiml.bench import torch_eager

        build, sizes = self.module
        module = getattr(torch_eager, build)(*sizes)
        return torch_eager.Eager(module, self.x, self.y, self.rows, self.optimizer, memory_format)


def perceptron(width: str, rows: str) -> Duel:
    """784-width-width-10, momentum."""
    hidden = [int(width)] * 2
    return Duel(mlp((784,), 10, hidden), *images(), int(rows), "momentum", ("mlp", (hidden,)))


def convolutions() -> Duel:
    """Images of 28 x 28 pixels, convolutions of 32 and 64 channels, momentum."""
    x, y = images()
    x = x.reshape(-1, 28, 28, 1)
    return Duel(cnn(x.shape[1:], 10, CHANNELS), x, y, 64, "momentum", ("cnn", (CHANNELS,)))


def transformer(width: int = 256, blocks: int = 4, recompute: bool = False) -> Duel:
    """Rows of 128 tokens of 256 kinds, 4 heads, Adam."""
    x, y = np.random.default_rng(0).integers(0, TOKENS, (2, 256, PLACES))
    layers = gpt((PLACES,), TOKENS, TOKENS, width, 4, blocks, recompute=recompute)
    return Duel(layers, x, y, 8, "adam", ("gpt", (TOKENS, PLACES, width, 4, blocks)))


DUELS: dict[str, Callable[..., Duel]] = {"mlp": perceptron, "cnn": convolutions, "gpt": transformer}


def torch_step(memory_format: str, model: str, *sizes: str) -> Ratio:
    """Samples/s over those of PyTorch."""
    duel = DUELS[model](*sizes)
    ours, theirs = duel.ours(), duel.theirs(memory_format)
    return ratio(MPI.COMM_WORLD, theirs.step, ours.step, ours.repeats)


def recomputed() -> Ratio:
    """Time of a step of the gpt whose blocks are computed again, over that of a step that keeps all."""
    again, plain = (transformer(recompute=recompute).ours() for recompute in (True, False))
    return ratio(MPI.COMM_WORLD, again.step, plain.step, plain.repeats)


def torch_products() -> Ratio:
    """Samples/s of a step of the cnn that does nothing but the products of matrices of its convolutions, over those of
    PyTorch's whole step."""
    duel = convolutions()
    ours, theirs = duel.ours(), duel.theirs("channels_last")
    shapes = stack_shapes(duel.layers, duel.x.shape[1:])
    layers = [(layer, shape) for layer, shape in zip(duel.layers, shapes, strict=False) if isinstance(layer, Conv2d)]
    made = [product for layer, shape in layers for product in products(layer, math.prod(shape[:2]), duel.rows)]

    def multiply() -> None:
        for left, right, product in made:
            np.matmul(left, right, out=product)

    return ratio(MPI.COMM_WORLD, theirs.step, multiply, ours.repeats)


def products(layer: Conv2d, pixels: int, rows: int) -> list[Product]:
    """The products of a step of a convolution that keeps the number of pixels: of the forward pass, for the gradient by
    weights, and for that by the input if it is needed. All tiles of images share one matrix of patches, which so stays
    in cache."""

    def forward(inputs: int, outputs: int) -> list[Product]:
        patch = layer.kernel**2 * inputs
        sizes = [pixels * (t.stop - t.start) for t in tiles(rows, 4 * pixels * patch, convolution.CACHE)]
        patches = np.ones((sizes[0], patch), np.float32, "F" if inputs < convolution.FEW else "C")
        weight, y = (np.ones((count, outputs), np.float32) for count in (patch, sizes[0]))
        return [(patches[:size], weight, y[:size]) for size in sizes]

    made = forward(layer.inputs, layer.outputs)
    by_weights = [(patches.T, y, np.empty_like(weight)) for patches, weight, y in made]
    return made + by_weights + (forward(layer.outputs, layer.inputs) if layer.needs_dx else [])


def torch_memory() -> Ratio:
    """Memory for training the transformer over that in PyTorch, in a process each: rank 0 trains by the package, rank 1
    by PyTorch.

    Counted is the highest resident memory of a step, with values, gradients and optimizer state, above the memory
    before the model was built, when both libraries had trained a tiny model.
    """
    world = MPI.COMM_WORLD

    def trainer(duel: Duel) -> Any:
        return duel.theirs("channels_last") if world.rank else duel.ours()

    trainer(transformer(width=16, blocks=1)).step()
    duel = transformer()
    before = resident("VmRSS")
    training = trainer(duel)
    training.step()
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the peak
    for _ in range(3):
        training.step()
    ours, theirs = world.allgather(resident("VmHWM") - before)
    return Ratio.of([ours / theirs])
