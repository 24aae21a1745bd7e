"""Several inputs of a row reach a PyTorch module by name or in order, in the dtypes that it takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from mpiml.errors import ConfigError  # noqa: E402
from mpiml.nn.torch_inputs import split_inputs  # noqa: E402
from mpiml.nn.torch_modules import as_layers, integers  # noqa: E402

NAMED = (("ids", (3,), "i"), ("image", (1, 2, 2), "u"), ("keep", (3,), "b"))
X = torch.tensor([[1, 2, 0, 5, 6, 7, 8, 1, 1, 0], [3, 3, 3, 0, 0, 0, 0, 0, 1, 0]], dtype=torch.float32)


class Net(nn.Module):
    """Keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.norm = nn.Embedding(4, 2), nn.Conv2d(1, 2, 2), nn.BatchNorm1d(2)
        self.norm.eval()
        self.got: list[dict[str, Any]] = []

    def forward(self, ids: Any, image: Any, keep: Any) -> Any:
        self.got.append({"ids": ids, "image": image, "keep": keep})
        return self.norm((self.table(ids) * keep.unsqueeze(-1)).sum(1) + self.conv(image).flatten(1))


def test_inputs_by_name_in_the_dtypes_that_the_module_takes() -> None:
    net = Net()
    names = [name for name, _ in net.named_parameters()]
    split_inputs(net, NAMED)
    net(X)
    got = net.got[-1]
    assert [got[name].dtype for name in ("ids", "image", "keep")] == [torch.long, torch.float32, torch.bool]
    np.testing.assert_array_equal(got["ids"], X[:, :3])
    np.testing.assert_array_equal(got["image"], X[:, 3:7].reshape(2, 1, 2, 2))
    np.testing.assert_array_equal(got["keep"], X[:, 7:])
    assert [name for name, _ in net.named_parameters()] == names
    assert (net.training, net.norm.training, net.norm.num_batches_tracked.item()) == (True, False, 0)


def test_a_module_is_called_as_before_with_inputs_that_are_not_packed() -> None:
    net = Net()
    for _ in range(2):  # a second training of the same object
        split_inputs(net, NAMED)
    parts = {"ids": X[:, :3].long(), "image": X[:, 3:7].reshape(2, 1, 2, 2), "keep": X[:, 7:].bool()}
    assert torch.equal(net(X), net(**parts))
    assert len(net._forward_pre_hooks) == 1


class Three(nn.Module):
    def forward(self, a: Any, b: Any, c: Any) -> Any:
        return a * 100 + b * 10 + c


def test_inputs_in_order() -> None:
    net = Three()
    split_inputs(net, tuple(("", (), "f") for _ in range(3)))
    np.testing.assert_array_equal(net(torch.tensor([[1.0, 2, 3], [4, 5, 6]])), [123, 456])


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ((("a", (), "f"), ("d", (), "f")), "Three does not take the data's inputs, a (), d (), by these names: "),
        (
            (("", (), "f"), ("", (2,), "i")),
            "Three does not take the data's inputs, input (), input (2,), in this order: ",
        ),
    ],
)
def test_a_module_that_takes_others_is_refused(inputs: Any, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        split_inputs(Three(), inputs)
    assert str(error.value).startswith(words)
    assert "\n" not in str(error.value)


def test_integers_that_are_too_high_for_a_table_are_refused_before_they_come() -> None:
    split_inputs(Net(), NAMED, [0, 3, 0, 255, 0, 0])
    for bounds, words in (([0, 4, 0, 255, 0, 0], "4 in ids, 255 in image"), ([-1, 3, 0, 255, 0, 0], "-1 in ids")):
        with pytest.raises(ConfigError) as error:
            split_inputs(Net(), NAMED, bounds)
        assert str(error.value) == f"Net cannot take integers such as {words}: Embedding(4, 2)"


def test_many_inputs_of_integers() -> None:
    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 2)

        def forward(self, **ids: Any) -> Any:
            return sum(self.table(each) for each in ids.values())

    inputs = tuple((f"c{number}", (), "i") for number in range(40))
    net = Tables()
    split_inputs(net, inputs, [0, 3] * 40)
    assert net(torch.zeros(5, 40)).shape == (5, 2)


def test_only_the_first_module_of_a_sequence_takes_them() -> None:
    class Sum(nn.Module):
        def forward(self, a: Any, b: Any) -> Any:
            return a + b

    inputs = (("b", (2,), "f"), ("a", (2,), "i"))
    first, *others = as_layers(nn.Sequential(Sum(), nn.Linear(2, 3)), np.float32, 1, inputs)
    assert first.output_shape((4,)) == (2,)
    assert integers([first, *others]) == []
    assert integers(as_layers(Net(), np.float32, 1, NAMED)) == [slice(0, 3), slice(7, 10)]
    assert [len(layer.module._forward_pre_hooks) for layer in (first, *others)] == [1, 0]
