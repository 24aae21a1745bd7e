"""Messages between stages: as long as they must be, or refused on the rank that gets them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.clock import Clock
from mpiml.parallel.stage import Computation, Stage

pytestmark = pytest.mark.mpi
WORLD = MPI.COMM_WORLD


class Rows:
    """Three rows of four numbers."""

    index, rows = 0, 3

    def x(self) -> Any:
        return np.ones((3, 4), np.float32)

    def y(self) -> Any:
        return np.zeros(3, int)

    def w(self) -> None:
        return None


@pytest.mark.parametrize("columns", [4, 2, 0])
def test_a_message_that_is_too_short_is_refused(columns: int) -> None:
    """Its array would be memory that nobody has written to."""
    if WORLD.size < 2:
        return
    pair = WORLD.Split(WORLD.rank // 2, WORLD.rank)
    if pair.size == 2:
        computation = Computation(
            forward=lambda x, at: (x[:, :columns] if pair.rank == 0 else x, lambda dy, grads: None),
            at=lambda *place: None,
            objective=lambda y, labels, weights, measured, at: ([float(y.sum()), 3.0], y),
            x_shape=(4,),
            y_shape=(4,),
            dtype=np.float32,
            learns=False,
            learned=False,
        )
        record = np.zeros((1, 2))
        if pair.rank == 1 and columns < 4:
            with pytest.raises(ValueError, match=rf"stage 0 sent {3 * columns} values, but 12 are needed"):
                Stage(pair, computation, Clock()).evaluate([(Rows(), record[0])])
        else:
            Stage(pair, computation, Clock()).evaluate([(Rows(), record[0])])
            assert record.tolist() == [[12.0, 3.0] if pair.rank == 1 else [0.0, 0.0]]
    pair.Free()
