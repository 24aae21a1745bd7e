"""Tensors of modules that training does not change: which a checkpoint holds, and how they get back into a module."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.errors import OutputError
from mpiml.nn import base as nn
from mpiml.nn.parameters import Layout
from mpiml.run import checkpoint
from mpiml.training.constants import Constants
from tests.forging import forge, save, save_changed

torch = pytest.importorskip("torch")
from mpiml.nn.torch_modules import TorchLayer, as_layers  # noqa: E402
from mpiml.nn.torch_state import load_into  # noqa: E402

AT = nn.At(training=True)
pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse"
)  # torch says that checks of them are off, and that they are new


class Kept(torch.nn.Module):
    """Constants of all kinds."""

    def __init__(self, seed: int = 0, dtype: Any = torch.float32) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> Any:
            return torch.randn(shape, generator=random)

        self.first = torch.nn.Linear(6, 6)
        self.fixed = torch.nn.Parameter(drawn(6, 3).T, requires_grad=False)  # not as it lies in memory
        self.register_buffer("mask", torch.where(drawn(3, 3) > 0, 0.0, -torch.inf).to(dtype))
        self.register_buffer("order", torch.randperm(6, generator=random))
        self.register_buffer("on", drawn(6) > 0)
        self.register_buffer("one", drawn()[None].expand(4, 1))
        self.register_buffer("waves", torch.complex(drawn(6), drawn(6)).conj())
        self.register_buffer("graph", torch.sparse_coo_tensor([[0, 1], [2, 3]], drawn(2), (6, 6)).coalesce())
        self.register_buffer("rows", torch.eye(6).to_sparse_csr() * drawn())
        self.register_buffer("beside", torch.tensor([2.5]), persistent=False)

    def forward(self, x: Any) -> Any:
        x = self.first(x[..., self.order] * self.on) + self.fixed + self.waves.abs() + self.one.sum() * self.beside
        return x + torch.exp(self.mask).sum() + (self.graph @ self.rows.to_dense()).sum()


KINDS = {
    "fixed": ("float32", (3, 6)),
    "mask": ("float32", (3, 3)),
    "order": ("int64", (6,)),
    "on": ("bool", (6,)),
    "one": ("float32", (4, 1)),
    "waves": ("float32", (6, 2)),
    "graph.values": ("float32", (2,)),
    "rows.values": ("float32", (6,)),
}
BY_CHECKSUM = ["graph.indices", "rows.crow_indices", "rows.col_indices", "beside"]


def layer(seed: int) -> TorchLayer:
    """A layer of Kept, with values."""
    (made,) = layers = as_layers([Kept(seed)], "float32", 1)
    nn.name(layers)
    layout = Layout(nn.parameters(layers), "float32")
    values = layout.zeros()
    layout.bind(values)
    layout.initialise(values, 0)
    return made


def test_constants_are_views_of_the_modules_tensors() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 6)).astype("f4")
    one, other = layer(0), layer(1)
    other.module.first.load_state_dict(one.module.first.state_dict())
    for name, parameter in one.parameters.items():
        other.parameters[name].value[...] = parameter.value
    found = one.own_constants()
    assert {name: (c.array.dtype.name, c.array.shape) for name, c in found.items() if c.saved} == KINDS
    assert [name for name, constant in found.items() if not constant.saved] == BY_CHECKSUM
    before = other(x, AT)[0].tobytes()
    for name, constant in other.own_constants().items():
        assert constant.equals(found[name].array) == (name in BY_CHECKSUM), name
        constant.array[...] = found[name].array
    assert other(x, AT)[0].tobytes() == one(x, AT)[0].tobytes() != before
    assert [c.entry for c in other.own_constants().values()] == [c.entry for c in found.values()]


def test_constants_keep_their_own_memory_alive_and_not_the_module() -> None:
    made = layer(1)
    module, weight, held = weakref.ref(made.module), weakref.ref(made.module.first.weight), Constants.of([made])
    del made
    gc.collect()
    assert (module(), weight()) == (None, None)
    assert held.arrays["layers.0.fixed"].tobytes() == Kept(1).fixed.detach().numpy().tobytes()


def test_a_state_dict_is_the_modules_with_the_layers_values() -> None:
    made = layer(1)
    made.parameters["first.weight"].value = np.full((6, 6), 7, "f4")
    state = made.state_dict()
    fresh = Kept(2)
    fresh.one = fresh.one.clone()  # torch cannot write to one that is expanded
    fresh.load_state_dict(state)
    assert (fresh.first.weight == 7).all()
    assert torch.equal(fresh.waves, Kept(1).waves)
    state["mask"].zero_()
    assert torch.equal(made.module.mask, Kept(1).mask)


def saved(path: Path, module: TorchLayer, **others: Any) -> Path:
    """A checkpoint of one layer, with some arrays in place of its own; None takes one away."""
    constants = nn.constants([module])
    arrays = {p.name: p.value for p in nn.parameters([module])}
    arrays |= {name: constant.array for name, constant in constants.items() if constant.saved}
    arrays |= {f"layers.0.{name}": array for name, array in others.items()}
    entries = {name: constant.entry for name, constant in constants.items()}
    kept = {name: array for name, array in arrays.items() if array is not None}
    path.mkdir(exist_ok=True)
    return save(path, 1, kept, constants=entries)


def test_a_checkpoint_goes_into_a_fresh_module_whole(tmp_path: Path) -> None:
    trained = layer(1)
    path = saved(tmp_path, trained)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        fresh = load_into(Kept(2, dtype), path)
        for name, tensor in trained.module.state_dict().items():
            theirs = fresh.state_dict()[name]
            assert theirs.dtype == (dtype if name == "mask" else Kept(2).state_dict()[name].dtype), name
            assert torch.equal(theirs.to_dense().to(tensor.dtype), tensor.to_dense()), name
        assert fresh.mask.isinf().any()


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"mask": None}, r"of another model: layers.0.mask is not in it, and \(3, 3\) here"),
        ({"first.bias": None}, r"of another model: layers.0.first.bias is not in it, and \(6,\) here"),
        ({"mask": np.zeros((3, 4), "f4")}, r"layers.0.mask is \(3, 4\) in it, and \(3, 3\) here"),
        ({"on": np.zeros(6, "f4")}, r"layers.0.on is float32 in it, and torch.bool here"),
        ({"order": np.zeros(6, "f4")}, r"layers.0.order is float32 in it, and torch.int64 here"),
        ({"fixed": np.zeros((3, 6), "i4")}, r"layers.0.fixed is int32 in it, and torch.float32 here"),
        ({"waves": np.zeros(6, "f4")}, r"layers.0.waves is \(6,\) in it, and \(6, 2\) here"),
        ({"more": np.zeros(6, "f4")}, r"layers.0.more is in it, and not here"),
        ({"graph.indices": np.full((2, 2), 10**9)}, r"layers.0.graph.indices is in it, and not here"),
    ],
)
def test_what_does_not_fit_is_named_and_the_module_stays(tmp_path: Path, others: dict[str, Any], words: str) -> None:
    path, fresh = saved(tmp_path, layer(1), **others), Kept(2)
    with pytest.raises(ValueError, match=words):
        load_into(fresh, path)
    assert all(
        torch.equal(t.to_dense(), Kept(2).state_dict()[n].to_dense())
        for n, t in fresh.state_dict().items()
        if "first" not in n
    )


def test_of_what_is_in_no_checkpoint_the_checksum_is_compared(tmp_path: Path) -> None:
    path, fresh = saved(tmp_path, layer(1)), Kept(2)
    fresh.beside += 1
    with pytest.raises(ValueError, match=r"^layers.0.beside is not what .*step-000000001.safetensors was trained with"):
        load_into(fresh, path)
    entries = {name: constant.checksum for name, constant in nn.constants([layer(1)]).items()}
    none = dict.fromkeys(name for name, c in layer(1).own_constants().items() if c.saved)
    older = checkpoint.load(saved(tmp_path / "older", layer(1), **none))
    path = save_changed(tmp_path / "older", older, step=2, constants=entries)
    load_into(Kept(1), path)
    load_into(Kept(1).double(), path)
    with pytest.raises(ValueError, match=r"^layers.0.fixed is not what .*safetensors was trained with"):
        load_into(Kept(2), path)
    load_into(Kept(2), save_changed(tmp_path / "older", older, step=3, constants=None))  # it does not tell


def test_averages_and_complex_weights_come_as_real_numbers(tmp_path: Path) -> None:
    module = torch.nn.BatchNorm1d(2)
    module.weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.cfloat))
    arrays = {"bias": [1, 2], "running_mean": [3, 4], "running_var": [5, 6], "num_batches_tracked": 7.9999}
    arrays["weight"] = [[1, 2], [3, 4]]
    named = {f"layers.0.{name}": np.array(values, "f4") for name, values in arrays.items()}
    load_into(module, save(tmp_path, 1, named, constants={}))
    assert module.weight.tolist() == [1 + 2j, 3 + 4j]
    assert (module.running_mean.tolist(), module.running_var.tolist()) == ([3, 4], [5, 6])
    assert (module.num_batches_tracked.item(), module.num_batches_tracked.dtype) == (8, torch.int64)


def test_averages_of_weights_come_if_they_are_asked_for(tmp_path: Path) -> None:
    trained = layer(1)
    path, average = saved(tmp_path, trained), np.full((6, 6), 7, "f4")
    with pytest.raises(OutputError, match=r"step-000000001.safetensors has no average of the weights"):
        load_into(Kept(2), path, average=True)
    whole = checkpoint.load(path)
    arrays = {**whole.arrays, "ema.layers.0.first.weight": average}
    path = save_changed(tmp_path, whole, step=2, arrays=arrays)
    for module, expected in (
        (load_into(Kept(2), path), trained.parameters["first.weight"].value),
        (load_into(Kept(2), path, average=True), average),
    ):
        np.testing.assert_array_equal(module.first.weight.detach(), expected)
        assert torch.equal(module.fixed, trained.module.fixed)


def test_constants_that_are_no_texts_are_one_line(tmp_path: Path) -> None:
    for text in ("[1]", "{"):
        with pytest.raises(OutputError, match="constants is damaged: "):
            load_into([torch.nn.Linear(4, 3)], forge(tmp_path / "a.safetensors", constants=text))
