"""An index out of range is an error where indices are checked, and the end of a device elsewhere."""

# ruff: noqa: E402 - PyTorch first

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mpiml.devices.fake import Fake
from mpiml.devices.host import HOST

functional = torch.nn.functional
# What uses indices (or targets) into six rows of three: of the index that is asked for.
OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "embedding": lambda x, i: functional.embedding(i, x),
    "embedding_bag": lambda x, i: functional.embedding_bag(i[None], x),
    "index": lambda x, i: x[i],
    "index of the second axis": lambda x, i: x.T[:, i],
    "index after a mask": lambda x, i: x.view(1, 1, 6, 3)[torch.ones_like(x[:1, :1], dtype=torch.bool), i],
    "index_put": lambda x, i: x.index_put((i,), x[0]),
    "gather": lambda x, i: x.gather(0, i[:, None]),
    "index_select": lambda x, i: x.index_select(0, i),
    "index_add": lambda x, i: x.index_add(0, i, x[:2]),
    "index_copy": lambda x, i: x.index_copy(0, i, x[:2]),
    "index_fill": lambda x, i: x.index_fill(0, i, 1.0),
    "scatter": lambda x, i: x.scatter(0, i[:, None], 1.0),
    "scatter_add": lambda x, i: x.scatter_add(0, i[:, None], x),
    "scatter_reduce": lambda x, i: x.scatter_reduce(0, i[:, None], x, "amax"),
    "take": lambda x, i: x.take(i * 3),
    "cross_entropy": lambda x, i: functional.cross_entropy(x[:2].repeat(1, 2), i),
    "cross_entropy of pixels": lambda x, i: functional.cross_entropy(
        x[:2].repeat(1, 2)[:, :, None, None], i[:, None, None]
    ),
}
FROM_THE_END = ("index", "index of the second axis", "index after a mask", "index_put", "index_fill", "take")


def rows(device: Fake, *indices: int) -> Any:
    return device.tensor(torch.arange(18.0).view(6, 3)), device.tensor(torch.tensor(indices))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("bad", [-7, -1, 6, 1000])
def test_an_index_out_of_range_is_an_error_that_leaves_the_device(device: Fake, name: str, bad: int) -> None:
    operation = OPERATIONS[name]
    if bad == -1 and name in FROM_THE_END:
        bad = -8
    with pytest.raises(IndexError, match="out of range"), device.checked_indices():
        operation(*rows(device, 0, bad))
    assert device.array(rows(device, 0)[0] + 1)[0, 0] == 1


@pytest.mark.parametrize("name", OPERATIONS)
def test_without_a_look_at_them_it_is_the_last_operation(device: Fake, name: str) -> None:
    with pytest.raises(RuntimeError, match="the device does nothing more"):
        OPERATIONS[name](*rows(device, 0, 6))
    with pytest.raises(RuntimeError, match="the device does nothing more"):
        rows(device, 0)[0].add_(1)


@pytest.mark.parametrize("name", OPERATIONS)
def test_results_are_the_same(device: Fake, name: str) -> None:
    x, _ = rows(device, 0)
    for indices in [(0, 5), (-6, -1)] if name in FROM_THE_END else [(0, 5), (3, 3)]:
        i = device.tensor(torch.tensor(indices))
        with device.checked_indices():
            looked = OPERATIONS[name](x, i)
        assert torch.equal(device.on_host(looked), device.on_host(OPERATIONS[name](x, i)))


def test_targets_that_do_not_count_may_be_anything(device: Fake) -> None:
    x, i = rows(device, -100, 2)
    with device.checked_indices():
        functional.cross_entropy(x[:2], i)
        with pytest.raises(IndexError):
            functional.cross_entropy(x[:2], i, ignore_index=-1)


def test_a_wrong_axis_is_an_error_as_everywhere(device: Fake) -> None:
    x, i = rows(device, 0)
    for _ in range(2):
        with pytest.raises(IndexError, match="Dimension out of range"):
            x.index_select(5, i)
    with HOST.checked_indices(), pytest.raises(IndexError):
        functional.embedding(torch.tensor([9]), torch.ones(3, 3))
