"""Buckets change no bit, whatever the order of their messages, and arrive while later ones are computed."""

import random
import time
from collections.abc import Sequence
from typing import Any

import pytest
from mpi4py import MPI

from mpiml.parallel.gradient_sum import OrderedSum
from mpiml.parallel.values import TAGS
from tests.parallel.sums import (
    WORLD,
    feed,
    has_the_bits_of_the_tree,
    layout_of,
    make,
    scattered,
)

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("free_sums")]


@pytest.mark.parametrize("where", ["private", "shared", "nodes", "fenced"])
@pytest.mark.parametrize(
    ("size", "microbatches", "bucket"), [("tiny", 16, 1), ("small", 24, 1), ("small", 37, 30), ("large", 37, 60_000)]
)
def test_buckets_change_no_bit(size: str, microbatches: int, bucket: int, where: str) -> None:
    """Though ranks write at their own pace, some nothing before the end, and a step between is dropped."""
    layout = layout_of(size, "float32")
    sum_ = make(OrderedSum, layout, microbatches, where=where, bucket=bucket)
    good = []
    for step in range(4):
        stride = 0 if (step + WORLD.rank) % 4 == 3 else layout.size // 7 + 11 * WORLD.rank + 1
        good.append(has_the_bits_of_the_tree(sum_, layout, microbatches, step, stride))
        feed(sum_, [scattered(layout, 9)] * microbatches, stride)
        sum_.drop()
    sum_.free()
    assert all(good)


class AnyOrder(MPI.Prequest):
    """As MPI has it: "in some arbitrary order"."""

    @classmethod
    def Startall(cls, requests: Sequence[MPI.Prequest]) -> None:
        for request in random.sample(requests, len(requests)):
            request.Start()


@pytest.mark.parametrize("where", ["private", "nodes"])
@pytest.mark.parametrize(("size", "bucket"), [("small", 1), ("large", 60_000)])
def test_messages_may_start_in_any_order(monkeypatch: pytest.MonkeyPatch, size: str, bucket: int, where: str) -> None:
    layout = layout_of(size, "float32")
    sum_ = make(OrderedSum, layout, 24, where=where, bucket=bucket)
    random.seed(WORLD.rank)
    monkeypatch.setattr(MPI, "Prequest", AnyOrder)
    good = [has_the_bits_of_the_tree(sum_, layout, 24, step, layout.size // 7 + 1) for step in range(6)]
    assert all(good)


def test_tags_stay_below_what_the_library_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPI promises 32767; where buckets would need more, they are longer."""
    layout = layout_of("large", "float32")
    monkeypatch.setattr(MPI, "COMM_WORLD", Few(WORLD))
    sum_ = make(OrderedSum, layout, 24, Few(WORLD), bucket=1)
    assert len(sum_.exchanges) > (WORLD.size > 1)
    assert has_the_bits_of_the_tree(sum_, layout, 24, 0)


class Few(MPI.Intracomm):
    """A communicator of a library with few tags."""

    HIGHEST = 5 * TAGS  # tags of four buckets, and one more

    def Get_attr(self, keyval: int) -> int:
        return self.HIGHEST

    def Send_init(self, buf: Any, other: int, tag: int) -> MPI.Prequest:
        assert tag <= self.HIGHEST
        return super().Send_init(buf, other, tag)


def test_a_bucket_arrives_before_the_next_is_written() -> None:
    layout = layout_of("large", "float32")
    sum_ = make(OrderedSum, layout, WORLD.size, bucket=60_000)
    if WORLD.size == 1:
        assert sum_.complete is None  # nothing to send: backward need not tell
        return
    first = sum_.exchanges[0]
    start, stop = first.bucket.start, first.bucket.stop
    assert 0 < start < stop
    sum_.slots[0][start:] = 1.0
    sum_.complete(start)
    limit = time.monotonic() + 20
    while not MPI.Prequest.Testall(first.receives) and time.monotonic() < limit:
        sum_.complete(start)
    in_time = time.monotonic() < limit
    WORLD.Barrier()
    sum_.free()  # though the other buckets' receives wait for messages
    assert in_time
