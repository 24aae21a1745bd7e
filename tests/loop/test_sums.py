"""The sum of arrays over micro-batches: its bits, and what it takes and gives."""

from __future__ import annotations

import re
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.errors import ConfigError
from mpiml.loop.rows import Rows
from mpiml.loop.sums import Sum
from tests.parallel.sums import serial_sum

WORLD = MPI.COMM_WORLD
SELF = MPI.COMM_SELF
Pair = namedtuple("Pair", "left right")


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


def test_numbers_of_ones_own_go_where_one_number_is_summed(made: Callable[..., Sum]) -> None:
    one = made(SELF, like=[np.float32(0), np.zeros((), np.float64), 0])
    one.put(0, [1.5, np.float32(2.5), True])
    total = one.sum()
    assert [type(value) for value in total] == [np.ndarray, np.ndarray, float]
    assert [float(value) for value in total] == [1.5, 2.5, 1.0]
