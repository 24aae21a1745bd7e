"""Layers whose forward pass is computed again in the backward pass, so that their activations need no memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpiml.errors import ConfigError
from mpiml.nn.base import Array, At, Backward, Layer, forward, stack_flops, stack_shapes, stacked
from mpiml.nn.parameters import Gradients, Shape


class Recompute(Layer):
    """The layers one after the other. Until their backward pass nothing is kept but their input; then the forward pass
    is computed again. A model of n such blocks holds n inputs and the activations of one block, for a third more
    operations. Results have the same bits, and parameters the same names, as without it.

    Chen et al., "Training deep nets with sublinear memory cost", 2016, arXiv 1604.06174.

    Args:
        layers: at the top level of a model also PyTorch modules.

    Raises, in a backward pass, ConfigError if the layers return something else than before: they keep state.
    """

    transparent = True

    def __init__(self, *layers: Any):
        if not layers:
            raise ValueError("Recompute() is of no layers; give it those that are to be computed again")
        self.layers: list[Any] = list(layers)

    def inner(self) -> Sequence[Layer]:
        return self.layers

    @property
    def arrays(self) -> bool:  # type: ignore[override]
        """As of its layers."""
        return bool(self.layers[-1].arrays)

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        learned = self.layers[0].needs_dx  # then layers before these are trained
        y, backward_at_once = forward(self.layers, x, at, learned)
        if not at.training:
            return y, backward_at_once
        total = _total(y)

        def backward(dy: Array, grads: Gradients) -> Array | None:
            y, inner_backward = forward(self.layers, x, at, learned)
            same = _total(y) == total
            del y  # so that the block's own arrays are all that it takes
            if not same:
                names = f"{self.layers[0].path} to {self.layers[-1].path}" if len(self.layers) > 1 else self.path
                raise ConfigError(
                    f"{names}: another result when computed again from the same input; a layer that keeps state from "
                    "call to call cannot stand in Recompute"
                )
            return inner_backward(dy, grads)

        return y, backward

    def output_shape(self, shape: Shape) -> Shape:
        return stack_shapes(self.layers, shape)[-1]

    def flops(self, shape: Shape) -> int:
        return sum(stack_flops(self.layers, shape))


def opened(layers: Sequence[Any]) -> list[Any]:
    """The layers, or modules, of a model with those of each Recompute in its place."""
    return [one for layer in layers for one in (opened(layer.layers) if isinstance(layer, Recompute) else [layer])]


def blocks(layers: Sequence[Any]) -> list[Recompute | None]:
    """For each of the opened layers the Recompute that it stands in, if any; of several in each other the outermost."""
    return [block for layer in layers for block in _repeated(layer)]


def _repeated(layer: Any) -> list[Recompute | None]:
    return [layer] * len(opened(layer.layers)) if isinstance(layer, Recompute) else [None]


def grouped(layers: Sequence[Layer], stack: bool = True) -> list[Layer]:
    """The layers of a stage as they are called: those of a block in one Recompute, and if `stack`, neighbours in one
    where that is faster (mpiml.nn.base.stacked)."""
    called: list[Layer] = []
    for block, group in itertools.groupby(layers, key=lambda layer: layer.block):
        neighbours = list(group)
        inside = stacked(neighbours) if stack else neighbours
        called += inside if block is None else [_of_block(inside)]
    return called


def _of_block(layers: Sequence[Layer]) -> Recompute:
    block = Recompute(*layers)
    block.path, block.needs_dx = layers[0].path, layers[0].needs_dx
    return block


def _total(y: Array) -> bytes:
    """What tells outputs from others at the cost of one pass: the bits of their sum, which may be NaN."""
    total = np.add.reduce(y, axis=None) if isinstance(y, np.ndarray) else y.sum().cpu().numpy()
    return bytes(total.tobytes())
