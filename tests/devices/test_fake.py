"""The pretended device shows what would go wrong on a GPU."""

# ruff: noqa: E402 - PyTorch first

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mpiml.devices import fake
from mpiml.devices.fake import DEVICES, Fake
from mpiml.errors import ConfigError


def there(device: Fake, tensor: Any) -> bool:
    return device._sides.is_there(tensor)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_nobody_wrote_is_nan(device: Fake, dtype: str) -> None:
    assert np.isnan(device.array(device.empty(9, dtype))).all()
    assert not device.array(device.vectors.zeros(9, dtype)).any()


@pytest.mark.parametrize("direction", ["put", "fetch"])
def test_a_transfer_takes_place_when_it_is_waited_for(device: Fake, direction: str) -> None:
    """Before that there is NaN; and what is written to its source meanwhile travels."""
    host, vector = np.arange(4.0), device.vectors.zeros(4, "f8")
    device.lock(host)
    vector.add_(7)
    ends = {"put": (host, vector), "fetch": (vector, host)}[direction]
    getattr(device, direction)(*ends)
    assert np.isnan(device.array(ends[1])).all()
    ends[0][0] = 5
    device.settle()
    np.testing.assert_array_equal(device.array(vector), host)
    assert host[0] == 5
    device.settle()  # once is enough


def test_transfers_are_in_their_order(device: Fake) -> None:
    first, last = np.full(3, 1.0), np.full(3, 2.0)
    device.lock(first, last)
    vector = device.empty(3, "f8")
    device.put(first, vector)
    device.put(last, vector)
    device.settle()
    assert device.array(vector).tolist() == [2, 2, 2]


def test_transfers_within_a_side_are_refused(device: Fake) -> None:
    one, other = device.vectors.zeros(3, "f8"), device.vectors.zeros(3, "f8")
    with pytest.raises(RuntimeError, match="on one side"):
        device._begin(one, other)
    with pytest.raises(RuntimeError, match="on one side"):
        device._begin(torch.zeros(3), torch.zeros(3))


@pytest.mark.parametrize(
    "mix",
    [
        lambda here, there: here + there,
        lambda here, there: there * here,
        lambda here, there: torch.cat([here, there]),
        lambda here, there: torch.stack([there, here]),
        lambda here, there: here.add_(there),
        lambda here, there: torch.where(there > 0, here, here),
        lambda here, there: torch.add(here, here, out=there),
        lambda here, there: torch.nn.functional.linear(there, here[None]),
        lambda here, there: there[here.long()],
    ],
)
def test_operations_that_mix_sides_are_refused(device: Fake, mix: Any) -> None:
    ones = torch.ones(3)
    mix(ones, ones.clone()), mix(device.tensor(ones), device.tensor(ones.clone()))
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        mix(ones, device.tensor(ones))


def test_numbers_of_the_host_may_be_mixed_with_tensors_there(device: Fake) -> None:
    vector, number = device.vectors.zeros(3, "f4"), torch.tensor(2.0)
    assert there(device, vector + number)
    assert there(device, number + vector)
    assert device.array(vector + number).tolist() == [2, 2, 2]


def test_what_an_operation_makes_lies_where_its_arguments_do(device: Fake) -> None:
    vector = device.vectors.zeros(6, "f4")
    for made in (vector + 1, vector.view(2, 3), vector[2:], vector.double(), torch.ones_like(vector), vector.sum()):
        assert there(device, made)
    assert all(there(device, one) for one in torch.topk(vector, 2))
    here = torch.ones(6)
    for made in (here + 1, here.view(2, 3), torch.ones_like(here), here.sum()):
        assert not there(device, made)
    copied = here.copy_(vector)
    assert not there(device, copied), "a copy between sides is where its target is"
    assert there(device, vector.copy_(here))


def test_what_is_made_of_nothing_is_on_the_host_unless_a_device_is_named(device: Fake) -> None:
    for make in (torch.zeros, torch.empty, torch.randn, torch.arange):
        assert not there(device, make(3)), make
        assert there(device, make(3, device=device.torch)), make
    assert not there(device, torch.tensor([1.0, 2.0]))
    assert there(device, torch.tensor([1.0, 2.0], device=device.torch))


def test_tensors_of_the_host_go_to_the_device_of_others_as_copies(device: Fake) -> None:
    here, vector = torch.zeros(3), device.vectors.zeros(3, "f4")
    for moved in (here.to(vector.device), here.to(device=vector.device), torch.as_tensor(here, device=vector.device)):
        assert there(device, moved + vector)
        moved += 1
    assert not here.any()
    assert not there(device, here)
    assert vector.to(vector.device) is vector
    assert not there(device, here.to(torch.float64)), "which names no device"


def test_functions_of_pytorch_make_for_themselves_what_they_need_where_their_arguments_are(device: Fake) -> None:
    attention = torch.nn.MultiheadAttention(4, 2)
    x = torch.ones(5, 1, 4)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(5)
    with device.lent(attention):
        x = device.tensor(x)
        assert there(device, attention(x, x, x, attn_mask=device.tensor(mask), is_causal=True)[0])
    mapped = torch.func.vmap(lambda row: row * 2 + torch.ones_like(row))(device.vectors.zeros(6, "f4").view(2, 3))
    assert there(device, mapped)
    gradient = torch.func.grad(lambda row: (row * row).sum())(device.vectors.zeros(6, "f4"))
    assert there(device, gradient)


def test_gradients_are_computed_there(device: Fake) -> None:
    leaf = device.tensor(np.arange(3.0)).requires_grad_()
    (leaf * leaf).sum().backward()
    assert there(device, leaf.grad)
    assert device.array(leaf.grad).tolist() == [0, 2, 4]


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors(device: Fake) -> None:
    table, ids = device.tensor(np.ones((5, 2))).requires_grad_(), device.tensor(np.array([1, 3, 1]))
    torch.nn.functional.embedding(ids, table, sparse=True).sum().backward()
    assert table.grad.is_sparse
    assert there(device, table.grad)
    assert there(device, table.grad.to_dense())
    assert device.array(table.grad.to_dense())[:, 0].tolist() == [0, 2, 0, 1, 0]
    rows = device.tensor(torch.eye(3).to_sparse_csr())
    assert there(device, rows)
    assert there(device, rows.to_dense())


def test_memory_that_has_been_freed_is_the_hosts_again(device: Fake) -> None:
    """However often it is taken and freed: the same address may be the host's next time."""
    for _ in range(3000):
        device.tensor(np.ones(4))
    assert len(device._sides._there) < 3000
    assert not any(there(device, torch.ones(4)) for _ in range(100))


def test_devices_that_a_process_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DEVICES, raising=False)
    assert fake.seen("n", 2) == [("fake", "n, device 0"), ("fake", "n, device 1")]
    monkeypatch.setenv(DEVICES, "a,b:64")
    assert fake.seen("n", 5) == [("a", "n, device 0"), ("b:64", "n, device 1")]
    assert Fake(1, "b:64", alone=False).memory() == (64_000_000, 64_000_000)
    monkeypatch.setenv(DEVICES, "")
    with pytest.raises(ConfigError, match=r"^--device fake: MPIML_FAKE_DEVICES is empty, so there are none$"):
        fake.seen("n", 2)


def test_numpy_does_not_see_what_lies_there(device: Fake) -> None:
    vector = device.vectors.zeros(3, "f4")
    for convert in (torch.Tensor.numpy, np.asarray):
        with pytest.raises(TypeError, match="copy the tensor to host memory first"):
            convert(vector)
    for back in (device.on_host(vector), vector.cpu(), vector.to("cpu"), vector.to(device="cpu")):
        back += 1
        assert np.asarray(back).tolist() == [1, 1, 1]
    assert vector.tolist() == [0, 0, 0]
