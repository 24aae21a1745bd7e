"""Memory that a forward pass keeps for its backward pass; of models of mpiml's own layers without running one."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpiml.nn import base as nn
from mpiml.nn import layers as kinds
from mpiml.nn.parameters import Shape
from mpiml.training.stages import StageDesign

ROWS = (8, 24)  # of two micro-batches: memory that does not depend on the rows cancels in their difference
ARRAYS = [tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)]  # NumPy's arrays alone: other threads allocate too
IDS = np.dtype(np.intp)


@dataclass(frozen=True)
class Keeps:
    """What a kind of layer keeps of each row: its input x, its output y, and `more` numbers of a layer for rows of a
    shape. If `view`, y is a view of x; `ids`, more are integers."""

    x: bool = False
    y: bool = False
    more: Callable[[Any, Shape], int] = lambda layer, shape: 0
    view: Callable[[Any], bool] = lambda layer: False
    ids: bool = False


def _normal(layer: kinds.LayerNorm | kinds.RMSNorm, shape: Shape) -> int:
    return math.prod(shape) + math.prod(shape[:-1])


def _attention(layer: kinds.CausalSelfAttention, shape: Shape) -> int:
    """Q, K and V, the attended values, and a number for each head and position."""
    return 4 * math.prod(shape) + layer.heads * shape[0]


X, Y = Keeps(x=True), Keeps(y=True)
SLOPE = Keeps(more=lambda layer, shape: math.prod(shape))
VIEW = Keeps(x=True, view=lambda layer: True)
# By the very class: a class derived from one of these may compute otherwise. A test compares each with a measurement.
KEEPS: dict[type[nn.Layer], Keeps] = {
    kinds.Linear: X,
    kinds.Conv2d: X,
    kinds.BatchNorm2d: X,
    kinds.AvgPool2d: X,
    kinds.GlobalAvgPool: X,
    kinds.MaxPool2d: Keeps(x=True, y=True),
    kinds.ReLU: Y,
    kinds.Tanh: Y,
    kinds.GELU: SLOPE,
    kinds.SiLU: SLOPE,
    kinds.Flatten: VIEW,
    kinds.Reshape: VIEW,
    kinds.Dropout: Keeps(
        more=lambda layer, shape: math.prod(shape) * (layer.rate > 0), view=lambda layer: not layer.rate
    ),
    kinds.LayerNorm: Keeps(x=True, more=_normal),
    kinds.RMSNorm: Keeps(x=True, more=_normal),
    kinds.GroupNorm: Keeps(x=True, more=lambda layer, shape: math.prod(shape) + layer.channels),
    kinds.CausalSelfAttention: Keeps(x=True, more=_attention),
    kinds.Embedding: Keeps(more=lambda layer, shape: math.prod(shape), ids=True),
    kinds.PositionalEmbedding: Keeps(),
    kinds.Residual: Keeps(),  # what the layers inside it keep
}


def bytes_of_a_row(stage: StageDesign, last: bool) -> float:
    """Bytes that a stage holds for each row of a micro-batch in flight: its input, what its layers keep, and on the
    last stage the gradient of the loss. Measured if it has other layers than those in KEEPS, else worked out."""
    item = stage.layout.dtype.itemsize
    if all(type(layer) in KEEPS for layer in nn.everything(stage.layers)):
        kept: dict[object, int] = {}
        _pass(stage.layers, object(), stage.x_shape, stage.learned, item, kept)
        row: float = sum(kept.values())
    else:
        row = _measured(stage)
    return row + (math.prod(stage.y_shape) * item if last else 0)


def _pass(layers: list[nn.Layer], x: object, shape: Shape, learned: bool, item: int, kept: dict[object, int]) -> None:
    """Enter into `kept` the bytes of all that layers keep when they are called one after the other (nn.base.forward),
    the first one with the array x: of rows of `shape`, `item` bytes each number."""
    needed, shapes = learned, nn.stack_shapes(layers, shape)
    for layer, before, after in zip(layers, shapes, shapes[1:], strict=False):
        needed = needed or layer.needs_dx or nn.updated([layer])
        of_layer: dict[object, int] = kept if needed else {}
        keeps = KEEPS[type(layer)]
        y = x if keeps.view(layer) else object()
        if isinstance(layer, kinds.Residual):
            _pass(layer.layers, x, before, False, item, of_layer)
        of_layer |= {x: math.prod(before) * item} if keeps.x else {}
        of_layer |= {y: math.prod(after) * item} if keeps.y else {}
        of_layer[layer] = keeps.more(layer, before) * (IDS.itemsize if keeps.ids else item)
        x = y


def _measured(stage: StageDesign) -> float:
    """The same measured: two forward passes are run on zeros, and what NumPy has allocated and not freed after each is
    counted. Memory that other libraries allocate is not counted."""
    stage.layout.bind(np.zeros(stage.layout.size, stage.layout.dtype))  # never written to: takes no memory
    _held(stage, ROWS[0])  # layers allocate here what they keep for good
    few, many = (_held(stage, rows) for rows in ROWS)
    return (many - few) / (ROWS[1] - ROWS[0])


def _held(stage: StageDesign, rows: int) -> int:
    """Bytes of arrays that a forward pass of `rows` rows leaves allocated."""
    tracemalloc.start()
    try:
        with np.errstate(all="ignore"):
            x = np.zeros((rows, *stage.x_shape), stage.layout.dtype)
            backward = nn.forward(stage.layers, x, nn.At(training=True, step=1), learned=stage.learned)[1]
        del x
        held = tracemalloc.take_snapshot()
        del backward
        return sum(trace.size for trace in held.filter_traces(ARRAYS).traces)
    finally:
        tracemalloc.stop()
