"""The sum of arrays over micro-batches: its bits, what it takes and gives, and what it refuses."""

from __future__ import annotations

import os
import re
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.errors import ConfigError, NotFiniteError, RunError
from mpiml.loop.guard import clock, guard
from mpiml.loop.rows import Rows
from mpiml.loop.sums import Sum
from tests.parallel.sums import serial_sum

WORLD = MPI.COMM_WORLD
SELF = MPI.COMM_SELF
LAST = WORLD.size - 1
Pair = namedtuple("Pair", "left right")
needs_others = pytest.mark.skipif(WORLD.size == 1, reason="needs other ranks")


@pytest.fixture
def made() -> Iterator[Callable[..., Sum]]:
    """Makes sums, and closes them."""
    sums: list[Sum] = []

    def make(*arguments: Any, **settings: Any) -> Sum:
        sums.append(Sum(*arguments, **settings))
        return sums[-1]

    yield make
    for one in sums:
        one.close()


def gradients(m: int, step: int = 1) -> dict[str, Any]:
    """Arrays of all kinds whose sum depends on the order, in a nested tree."""
    random = np.random.default_rng((m, step))
    scattered = lambda *shape: random.standard_normal(shape) * 2.0 ** random.integers(-12, 12, shape)  # noqa: E731
    return {
        "w": scattered(300, 170).astype(np.float32),
        "layers": [{"b": scattered(7)}, Pair(scattered(3, 0), (scattered().astype(np.float32)[()],))],
        "loss": float(scattered()),
    }


def flat(tree: dict[str, Any]) -> list[Any]:
    """Its arrays."""
    pair = tree["layers"][1]
    return [tree["w"], tree["layers"][0]["b"], pair.left, pair.right[0], tree["loss"]]


def serial(microbatches: int, weights: list[int], step: int) -> list[Any]:
    """The sum of `gradients`, by the definition of the tree."""
    parts = [flat(gradients(m, step)) for m in range(microbatches)]
    weighted = [[np.asarray(a) * np.asarray(a).dtype.type(w) for a in p] for p, w in zip(parts, weights, strict=True)]
    return [serial_sum(leaves) for leaves in zip(*weighted, strict=True)]


def assert_same(ours: Any, theirs: list[Any]) -> None:
    for one, other in zip(flat(ours), theirs, strict=True):
        np.testing.assert_array_equal(one, other, strict=isinstance(one, np.ndarray))


def feed(one: Sum, weights: list[int], step: int) -> None:
    for m in one.own:
        one.put(m, gradients(m, step), weight=weights[m])


@pytest.mark.mpi
@pytest.mark.parametrize("where", ["private", "auto", "nodes", "nodes private"])
@pytest.mark.parametrize("microbatches", [max(4, WORLD.size), 11 + WORLD.size])
def test_sums_have_the_bits_of_the_tree(
    made: Callable[..., Sum], monkeypatch: pytest.MonkeyPatch, where: str, microbatches: int
) -> None:
    """Of two dtypes, on one node or two, several steps."""
    if "nodes" in where and WORLD.size > 1:
        monkeypatch.setenv("MPIML_NODES", f"{WORLD.size - WORLD.size // 2},{WORLD.size // 2}")
    weights = [m % 4 for m in range(microbatches)]
    one = made(like=gradients(0), microbatches=microbatches, memory="private" if "private" in where else "auto")
    assert one.own == Rows(99, 40, microbatches).own
    for step in range(4):
        feed(one, weights, step)
        total = one.sum() if step % 2 else one.mean()
        expected = serial(microbatches, weights, step)
        scale = 1.0 if step % 2 else 1.0 / sum(weights)
        assert_same(total, [leaf * scale for leaf in expected])
        assert one.weight == sum(weights)
        assert type(total["loss"]) is float
        assert isinstance(total["layers"][1], Pair)


@pytest.mark.mpi
def test_without_copies(made: Callable[..., Sum]) -> None:
    """Slots to write into, and a total that holds until the next sum, also while slots are written."""
    one = made(like=gradients(0), microbatches=2 * WORLD.size + 1)
    ones = [1] * one.microbatches
    for step in range(3):
        for m, slot in zip(one.own, one.slots, strict=True):
            for place, array in zip(flat(slot), flat(gradients(m, step)), strict=True):
                place[...] = array
            one.put(m)
        total = one.sum(copy=False)
        assert_same(total, serial(one.microbatches, ones, step))
        with pytest.raises(ValueError, match="read-only"):
            total["w"][0] = 1
        WORLD.Barrier()
        for slot in one.slots.trees:
            slot["w"][...] = np.nan
        WORLD.Barrier()
        assert_same(total, serial(one.microbatches, ones, step))


def test_a_slot_can_be_had_when_its_micro_batch_comes_next(made: Callable[..., Sum]) -> None:
    """Slots share memory: what is written into a later one too early would be summed as part of another."""
    one = made(SELF, like=0.0, microbatches=4)
    assert len(one.slots) == 4
    for index in (1, 3, -1):
        text = f"slots[{index}] is for micro-batch {index % 4}: rank 0 has micro-batches 0 to 3, and 0 comes next"
        with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
            one.slots[index]
    for outside in (4, -5, "w"):
        with pytest.raises(ConfigError, match=re.escape(f"slots[{outside!r}]: there are 4, one for each micro-batch")):
            one.slots[outside]  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"slots\[1\]"):
        list(one.slots)
    for m, slot in zip(one.own, one.slots, strict=True):
        slot[...] = 10.0**m
        one.put(m)
    with pytest.raises(ConfigError, match=r"slots\[0\] .* has put all"):
        one.slots[0]
    assert one.sum() == 1111


def test_what_is_put_into_the_tree_of_a_slot_is_taken(made: Callable[..., Sum]) -> None:
    """`slots[0]["w"] = array` is as good as `slots[0]["w"][...] = array`."""
    one = made(SELF, like={"w": np.zeros(3), "b": 0.0})
    one.slots[0]["w"], one.slots[0]["b"] = np.array([1.0, 2.0, 3.0]), 4
    one.put(0, weight=2)
    total = one.sum()
    assert (total["w"].tolist(), total["b"]) == ([2.0, 4.0, 6.0], 8.0)
    one.slots[0]["c"] = 1.0
    with pytest.raises(ConfigError, match=re.escape("put(m=0): the slot has 3 arrays, but `like` had 2")):
        one.put(0)


def test_arrays_of_every_kind(made: Callable[..., Sum]) -> None:
    like = np.zeros((3, 4))
    a = np.arange(12.0).reshape(3, 4)
    read_only = a.copy()
    read_only.flags.writeable = False

    class Converted:
        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            return a

    class Exchanged:
        def __dlpack__(self, **_: Any) -> Any:
            return a.__dlpack__()

        def __dlpack_device__(self) -> Any:
            return a.__dlpack_device__()

    kinds = [
        np.asfortranarray(a),
        np.repeat(a, 2, axis=1)[:, ::2],
        a[::-1][::-1],
        a.astype(">f8"),
        a.astype(np.float32),
        a.astype(np.int32),
        read_only,
        Converted(),
        Exchanged(),
    ]
    one = made(SELF, like=like.astype(">f8"))
    for kind in kinds:
        one.put(0, kind, weight=3)
        total = one.mean()
        np.testing.assert_array_equal(total, a, strict=True)
        total += 1  # an array of one's own
        assert total.flags.owndata


def test_tensors_that_autograd_follows(made: Callable[..., Sum]) -> None:
    torch = pytest.importorskip("torch")
    one = made(SELF, like=[torch.ones(2, 3, requires_grad=True)])
    one.put(0, [torch.full((2, 3), 2.0, requires_grad=True)])
    (total,) = one.mean()
    assert (total.dtype, total.tolist()) == (np.float32, [[2.0] * 3] * 2)
    with pytest.raises(ConfigError, match="no NumPy array can be made of a Tensor"):
        one.put(0, [torch.ones(2, 3, device="meta")])
    with pytest.raises(ConfigError, match=re.escape(".float() may help")):
        one.put(0, [torch.ones(2, 3, dtype=torch.bfloat16)])


def test_what_is_put_may_be_a_total_or_a_slot(made: Callable[..., Sum]) -> None:
    one = made(SELF, like=np.zeros(3), microbatches=2)
    one.put(0, np.ones(3))
    one.put(1, np.ones(3))
    total = one.sum(copy=False)
    one.put(0, total)
    one.put(1, total, weight=0.5)
    np.testing.assert_array_equal(one.sum(), [3.0] * 3)
    one.slots[0][:] = 1
    one.put(0, one.slots[0])
    one.put(1, one.slots.trees[0])
    np.testing.assert_array_equal(one.sum(), [2.0] * 3)


def test_arrays_on_a_device(made: Callable[..., Sum]) -> None:
    """Though NumPy can read them: JAX copies them from there."""

    class OnDevice:
        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            return np.zeros(3)

        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

    one = made(SELF, like=np.zeros(3))
    said = "no NumPy array can be made of a OnDevice (it lies in the memory of a device, such as a GPU)"
    with pytest.raises(ConfigError, match=re.escape(f"put(m=0): the array: {said}")):
        one.put(0, OnDevice())
    with pytest.raises(ConfigError, match=re.escape(f"the array: {said}")):
        Sum(SELF, like=OnDevice())


def test_weight_0_counts_for_nothing(made: Callable[..., Sum]) -> None:
    """Not even the mean of no rows, which is not a number; and a mean of nothing is 0."""
    one = made(SELF, like=np.zeros(3), microbatches=2)
    one.put(0, np.full(3, np.nan), weight=0)
    one.put(1, np.ones(3), weight=4)
    np.testing.assert_array_equal(one.mean(), np.ones(3))
    for m, slot in enumerate(one.slots):
        slot[:] = np.inf
        one.put(m, weight=0)
    np.testing.assert_array_equal(one.mean(), np.zeros(3))
    assert one.weight == 0


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "heavy", "3", None, np.ones(2)])
def test_weights_that_are_refused(made: Callable[..., Sum], weight: Any) -> None:
    one = made(SELF, like=np.zeros(3))
    with pytest.raises(ConfigError, match=r"put\(m=0\): weight .*: must be a number, 0 or more"):
        one.put(0, np.ones(3), weight=weight)
    for loss in ("low", "3"):
        with pytest.raises(ConfigError, match=rf"put\(m=0\): loss '{loss}': must be a number"):
            one.put(0, np.ones(3), loss=loss)  # type: ignore[arg-type]
    one.put(0, np.ones(3), weight=np.float32(2))
    np.testing.assert_array_equal(one.sum(), [2.0] * 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"w": np.zeros(4), "b": 0.0}, "put(m=0): w is float64 (4,), but float64 (3,) in `like`"),
        ({"w": np.zeros(3, complex), "b": 0.0}, "put(m=0): w is complex128 (3,), but float64 (3,) in `like`"),
        ({"w": np.zeros(3), "b": np.zeros(1)}, "put(m=0): b is float64 (1,), but float64 () in `like`"),
        ({"w": np.zeros(3), "b": None}, "put(m=0): b is NoneType, but float64 () in `like`"),
        ({"w": np.zeros(3)}, "put(m=0): the arrays have another form than `like`: b is missing"),
        (
            {"w": np.zeros(3), "b": 0.0, "c": 0.0},
            "put(m=0): the arrays have another form than `like`: c is not in `like`",
        ),
        (
            np.zeros(3),
            "put(m=0): the arrays have another form than `like`: the array is not in `like`, b is missing, "
            "w is missing",
        ),
    ],
)
def test_arrays_of_another_form(made: Callable[..., Sum], given: Any, message: str) -> None:
    one = made(SELF, like={"w": np.zeros(3), "b": 0.0})
    with pytest.raises(ConfigError) as error:
        one.put(0, given)
    assert str(error.value) == message
    one.put(0, {"b": 1, "w": np.ones(3)})  # in any order
    assert one.sum()["b"] == 1


def test_numbers_of_ones_own_go_where_one_number_is_summed(made: Callable[..., Sum]) -> None:
    one = made(SELF, like=[np.float32(0), np.zeros((), np.float64), 0])
    one.put(0, [1.5, np.float32(2.5), True])
    total = one.sum()
    assert [type(value) for value in total] == [np.ndarray, np.ndarray, float]
    assert [float(value) for value in total] == [1.5, 2.5, 1.0]


@pytest.mark.mpi
def test_micro_batches_come_once_each_and_in_order(made: Callable[..., Sum]) -> None:
    one = made(like=0.0, microbatches=2 * WORLD.size)
    first, second = one.own
    own = f"rank {WORLD.rank} has micro-batches {first} to {second}"
    for wrong in (second, first - 1, "first", None):
        with pytest.raises(ConfigError, match=re.escape(f"put(m={wrong!r}): {own}, and {first} comes next")):
            one.put(wrong, 1.0)  # type: ignore[arg-type]
    one.put(first, 1.0)
    with pytest.raises(ConfigError, match=re.escape(f"put(m={first}): {own}, and {second} comes next")):
        one.put(first, 1.0)
    with pytest.raises(ConfigError, match=re.escape(f"mean() is asked for: {own}, and {second} comes next")):
        one.mean()
    one.put(float(second), 1.0)  # type: ignore[arg-type]
    done = f"rank {WORLD.rank} has put all of its micro-batches {first} to {second}; mean() or sum() come next"
    with pytest.raises(ConfigError, match=re.escape(f"put(m={second}): {done}")):
        one.put(second, 1.0)
    assert one.sum() == 2 * WORLD.size


@pytest.mark.mpi
@pytest.mark.parametrize("nodes", [False, True])
@pytest.mark.parametrize("kind", [np.nan, np.inf])
def test_who_has_put_what_is_not_finite(
    made: Callable[..., Sum], monkeypatch: pytest.MonkeyPatch, nodes: bool, kind: float
) -> None:
    """All ranks raise it alike, and may go on."""
    if nodes:
        monkeypatch.setenv("MPIML_NODES", ",".join("1" * WORLD.size))
    with guard(stall_timeout=0):
        rows = Rows(99, 20, WORLD.size + 1)
        one = made(like={"a": np.zeros(40_000, np.float32), "b": 0.0}, microbatches=WORLD.size + 1)
        for m, _ in rows.mine(7):
            one.put(m, {"a": np.ones(40_000, np.float32), "b": kind if m == WORLD.size else 0.0} if m else one.slots[0])
        first, last = (WORLD.allgather(one.own))[-1][0], WORLD.size
        own = f"micro-batches {first} to {last}" if first < last else f"micro-batch {last}"
        said = f"the sum of b is not finite in step 7: rank {LAST} has put such numbers into b, in {own}"
        with pytest.raises(NotFiniteError, match=f"^{said}$") as error:
            one.mean()
        assert (error.value.everywhere, error.value.rank) == (True, LAST)
        for m in one.own:
            one.put(m, {"a": np.ones(40_000, np.float32), "b": 1})
        assert one.sum()["b"] == WORLD.size + 1


@pytest.mark.mpi
def test_a_sum_that_is_too_large(made: Callable[..., Sum]) -> None:
    clock().step = 0
    one = made(like=[np.zeros(3, np.float32)], microbatches=2 * WORLD.size)
    for m in one.own:
        one.put(m, [np.full(3, 3e38 if m in (0, one.microbatches - 1) else 0, np.float32)])
    what = "the sum of 0 is not finite"
    with pytest.raises(NotFiniteError, match=what) as error:
        one.sum()
    if WORLD.size > 1:
        assert str(error.value) == f"{what}: all that was put is, but it is too large to be added up"
    infinite = made(like=0.0, finite=False)
    infinite.put(WORLD.rank, np.inf)
    assert infinite.sum() == np.inf


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"like": []}, "like: has 0 arrays"),
        ({}, "like is None: must be an array or a number, or lists, tuples and dicts of such"),
        ({"like": np.zeros(3, int)}, "the array: is int64, but"),
        ({"like": {"w": [np.zeros(3, np.float16)]}}, "w.0: is float16, but"),
        ({"like": {"w": (x for x in "ab")}}, "w: is generator, but"),
        ({"like": {"1": 0.0, 1: 0.0}}, "like: has 2 arrays with 1 names; each needs one of its own"),
        ({"like": 0.0, "microbatches": 0}, "microbatches 0: must be a whole number, 1 or more"),
        ({"like": 0.0, "microbatches": "four"}, "microbatches 'four': must be"),
        ({"like": 0.0, "memory": "some"}, "memory 'some': choose from auto, shared, private"),
        ({"like": 0.0, "numbers": -1}, "numbers -1: must be a whole number, 0 or more"),
        ({"like": 0.0, "numbers": "two"}, "numbers 'two': must be"),
        ({"like": 0.0, "finite": "no"}, "finite 'no': must be True or False"),
        ({"like": np.array([1.0, None])}, "the array: is object, but only float32"),
    ],
    ids=str,
)
def test_what_is_refused_when_it_is_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Sum(SELF, **settings)
    assert str(error.value).startswith(message)
    assert error.value.everywhere


def test_what_is_summed_is_no_communicator() -> None:
    with pytest.raises(ConfigError, match=r"comm is a dict: must be .*COMM_WORLD; what is summed is given as like="):
        Sum({"w": np.zeros(3)})  # type: ignore[arg-type]


@pytest.mark.parametrize("numbers", [(), (1, 2, 3), ("a", 2), 5])
def test_numbers_that_are_refused(made: Callable[..., Sum], numbers: Any) -> None:
    text = f"meet({numbers!r}): must be 2 numbers, as this Sum was made with numbers=2"
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        made(SELF, like=0.0, numbers=2).meet(numbers)


@pytest.mark.mpi
@needs_others
def test_what_ranks_ask_for_differently() -> None:
    last = WORLD.rank == LAST
    where = rf"\(rank {LAST} on .*\)"
    with pytest.raises(ConfigError, match=rf"ranks differ in `like`, w: float32 \(4,\) {where}, float32 \(3,\) "):
        Sum(like={"w": np.zeros(3 + last, np.float32)})
    with pytest.raises(ConfigError, match=rf"ranks differ in `like`, v: none {where}"):
        Sum(like={"w" if last else "v": 0.0})
    with pytest.raises(ConfigError, match=f"ranks differ in microbatches: 51 {where}, 50"):
        Sum(like=0.0, microbatches=50 + last)
    with pytest.raises(ConfigError, match=f"ranks differ in numbers: 1 {where}, 0"):
        Sum(like=0.0, numbers=int(last))
    with pytest.raises(ConfigError, match=f"microbatches 1: {WORLD.size} ranks need at least one each"):
        Sum(like=0.0, microbatches=1)
    with pytest.raises(ConfigError, match="w: is int64"):
        Sum(like={"w": np.zeros(3, int) if last else np.zeros(3)})
    with Sum(like=dict([("w", 0.0), ("v", 0.0)][:: -1 if last else 1])) as one:  # keys in another order
        one.put(WORLD.rank, {"v": 1, "w": 2})
        assert one.sum() == {"v": WORLD.size, "w": 2 * WORLD.size}
        one.put(WORLD.rank, {"v": 1, "w": 2})


@pytest.mark.mpi
@needs_others
@pytest.mark.parametrize("nodes", [False, True])
@pytest.mark.parametrize("first", ["mean", "close", "drop"])
def test_a_rank_at_another_call_is_named_at_once(monkeypatch: pytest.MonkeyPatch, nodes: bool, first: str) -> None:
    """As one that leaves the loop early, in the middle of a step or not."""
    if nodes:
        monkeypatch.setenv("MPIML_NODES", ",".join("1" * WORLD.size))
    with guard(stall_timeout=0):
        one = Sum(like=0.0, microbatches=2 * WORLD.size)
        Rows(99, 20, WORLD.size).mine(5 if WORLD.rank == LAST else 6)
        for m in one.own[: 1 if first != "mean" and WORLD.rank == LAST else 2]:
            one.put(m, 1)
        with pytest.raises(RunError) as error, one:
            getattr(one, first if WORLD.rank == LAST else "sum")()
        odd, other = (LAST, 0) if WORLD.size > 2 else (0, 1)

        def place(rank: int) -> str:
            return f"rank {rank} is at " + (f"{first}() in step 5" if rank == LAST else "sum() in step 6")

        assert str(error.value) == f"{place(odd)}, but {place(other)}: all ranks sum the same steps"
        assert (error.value.everywhere, error.value.rank) == (True, odd)
        one.close()


@pytest.mark.mpi
def test_ranks_that_meet_agree_on_losses_weights_and_numbers(made: Callable[..., Sum]) -> None:
    one = made(like=0.0, microbatches=2 * WORLD.size, numbers=2)
    for step in range(2):
        for m in one.own:
            one.put(m, 1.0, weight=2, loss=0.5 if step else np.nan)
        assert one.meet((WORLD.rank, 1)) == [sum(range(WORLD.size)), WORLD.size]
        assert (one.weight, one.bad_loss) == (4 * WORLD.size, None if step else 0)
        if step:
            assert one.loss == WORLD.size
            assert one.mean() == 1
        else:
            one.drop()
    assert one.node_ranks == WORLD.size
    assert one.cores == len(set[int]().union(*WORLD.allgather(os.sched_getaffinity(0))))


@pytest.mark.mpi
@pytest.mark.parametrize("nodes", [False, True])
def test_ranks_that_meet_before_all_is_put(
    made: Callable[..., Sum], monkeypatch: pytest.MonkeyPatch, nodes: bool
) -> None:
    """What only some have put can be dropped, or the rest be put: then all of it counts."""
    if nodes:
        monkeypatch.setenv("MPIML_NODES", ",".join("1" * WORLD.size))
    one = made(like=np.zeros(3), microbatches=2 * WORLD.size, numbers=1)
    for step in range(4):
        early = len(one.own) if WORLD.rank == LAST and step else 0
        for m in one.own[:early]:
            one.put(m, np.full(3, np.nan if step == 1 else 1.0), weight=step)
        assert one.meet([step]) == [step * WORLD.size]
        assert one.weight == 2 * step
        if step == 1:
            one.drop()
            early = 0
        for m in one.own[early:]:
            one.put(m, np.ones(3), weight=step, loss=0.5)
        np.testing.assert_array_equal(one.mean(), np.full(3, step > 0, float))
        assert one.weight == 2 * WORLD.size * step


@pytest.mark.mpi
def test_many_sums_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the MPI library holds is given back: it has some 2,000 communicators, and a Sum of two types takes 7."""
    monkeypatch.setenv("MPIML_NODES", ",".join("1" * WORLD.size))
    for _ in range(330 if WORLD.size <= 2 else 10):  # with more ranks than cores it takes long
        with Sum(like=[np.zeros(3), np.zeros(3, np.float32)]) as one:
            one.put(WORLD.rank, [np.ones(3), np.ones(3, np.float32)])
            total = one.sum(copy=False)
        assert total[0].tolist() == [WORLD.size] * 3
        assert one.weight == WORLD.size
    one.close()
    for call in (lambda: one.put(WORLD.rank, 1.0), one.mean, one.meet, one.drop):
        with pytest.raises(ConfigError, match="the sum is closed"):
            call()


@pytest.mark.mpi
@pytest.mark.parametrize("who", ["most", "all", "one"])  # in this order: what "one" would leave behind helps "most"
def test_a_sum_is_closed_in_the_middle_of_a_step(monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    monkeypatch.setenv("MPIML_NODES", ",".join("1" * WORLD.size))
    with Sum(like=np.zeros(3), microbatches=2 * WORLD.size) as one:
        if who == "all" or (WORLD.rank == LAST) == (who == "one"):
            one.put(one.own[0], np.ones(3))


@pytest.mark.mpi
@pytest.mark.parametrize("nodes", [False, True])
def test_a_sum_of_some_of_the_ranks(monkeypatch: pytest.MonkeyPatch, nodes: bool) -> None:
    """In another order, at the same time as a sum of the others."""
    if nodes and WORLD.size > 1:
        monkeypatch.setenv("MPIML_NODES", f"{WORLD.size - WORLD.size // 2},{WORLD.size // 2}")
    some = MPI.Intracomm(WORLD.Split(WORLD.rank % 2, -WORLD.rank))
    with Sum(some, like=np.zeros(3), microbatches=10) as one:
        assert one.own == Rows(20, 10, 10, comm=some).own
        for m in one.own:
            one.put(m, np.full(3, 10.0**m))
        assert one.sum().tolist() == [1111111111.0] * 3
    some.Free()


def test_without_communicators_left_a_line_says_what_to_do() -> None:
    held: list[MPI.Intracomm] = []
    try:
        with suppress(MPI.Exception):
            held += (SELF.Dup() for _ in range(5000))
        if len(held) == 5000:
            pytest.skip("this MPI library has more")
        with pytest.raises(ConfigError, match="Sum: the MPI library has no communicators left: make one and keep it"):
            Sum(SELF, np.zeros(3))
    finally:
        for comm in held:
            comm.Free()
    Sum(SELF, np.zeros(3)).close()
