"""What a sum refuses: when it is made, when arrays are put, and when they are added up."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.errors import ConfigError, NotFiniteError
from mpiml.loop.guard import clock, guard
from mpiml.loop.rows import Rows
from mpiml.loop.sums import Sum

WORLD = MPI.COMM_WORLD
SELF = MPI.COMM_SELF
LAST = WORLD.size - 1
needs_others = pytest.mark.skipif(WORLD.size == 1, reason="needs other ranks")


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
