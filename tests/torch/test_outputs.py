"""Outputs of a module in whatever they are packed: a backward pass from any of their tensors is averaged."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")
nn = torch.nn

from mpiml.torch import DataParallel, rank  # noqa: E402
from mpiml.torch.outputs import tensors_in  # noqa: E402
from tests.torch.modules import WORLD, check, close, gradients, rows, several_ranks  # noqa: E402

pytestmark = pytest.mark.mpi


@dataclass
class Output:
    y: Any
    more: Any = None


class Opaque:
    __slots__ = ("y",)


class Packed(nn.Module):
    """An output in whatever is asked for."""

    def __init__(self, kind: str):
        super().__init__()
        self.inner, self.kind = nn.Linear(5, 3), kind

    def forward(self, x: Any) -> Any:
        y = self.inner(x)
        if self.kind == "opaque":
            packed = Opaque()
            packed.y = y
            return packed
        packs = {"dict": {"a": [y]}, "tuple": (None, y), "ordered": OrderedDict(y=y), "dataclass": Output(y, "x")}
        return packs[self.kind]


class Bypassed(nn.Module):
    """On the first rank the input is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 3)

    def forward(self, x: Any) -> Any:
        return {"y": x if rank() == 0 else self.inner(x)}


@several_ranks
def test_an_input_that_is_an_output_needs_no_gradient_then() -> None:
    net, x = DataParallel(Bypassed()), rows()
    net(x)["y"].sum().backward()
    assert not x.requires_grad
    assert x.grad is None
    close(gradients(net)[1:], [torch.full((3,), 6 * (1 - 1 / WORLD.size))])


@pytest.mark.parametrize("kind", ["dict", "tuple", "ordered", "dataclass", "opaque"])
def test_outputs_may_be_packed(kind: str) -> None:
    def act(net: Any) -> None:
        y = net(rows())
        (y.y if kind == "opaque" else next(tensors_in(y))).sum().backward()

    check(Packed(kind), act)
