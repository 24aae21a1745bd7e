"""Memory that a forward pass keeps for its backward pass, measured."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np

from mpiml.nn import base as nn
from mpiml.training.stages import StageDesign

ROWS = (8, 24)  # of two micro-batches: memory that does not depend on the rows cancels in their difference
ARRAYS = [tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)]  # NumPy's arrays alone: other threads allocate too


def bytes_of_a_row(stage: StageDesign, last: bool) -> float:
    """Bytes that a stage holds for each row of a micro-batch in flight: its input, what its layers keep, and on the
    last stage the gradient of the loss.

    Two forward passes are run on zeros, and what NumPy has allocated and not freed after each is counted. Memory that
    other libraries allocate is not counted.
    """
    stage.layout.bind(np.zeros(stage.layout.size, stage.layout.dtype))  # never written to: takes no memory
    _held(stage, ROWS[0])  # layers allocate here what they keep for good
    few, many = (_held(stage, rows) for rows in ROWS)
    row = (many - few) / (ROWS[1] - ROWS[0])
    return row + (math.prod(stage.y_shape) * stage.layout.dtype.itemsize if last else 0)


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
