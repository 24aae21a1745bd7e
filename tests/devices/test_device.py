"""What lies on a device, how it gets there and back, and which pages are locked."""

# ruff: noqa: E402 - PyTorch first

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn

from mpiml.devices import device as devices
from mpiml.devices.device import PAGE, dtype_of
from mpiml.devices.fake import DEVICES, UNLOCKED, Fake
from mpiml.devices.host import HOST
from mpiml.errors import ConfigError


class Pages(Fake):
    """A device that remembers which pages it locks, and as CUDA does refuses those that are locked already."""

    def __init__(self) -> None:
        super().__init__(0, "fake", alone=True)
        self.pages: set[int] = set()
        self.calls: list[tuple[int, int]] = []

    def _lock(self, address: int, size: int) -> bool:
        assert not address % PAGE
        assert not size % PAGE
        new = set(range(address, address + size, PAGE))
        assert not new & self.pages, "locked twice"
        self.pages |= new
        self.calls.append((address, size))
        return True

    def _unlock(self, address: int) -> None:
        ((start, size),) = [call for call in self.calls if call[0] == address]
        self.pages -= set(range(start, start + size, PAGE))
        self.calls.remove((start, size))


@pytest.fixture
def pages() -> Iterator[Pages]:
    made = Pages()
    yield made
    made.free()
    assert not made.pages
    assert not made.locked


@pytest.fixture
def memory() -> Any:
    """Ten pages, as bytes."""
    raw = np.zeros(11 * PAGE, np.uint8)
    start = -raw.ctypes.data % PAGE
    return raw[start : start + 10 * PAGE]


def part(memory: Any, start: float, stop: float) -> Any:
    """The bytes from one page to another, both counted in pages."""
    return memory[int(start * PAGE) : int(stop * PAGE)]


def test_pages_of_neighbours_are_locked_at_once(pages: Pages, memory: Any) -> None:
    pages.lock(part(memory, 2.5, 3), part(memory, 0, 1.5), part(memory, 1.5, 2.5), part(memory, 5, 5.5), memory[:0])
    start = memory.ctypes.data
    assert pages.calls == [(start, 3 * PAGE), (start + 5 * PAGE, PAGE)]
    assert pages.locked == 4 * PAGE


@pytest.mark.parametrize(
    ("before", "then"),
    [
        ((0, 2.5), (2.5, 5)),  # they share a page
        ((2.5, 5), (0, 2.5)),
        ((2.5, 5), (2.6, 2.7)),  # within what is locked
        ((0, 3), (0, 3)),
        ((0, 3), (0, 5)),
        ((2, 5), (0, 5)),
    ],
)
def test_pages_are_locked_once(
    pages: Pages, memory: Any, before: tuple[float, float], then: tuple[float, float]
) -> None:
    first, second = part(memory, *before), part(memory, *then)
    pages.lock(first)
    pages.lock(second)
    for array in (first, second):
        start, stop = array.ctypes.data // PAGE * PAGE, array.ctypes.data + array.nbytes
        assert set(range(start, stop, PAGE)) <= pages.pages


def test_an_array_over_pages_that_were_locked_in_parts_travels_all_the_same(pages: Pages, memory: Any) -> None:
    array = part(memory, 0.5, 3.5).view(np.float32)
    pages.lock(part(memory, 0.25, 1.25))
    pages.lock(part(memory, 3, 3.5))
    pages.lock(array)
    array[...] = np.arange(len(array))
    there = pages.empty(len(array), array.dtype)
    pages.put(array, there)
    pages.settle()
    np.testing.assert_array_equal(pages.array(there), np.arange(len(array)))


def test_pages_of_arrays_are_given_back_and_may_be_locked_again(pages: Pages, memory: Any) -> None:
    pages.lock(part(memory, 0, 2))
    pages.free()
    assert (pages.locked, pages.pages) == (0, set())
    pages.lock(part(memory, 0, 2))
    assert pages.locked == 2 * PAGE


@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, 103])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_vectors_there_and_back(
    device: Fake, monkeypatch: pytest.MonkeyPatch, locked: bool, size: int, dtype: str
) -> None:
    """Arrays that are not locked travel in parts, the last of which is short."""
    monkeypatch.setattr(devices, "STAGING", 64)
    numbers, back = np.arange(1, size + 1).astype(dtype), np.zeros(size + 2, dtype)
    if locked:
        device.lock(numbers, back)
    there = device.empty(size, dtype)
    device.put(numbers, there)
    device.settle()
    device.fetch(there, back[1:-1])
    device.settle()
    np.testing.assert_array_equal(back, np.concatenate([[0], numbers, [0]]))


def test_arrays_travel_in_parts_where_nothing_can_be_locked(device: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also through memory that is not locked itself; several ones may be on their way."""
    monkeypatch.setenv(UNLOCKED, "1")
    monkeypatch.setattr(devices, "STAGING", 64)
    one, other = np.arange(50.0), np.arange(50.0)[::-1].copy()
    device.lock(one, other)
    assert not device.locked
    there = [device.empty(50, "f8"), device.empty(50, "f8")]
    device.put(one, there[0])
    device.put(other, there[1])
    device.settle()
    for array, tensor in zip((one, other), there, strict=True):
        np.testing.assert_array_equal(device.array(tensor), array)


def net() -> nn.Module:
    """Layers of which two share a buffer, and one is not trained."""
    layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    layers[2].running_mean = layers[1].running_mean
    layers[3].requires_grad_(False)
    return layers


def test_a_module_is_lent_with_all_that_it_has(device: Fake) -> None:
    module = net()
    tensors = [*module.parameters(), *module.buffers()]
    before = [(tensor.data_ptr(), tensor.clone()) for tensor in tensors]
    x = torch.ones(5, 3)
    with device.lent(module):
        assert all(device._sides.is_there(tensor) for tensor in tensors)
        assert device._sides.is_there(module(device.tensor(x)))
        with pytest.raises(RuntimeError, match="same device"):
            module(x)
    assert [(tensor.data_ptr(), True) for tensor in tensors] == [
        (address, bool((tensor == was).all())) for (address, was), tensor in zip(before, tensors, strict=True)
    ], "what it changed there does not come back"
    assert not device._sides.is_there(module(x))


def test_a_module_that_was_lent_comes_back_with_what_a_call_has_made_and_after_an_error(device: Fake) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(2))

        def forward(self, x: Any) -> Any:
            self.seen = self.seen + x
            self.register_buffer("last", x * 3)
            return x

    module = Counting()
    with pytest.raises(ZeroDivisionError), device.lent(module):  # noqa: PT012 - a call, then an error
        module(device.tensor(np.array([1.0, 2.0], "f4")))
        raise ZeroDivisionError
    assert not any(device._sides.is_there(tensor) for tensor in module.buffers())
    assert module.last.tolist() == [3, 6]
    assert (module(torch.ones(2)) + module.seen + module.last).isfinite().all()


def test_what_a_module_keeps_is_placed_there_and_stays_shared(device: Fake) -> None:
    module = net()
    kept = [*module.buffers(), *module[3].parameters()]
    values = [tensor.clone() for tensor in kept]
    device.place(module)
    assert all(map(device._sides.is_there, kept))
    assert not any(map(device._sides.is_there, module[:3].parameters())), "these become views of a vector"
    assert module[2].running_mean is module[1].running_mean
    assert all((device.on_host(tensor) == value).all() for tensor, value in zip(kept, values, strict=True))
    places = [tensor.data_ptr() for tensor in kept]
    device.place(module)
    assert [tensor.data_ptr() for tensor in kept] == places, "what is there stays where it is"


def test_tensors_there_are_copies(device: Fake) -> None:
    array = np.arange(3.0)
    there = device.tensor(array)
    array[0] = 9
    assert device.tensor(there) is there
    back = device.on_host(there)
    there.add_(1)
    assert back.tolist() == [0, 1, 2]
    assert device.array(there).tolist() == [1, 2, 3]
    assert device.array(array) is array
    array.flags.writeable = False
    assert device.array(device.tensor(array)).tolist() == [9, 1, 2]


def test_what_does_not_fit_is_said_with_its_size() -> None:
    small = Fake(0, "a:1", alone=True)
    small.empty(100_000, "f8")
    assert small.memory() == (200_000, 1_000_000)
    needs = r"^--device fake: the model needs 0\.0002 GB on a:1, of which 0\.0002 of 0\.001 GB are free; more stages"
    with pytest.raises(ConfigError, match=needs):
        small.check_memory(200_001, "the model")
    small.check_memory(200_000, "the model")
    small.ranks = 2
    with pytest.raises(ConfigError, match=r"the model needs 2 times 0\.0001 GB on a:1, of which"):
        small.check_memory(100_001, "the model")
    with (
        pytest.raises(ConfigError, match="too little memory on a:1 for a vector of 25,001 elements: "),
        small.named_memory("a vector"),
    ):
        small.empty(25_001, "f8")
    small.empty(25_000, "f8")
    line = r"^--device fake: too little memory on a:1 for a step: no more; 0 of 0.001 GB are free; fewer"
    with pytest.raises(ConfigError, match=line), small.named_memory("a step"):
        raise torch.OutOfMemoryError("no more. And a long text")


def test_types_of_vectors() -> None:
    assert (dtype_of("float32"), dtype_of(np.float64), dtype_of(np.uint8)) == (
        torch.float32,
        torch.float64,
        torch.uint8,
    )


def test_the_host_is_a_device_on_which_nothing_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEVICES, "")
    array, module = np.arange(3), nn.Linear(2, 2)
    with HOST.lent(module), HOST.named_memory("a step"):
        assert HOST.array(array) is array
    HOST.free()
    assert (HOST.there, HOST.alone, HOST.kind) == (False, True, "cpu")
    assert math.isfinite(float(module(torch.ones(2)).sum().detach()))


def test_memory_that_may_not_be_written_to_travels_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    device, source = Fake(0, "fake", alone=True), np.arange(4.0)
    source.flags.writeable = False
    device.lock(source)
    there = device.empty(4, "f8")
    device.put(source, there)
    device.settle()
    assert device.array(there).tolist() == [0, 1, 2, 3]
    assert not recwarn.list
