"""The rows of a step are as many as its micro-batches have."""

import pytest

from mpiml.data.order import RowOrder
from tests.data.test_shards import every_case


@every_case
@pytest.mark.parametrize("strided", [False, True])
def test_the_rows_of_a_step_are_counted_without_going_through_its_micro_batches(
    rows: int, microbatches: int, batch: int, strided: bool
) -> None:
    of = RowOrder(rows, microbatches, batch, 0, strided=strided)
    for step in range(1, of.steps_per_epoch + 3):
        for first, last in ((0, microbatches), (microbatches // 3, microbatches // 2 + 1), (0, 0)):
            assert of.total(step, first, last) == sum(of.size(step, m) for m in range(first, last))
