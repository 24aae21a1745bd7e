"""What backward passes need, measured: the memory that a forward pass leaves in use."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np

from mpiml.nn import base as nn
from mpiml.training.stages import StageDesign

ROWS = (8, 24)  # of two micro-batches: what both hold alike is of no layer
ARRAYS = [tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)]  # objects that other threads make are no array


def bytes_of_a_row(stage: StageDesign, last: bool) -> float:
    """Bytes that a stage holds for each row of a micro-batch in flight, its input included, and on the last stage the
    gradient of the loss.

    A forward pass of a few rows is run, with parameters of zero, and what NumPy has allocated and not freed after it
    is counted; memory that other libraries allocate is not seen.
    """
    stage.layout.bind(np.zeros(stage.layout.size, stage.layout.dtype))  # never written, so no memory either
    _held(stage, ROWS[0])  # what layers make once and keep is made now
    few, many = (_held(stage, rows) for rows in ROWS)
    row = (many - few) / (ROWS[1] - ROWS[0])
    return row + (math.prod(stage.y_shape) * stage.layout.dtype.itemsize if last else 0)


def _held(stage: StageDesign, rows: int) -> int:
    tracemalloc.start()
    try:
        with np.errstate(all="ignore"):
            x = np.zeros((rows, *stage.x_shape), stage.layout.dtype)
            backward = nn.forward(stage.layers, x, nn.At(training=True, step=1))[1]
        del x
        held = tracemalloc.take_snapshot()
        del backward
        return sum(trace.size for trace in held.filter_traces(ARRAYS).traces)
    finally:
        tracemalloc.stop()
