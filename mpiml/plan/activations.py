"""Memory that a forward pass keeps for its backward pass; of models of mpiml's own layers without running one."""

from __future__ import annotations

import gc
import math
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from mpiml import vectors
from mpiml.nn import base as nn
from mpiml.nn import layers as kinds
from mpiml.nn.parameters import Layout, Shape
from mpiml.nn.recompute import grouped
from mpiml.training.stages import StageDesign

if TYPE_CHECKING:
    from mpiml.plan.torch_memory import Allocated

ROWS = (8, 24)  # of two micro-batches: memory that does not depend on the rows cancels in their difference
ARRAYS = [tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)]  # NumPy's arrays alone: other threads allocate too
IDS = np.dtype(np.intp)
NORMS = kinds.LayerNorm, kinds.RMSNorm, kinds.GroupNorm, kinds.BatchNorm2d


class RowBytes(NamedTuple):
    """Bytes that a stage holds for each row of a micro-batch in flight, of one that waits for W, and of the one of
    which the largest block is computed again."""

    in_flight: float
    waiting: float
    again: float = 0.0


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
    kinds.Recompute: X,
}


def of_a_row(stage: StageDesign, last: bool, stack: bool = False) -> RowBytes:
    """What a stage holds of a row; it is the last stage, or not. `stack`: neighbouring PyTorch modules are called as
    one layer."""
    item, layers = stage.layout.dtype.itemsize, grouped(stage.layers, stack)
    again = 0.0
    for layer, shape in zip(layers, nn.stack_shapes(layers, stage.x_shape), strict=False):
        if isinstance(layer, kinds.Recompute):
            whole = _bytes_kept(layer.layers, shape, layer.needs_dx, stage.layout)
            again = max(again, whole - math.prod(shape) * item)  # beside its inputs, which are kept anyway
    return RowBytes(bytes_of_a_row(stage, last, stack), bytes_that_wait(stage.layers, stage.x_shape, item), again)


def bytes_that_wait(layers: Sequence[nn.Layer], shape: Shape, item: int) -> int:
    """Bytes that layers hold for a row from I to W: what gradients by weights are made of, a layer's inputs and the
    gradient by its outputs; of normalisations, which add these up at once, nothing that grows with the rows. An array
    that two layers hold counts twice."""
    shapes, total = nn.stack_shapes(layers, shape), 0
    for layer, before, after in zip(layers, shapes, shapes[1:], strict=False):
        if isinstance(layer, kinds.Residual):
            total += bytes_that_wait(layer.layers, before, item)
        elif isinstance(layer, kinds.CausalSelfAttention):
            total += sum(bytes_that_wait([one], before, item) for one in layer.inner())
        elif isinstance(layer, kinds.Embedding):
            total += math.prod(before) * IDS.itemsize + math.prod(after) * item
        elif isinstance(layer, kinds.PositionalEmbedding):
            total += math.prod(after) * item
        elif layer.own_parameters() and not isinstance(layer, NORMS):
            total += (math.prod(before) + math.prod(after)) * item
    return total


def bytes_of_a_row(stage: StageDesign, last: bool, stack: bool = False) -> float:
    """Bytes that a stage holds for each row of a micro-batch in flight: its input, what its layers keep, and on the
    last stage the gradient of the loss. Measured if it has other layers than those in KEEPS, else worked out."""
    row = _bytes_kept(grouped(stage.layers, stack), stage.x_shape, stage.learned, stage.layout)
    return row + (math.prod(stage.y_shape) * stage.layout.dtype.itemsize if last else 0)


def _bytes_kept(layers: list[nn.Layer], shape: Shape, learned: bool, layout: Layout) -> float:
    """The same of some layers of a stage, without the loss."""
    if not all(type(layer) in KEEPS for layer in nn.everything(layers)):
        return _measured(layers, shape, learned, layout)
    kept: dict[object, int] = {}
    _pass(layers, object(), shape, learned, layout.dtype.itemsize, kept)
    return sum(kept.values())


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


def _measured(layers: list[nn.Layer], shape: Shape, learned: bool, layout: Layout) -> float:
    """The same measured: two forward passes are run on zeros, and what NumPy and PyTorch have allocated and not freed
    after each is counted. Memory that other libraries allocate is not counted."""
    layout.bind(np.zeros(layout.size, layout.dtype))  # never written to: takes no memory
    _held(layers, shape, learned, layout.dtype, ROWS[0])  # layers allocate here what they keep for good
    few, many = (_held(layers, shape, learned, layout.dtype, rows) for rows in ROWS)
    return (many - few) / (ROWS[1] - ROWS[0])


def _held(layers: list[nn.Layer], shape: Shape, learned: bool, dtype: DTypeLike, rows: int) -> int:
    """Bytes of arrays and tensors that a forward pass of `rows` rows leaves allocated."""
    tracemalloc.start()
    try:
        with np.errstate(all="ignore"), _tensors() as tensors:
            # On a boundary of memory, so that no layer copies it to one.
            x = vectors.zeros(rows * math.prod(shape), dtype).reshape(rows, *shape)
            backward = nn.forward(layers, x, nn.At(training=True, step=1), learned=learned)[1]
        del x
        gc.collect()  # what a pass leaves in cycles
        held, of_tensors = tracemalloc.take_snapshot(), tensors.held if tensors else 0
        del backward
        return of_tensors + sum(trace.size for trace in held.filter_traces(ARRAYS).traces)
    finally:
        tracemalloc.stop()


def _tensors() -> AbstractContextManager[Allocated | None]:
    """What notes PyTorch's tensors, if the program has any."""
    if "torch" not in sys.modules:
        return nullcontext()
    from mpiml.plan import torch_memory

    return torch_memory.Allocated()
