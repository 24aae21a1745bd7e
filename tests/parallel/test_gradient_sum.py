"""The gradient sum on any number of ranks, against the same arithmetic done here, serially."""

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.nn.parameters import Layout
from mpiml.parallel import halving, slices
from mpiml.parallel.gradient_sum import LibrarySum, OrderedSum
from mpiml.vectors import BLOCK
from tests.parallel.sums import (
    WORLD,
    feed,
    has_the_bits_of_the_tree,
    is_real,
    layout_of,
    make,
    scattered,
    serial_sum,
)

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("free_sums")]
MICROBATCHES = [16, 24, 37]


def test_these_numbers_tell_orders_apart() -> None:
    layout = layout_of("small", "float64")
    parts = [scattered(layout, m) for m in range(16)]
    assert serial_sum(parts).tobytes() != np.add.reduce(np.stack(parts), axis=0).tobytes()


@pytest.mark.parametrize("where", ["private", "shared", "nodes"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("size", "microbatches"), [("tiny", 16), ("small", 16), ("small", 24), ("small", 37), ("large", 24)]
)
def test_ordered_sum_has_the_bits_of_the_tree(size: str, microbatches: int, dtype: str, where: str) -> None:
    layout = layout_of(size, dtype)
    sum_ = make(OrderedSum, layout, microbatches, where=where)
    assert all(has_the_bits_of_the_tree(sum_, layout, microbatches, step) for step in range(2))


@pytest.mark.parametrize("bucket", [0, 40_000])
@pytest.mark.parametrize("where", ["private", "shared", "nodes"])
@pytest.mark.parametrize(("microbatches", "leaf"), [(24, 2), (44, 4), (80, 5)])
def test_leaves_have_the_bits_of_runs(microbatches: int, leaf: int, where: str, bucket: int) -> None:
    layout = layout_of("small" if bucket == 0 else "large", "float32")
    sum_ = make(OrderedSum, layout, microbatches, where=where, bucket=bucket, leaf=leaf)
    assert all(has_the_bits_of_the_tree(sum_, layout, microbatches, step, 5_000, leaf) for step in range(2))


@pytest.mark.parametrize("bucket", [0, 40_000])
@pytest.mark.parametrize("where", ["private", "pairs"])
@pytest.mark.parametrize("size", ["tiny", "small", "large"])
def test_halving_has_the_bits_of_the_tree(size: str, where: str, bucket: int) -> None:
    """For several leaves on each rank, also when steps are dropped before or after their exchange."""
    each = 1 if where == "private" else 2
    if WORLD.size % each or WORLD.size == each:
        return
    leaf = 3 if size == "small" else 1
    layout, microbatches = layout_of(size, "float32"), 4 * WORLD.size // each * leaf
    sum_ = make(OrderedSum, layout, microbatches, where=where, bucket=bucket, halved=True, leaf=leaf)
    parts = [scattered(layout, m) for m in range(microbatches)]
    for start in (False, True):
        feed(sum_, parts, 5_000)
        if start:
            sum_.start()
        sum_.drop()
        assert has_the_bits_of_the_tree(sum_, layout, microbatches, start, 5_000, leaf)
    nodes = WORLD.size // each
    assert len(sum_.values.owners) <= halving.owners(nodes) * each
    before = sum_.values.sent
    assert has_the_bits_of_the_tree(sum_, layout, microbatches, 7, leaf=leaf)
    assert sum_.values.sent - before == sum(each.bytes for each in sum_.exchanges) + sum_.values._given


def test_a_stage_without_parameters() -> None:
    layout = Layout([], "float32")
    for kind in (OrderedSum, LibrarySum):
        sum_ = make(kind, layout, 16)
        feed(sum_, [layout.zeros()] * 16)
        sum_.start()
        sum_.publish()
        assert (sum_.values.pieces, sum_.values.held, sum_.values.vector.size) == ([], [], 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("microbatches", MICROBATCHES)
def test_library_sum_is_close(microbatches: int, dtype: str) -> None:
    layout = layout_of("small", dtype)
    sum_ = make(LibrarySum, layout, microbatches)
    good = []
    for step in range(2):
        parts = [scattered(layout, step, m) for m in range(microbatches)]
        feed(sum_, parts)
        sum_.start()
        slack = 40 * np.finfo(dtype).eps * sum(abs(part) for part in parts)
        for index, piece in enumerate(sum_.values.pieces):
            span, nowhere = slice(piece.start, piece.stop), np.empty(0)  # all of it is added already
            good.append((abs(sum_.total(index, nowhere) - serial_sum(parts)[span]) <= slack[span]).all())
        sum_.publish()
    assert all(good)


def test_long_vectors_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries of MPI 3 count the elements of a message in C's int."""
    monkeypatch.setattr(slices, "MESSAGE", 5000)
    layout = layout_of("large", "float64")
    comm = Short(WORLD)
    for kind in (OrderedSum, LibrarySum):
        sum_ = make(kind, layout, 24, comm)
        feed(sum_, [np.round(scattered(layout, m)) for m in range(24)])  # exact in any order
        sum_.start()
        for index, piece in enumerate(sum_.values.pieces):
            total = sum_.total(index, np.empty(piece.stop - piece.start))
            expected = sum(np.round(scattered(layout, m)) for m in range(24))[piece.start : piece.stop]
            assert total.tobytes() == (expected * is_real(layout)[piece.start : piece.stop]).tobytes()
        sum_.publish()


class Short(MPI.Intracomm):
    """A communicator of a library that takes no long messages."""

    def Iallreduce(self, sendbuf: Any, recvbuf: Any) -> MPI.Request:
        assert len(recvbuf) <= slices.MESSAGE
        return super().Iallreduce(sendbuf, recvbuf)

    def Send_init(self, buf: Any, *place: int) -> MPI.Prequest:
        assert len(buf) <= slices.MESSAGE + BLOCK
        return super().Send_init(buf, *place)
