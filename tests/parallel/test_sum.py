"""Tests of the gradient sum and the update on any number of ranks, against the same arithmetic done here, serially."""

import math
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml.clock import Clock
from mpiml.nn import optimizers
from mpiml.nn.parameters import Layout, Parameter, Statistic, constant
from mpiml.parallel import slices
from mpiml.parallel.gradient_sum import GradientSum, LibrarySum, OrderedSum
from mpiml.parallel.memory import FencedMemory, Memory, PrivateMemory, SharedMemory
from mpiml.parallel.tree import depth
from mpiml.parallel.update import Update
from mpiml.parallel.values import TAGS, Values
from mpiml.team import Team
from mpiml.vectors import BLOCK, Block, Operands, bytes_of

pytestmark = pytest.mark.mpi
WORLD = MPI.COMM_WORLD
Array = NDArray[np.floating]
# From fewer blocks than ranks, over padding after every parameter, to slices of several pieces.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "tiny": [(3,)],
    "small": [(5, 7), (7,), (7, 3), (3,)],
    "large": [(300, 500), (500,), (BLOCK + 1, 3), (3,)],
}
MICROBATCHES = [16, 24, 37]
ROWS = {1: 50, 2: 1, 3: 77}.__getitem__  # of a step
MADE: list[GradientSum] = []


@pytest.fixture(autouse=True)
def _free_sums() -> Iterator[None]:
    """Sums hold requests of the MPI library, which complains of those that are left at the end."""
    yield
    while MADE:
        sum_ = MADE.pop()
        sum_.free()
        sum_.values.free()


def layout_of(name: str, dtype: str) -> Layout:
    return Layout([Parameter(shape, constant(0.0)) for shape in SHAPES[name]], dtype)


def with_averages(name: str, dtype: str) -> Layout:
    """The same with statistics of two momenta between them."""
    made = [Parameter(shape, constant(0.0)) for shape in SHAPES[name]]
    made[1:1] = [Statistic((5,), constant(0.0), 0.1), Statistic((3,), constant(0.0), 0.3)]
    return Layout([*made, Statistic((4, 5), constant(0.0), 0.1)], dtype)


def pool() -> NDArray[np.float64]:
    """Numbers of very different sizes, whose sum depends on the order."""
    rng = np.random.default_rng(0)
    return rng.standard_normal(1 << 20) * 2.0 ** rng.integers(-12, 12, 1 << 20)


POOL = pool()


def scattered(layout: Layout, *key: int) -> Array:
    """A vector of numbers from the pool, other ones for every key; the padding is zero."""
    start = hash(key) % (len(POOL) - layout.size)
    return (POOL[start : start + layout.size] * is_real(layout)).astype(layout.dtype)


def is_real(layout: Layout) -> NDArray[np.bool_]:
    """Which elements belong to parameters."""
    mask = np.zeros(layout.size, bool)
    for block in layout.blocks():
        mask[block.start : block.stop] = True
    return mask


def tree(parts: Sequence[Array], low: int, size: int) -> Array:
    """The canonical sum by its definition: halves added up, a missing right half passes the left one up."""
    if size == 1:
        return parts[low]
    left, middle = tree(parts, low, size // 2), low + size // 2
    return left if middle >= len(parts) else left + tree(parts, middle, size // 2)


def serial_sum(parts: Sequence[Array]) -> Array:
    return tree(parts, 0, 1 << (len(parts) - 1).bit_length())


def feed(sum_: GradientSum, parts: Sequence[Array], stride: int = 0) -> None:
    """What a step's backward passes do; the last of them writes `stride` elements at a time, or all at once."""
    for index, m in enumerate(range(*sum_.plan.microbatches)):
        slot, last = sum_.slots[sum_.plan.slots[index]], m + 1 == sum_.plan.microbatches[1]
        if last and sum_.complete and stride:
            slot[...] = np.nan
            for start in reversed(range(0, len(slot), stride)):
                slot[start : start + stride] = parts[m][start : start + stride]
                sum_.complete(start)
        else:
            slot[...] = parts[m]
        sum_.accumulate(index)
    WORLD.Barrier()  # the step record is agreed on before the sum starts


def make(
    kind: type, layout: Layout, microbatches: int, comm: MPI.Intracomm = WORLD, where: str = "private", bucket: int = 0
) -> Any:
    """A sum whose ranks live on one node ("shared"), on nodes of three and fewer ("nodes"; "fenced": where stores may
    be reordered), or each by itself."""
    flat = (layout.size, layout.blocks(), layout.dtype)
    memory: Memory = PrivateMemory()
    if where != "private":
        at_once = comm.size if where == "shared" else 3
        local = comm.Split(comm.rank // at_once, comm.rank)
        each = bytes_of(layout.size, layout.dtype)
        shared = FencedMemory if where == "fenced" else SharedMemory
        memory = shared(local, depth(comm.rank, comm.size, microbatches) * each, each)
    if kind is LibrarySum:
        MADE.append(LibrarySum(comm, Values(MPI.COMM_SELF, memory, *flat), microbatches))
    else:
        MADE.append(OrderedSum(Values(comm, memory, *flat, bucket), microbatches))
    return MADE[-1]


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


def has_the_bits_of_the_tree(sum_: OrderedSum, layout: Layout, microbatches: int, step: int, stride: int = 0) -> bool:
    """Whether a step, in which nothing may be left of the one before, sums what it should, and all ranks get it."""
    good = []
    parts = [scattered(layout, step, m) for m in range(microbatches)]
    expected = serial_sum(parts)
    feed(sum_, parts, stride)
    sum_.start()
    for index, piece in enumerate(sum_.values.pieces):
        total = sum_.total(index, np.full(piece.stop - piece.start, np.nan, layout.dtype))
        good.append(total.tobytes() == expected[piece.start : piece.stop].tobytes())
        sum_.values.vector[piece.start : piece.stop] = total
    sum_.publish()
    return all(good) and sum_.values.vector.tobytes() == expected.tobytes()


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


class Serial:
    """The update on the whole vector at once: what any number of ranks must equal, bit for bit."""

    def __init__(self, optimizer: optimizers.Optimizer, blocks: list[Block], values: Array, clip: float):
        self.optimizer, self.blocks, self.values, self.clip = optimizer, blocks, values.copy(), clip
        self.states = {name: np.zeros_like(values) for name in optimizer.states}

    def step(self, total: Array, rate: float, weight: float, step: int) -> float:
        """One step; returns the norm of the mean gradient."""
        optimized = [block for block in self.blocks if block.momentum is None]
        squares = [np.add.reduce(total[b.start : b.stop].astype(np.float64) ** 2) for b in optimized]
        norm = math.sqrt(math.fsum(squares)) * (1 / weight)
        scale = 1 / weight
        if self.clip and norm > self.clip:
            scale *= self.clip / norm
        for block in self.blocks:
            span = slice(block.start, block.stop)
            if block.momentum is not None:
                self.values[span] += block.momentum * (total[span] * (1 / ROWS(step)) - self.values[span])
                continue
            grad, states = total[span].copy(), [state[span] for state in self.states.values()]
            scratch = np.empty_like(grad), np.empty_like(grad)
            self.optimizer.update(Operands(self.values[span], states, scratch, grad, block.decay), scale, rate, step)
        return norm


@pytest.mark.parametrize("clip", [0.0, 0.01, 1e9])
@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "adam", "adamw"])
@pytest.mark.parametrize("bucket", [0, 30])
def test_update_has_the_bits_of_a_serial_one(name: str, clip: float, bucket: int) -> None:
    """Of parameters and statistics, of which the optimizer, the clipping and the weight know nothing."""
    layout, microbatches, weight = with_averages("small", "float32"), 37, 101.0
    sum_ = make(OrderedSum, layout, microbatches, bucket=bucket)
    optimizer = optimizers.build(name, 0.9, 0.1)
    update = Update(Team(WORLD, Clock()), WORLD.rank, sum_, optimizer, clip, ROWS)
    serial = Serial(optimizer, layout.blocks(), scattered(layout, 99), clip)
    sum_.values.vector[...] = serial.values
    good = []
    for step, measure in enumerate([True, False, True], start=1):
        parts = [scattered(layout, step, m) for m in range(microbatches)]
        expected = serial.step(serial_sum(parts), 0.1, weight, step)
        feed(sum_, parts)
        norm = update.step(0.1, weight, step, measure)
        good.append(norm == (expected if measure or clip else None))
        good.append(sum_.values.vector.tobytes() == serial.values.tobytes())
        for key, state in update.states.items():
            held = [serial.states[key][start:stop].tobytes() for start, stop in sum_.values.held]
            good.append(state.tobytes() == b"".join(held))
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


@pytest.mark.parametrize("kind", [OrderedSum, LibrarySum])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_norm_is_over_all_stages(kind: type, stages: int) -> None:
    if WORLD.size % stages:
        return
    stage = WORLD.rank % stages
    layouts = [with_averages("large" if s % 2 else "small", "float64") for s in range(stages)]
    comm = WORLD.Split(stage, WORLD.rank)
    sum_ = make(kind, layouts[stage], 16, comm)
    parts = [[np.round(scattered(layout, m)) for m in range(16)] for layout in layouts]  # exact in any order
    update = Update(Team(WORLD, Clock()), comm.rank, sum_, optimizers.build("sgd", 0.0, 0.0), 0.0, ROWS)
    feed(sum_, parts[stage])
    norm = update.step(0.1, 3.0, 1, True)
    totals = [serial_sum(of_stage) for of_stage in parts]
    squares = [
        np.add.reduce(total[b.start : b.stop] ** 2)
        for layout, total in zip(layouts, totals, strict=True)
        for b in layout.blocks()
        if b.momentum is None
    ]
    comm.Free()
    assert norm == math.sqrt(math.fsum(squares)) * (1 / 3.0)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    layout = layout_of("small", "float32")
    sum_ = make(OrderedSum, layout, 16)
    update = Update(Team(WORLD, Clock()), WORLD.rank, sum_, optimizers.build("adam", 0.0, 0.0), 1.0, ROWS)
    sum_.values.vector[...] = before = scattered(layout, 1)
    parts = [scattered(layout, m) for m in range(16)]
    parts[11][0] = bad
    feed(sum_, parts)
    norm = update.step(0.1, 1.0, 1, False)
    assert norm is not None
    assert not math.isfinite(norm)
    assert sum_.values.vector.tobytes() == before.tobytes()
    assert all(not state.any() for state in update.states.values())


def test_values_that_are_not_finite_are_noticed() -> None:
    layout = layout_of("small", "float32")
    sum_ = make(OrderedSum, layout, 16)
    update = Update(Team(WORLD, Clock()), WORLD.rank, sum_, optimizers.build("sgd", 0.0, 0.0), 0.0, ROWS)
    parts = [scattered(layout, m) for m in range(16)]
    good = []
    for step, bad in enumerate([1.0, math.inf], start=1):
        parts[5][0] = bad
        feed(sum_, parts)
        update.step(0.1, 1.0, step, False)
        good.append(WORLD.allreduce(update.finite, MPI.LAND) == math.isfinite(bad))
    assert all(good)


@pytest.mark.parametrize("bucket", [0, 30])
def test_a_batch_of_weight_zero_changes_nothing(bucket: int) -> None:
    layout = with_averages("small", "float32")
    sum_ = make(OrderedSum, layout, 16, bucket=bucket)
    update = Update(Team(WORLD, Clock()), WORLD.rank, sum_, optimizers.build("sgd", 0.0, 0.0), 0.0, ROWS)
    sum_.values.vector[...] = before = scattered(layout, 1)
    feed(sum_, [layout.zeros()] * 16, 20)
    assert update.step(0.1, 0.0, 1, True) == 0.0
    assert sum_.values.vector.tobytes() == before.tobytes()
    sum_.values.vector.fill(0)
    assert has_the_bits_of_the_tree(sum_, layout, 16, 2, 20)
