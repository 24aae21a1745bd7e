"""PyTorch modules as layers: gradients are autograd's, bits do not depend on where arrays lie, and what is refused."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.config import Config
from mpiml.errors import ConfigError, OutputError
from mpiml.nn import layers as nn
from mpiml.nn.base import constants
from mpiml.nn.base import stacked as stack
from mpiml.nn.parameters import Gradients, Layout
from mpiml.training.model import described, model_for
from mpiml.training.task import Task

torch = pytest.importorskip("torch")
from mpiml.nn.torch_modules import TorchLayer, as_layers  # noqa: E402
from mpiml.nn.torch_state import load_into  # noqa: E402
from mpiml.nn.torch_tensors import as_tensor  # noqa: E402
from mpiml.random import keyed  # noqa: E402

AT = nn.At(training=True, seed=3, step=5, microbatch=2)
Module, Sequential = torch.nn.Module, torch.nn.Sequential


class Odd(Module):
    """Parameters of all kinds: one number, used twice, tied, never used, constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.scale = torch.nn.Parameter(torch.tensor(1.5))
        self.unused = torch.nn.Parameter(torch.ones(3))
        self.fixed = torch.nn.Parameter(torch.full((6,), 0.5), requires_grad=False)
        self.register_buffer("offset", torch.arange(6.0))

    def forward(self, x: Any) -> Any:
        x = self.first(x) * self.scale + self.fixed
        return torch.tanh(self.second(x) * self.scale + self.offset).transpose(1, 2)


class Tokens(Module):
    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.token, self.place = torch.nn.Embedding(7, 6, sparse=sparse), torch.nn.Parameter(torch.zeros(5, 6))

    def forward(self, ids: Any) -> Any:
        return self.token(ids) + self.place[: ids.shape[1]]


class Lambda(Module):
    def __init__(self, f: Callable[[Any], Any], **own: Any):
        super().__init__()
        self.f = f
        for name, value in own.items():
            setattr(self, name, value)

    def forward(self, x: Any) -> Any:
        return self.f(x)


CASES: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (lambda: torch.nn.Linear(6, 4), (6,)),
    "convolution": (lambda: torch.nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 5, 4)),
    "a block": (
        lambda: Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.ReLU(inplace=True)),
        (2, 5, 4),
    ),
    "odd parameters": (Odd, (3, 6)),
    "writes to its input": (lambda: torch.nn.Hardtanh(-0.5, 0.5, inplace=True), (6,)),
    "writes to it at once": (lambda: Sequential(torch.nn.LeakyReLU(inplace=True), torch.nn.Linear(6, 4)), (6,)),
    "gives its input": (torch.nn.Identity, (6,)),
    "tokens": (Tokens, (5,)),
    "tokens, sparse gradient": (lambda: Tokens(sparse=True), (5,)),
    "batch norm without averages": (lambda: torch.nn.BatchNorm1d(6, track_running_stats=False), (6,)),
}


def prepared(layers: list[nn.Layer], dtype: str = "float64") -> Layout:
    nn.name(layers)
    layout = Layout(nn.parameters(layers), dtype)
    values = layout.zeros()
    layout.bind(values)
    layout.initialise(values, 0)
    return layout


def inputs(case: str, rows: int, dtype: str = "float64") -> np.ndarray:
    random, shape = np.random.default_rng(rows), (rows, *CASES[case][1])
    return (
        random.integers(0, 7, shape).astype(dtype) if "token" in case else random.standard_normal(shape).astype(dtype)
    )


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_plain_pytorch(case: str) -> None:
    """Of two micro-batches in flight, whose backward passes come in the other order."""
    with keyed(["PyTorch"], 0):
        plain = CASES[case][0]().double()
    with keyed(["PyTorch"], 0):
        (layer,) = as_layers([CASES[case][0]()], "float64", 1)
    layout = prepared([layer])
    flights = []
    for rows in (4, 3):
        x = inputs(case, rows)
        before = x.copy()
        y, backward = layer(x, AT)
        assert y.shape[1:] == layer.output_shape(x.shape[1:])
        flights.append((x, before, y, y.copy(), backward))
    for x, before, y, first_y, backward in reversed(flights):
        grads = Gradients(layout, layout.zeros() + 9)
        dy = np.random.default_rng(1).standard_normal(y.shape)
        dx = backward(dy, grads)
        tx = torch.tensor(before, dtype=torch.long if "token" in case else None)
        leaf = tx if "token" in case else tx.clone().requires_grad_()
        plain.zero_grad()
        ty = plain(leaf.clone())
        np.testing.assert_allclose(y, ty.detach(), rtol=1e-12, atol=1e-13)
        ty.backward(torch.from_numpy(dy))
        assert dx is None if "token" in case else np.allclose(dx, leaf.grad, rtol=1e-11, atol=1e-13)
        theirs = {name: tensor.grad for name, tensor in plain.named_parameters() if tensor.requires_grad}
        assert list(theirs) == list(layer.own_parameters())
        for name, parameter in layer.own_parameters().items():
            expected = 0 if theirs[name] is None else theirs[name].to_dense()
            np.testing.assert_allclose(grads[parameter], expected, rtol=1e-11, atol=1e-13, err_msg=name)
        np.testing.assert_array_equal(x, before)
        np.testing.assert_array_equal(y, first_y)


def placed(array: np.ndarray, offset: int) -> np.ndarray:
    """The same values elsewhere: in memory that begins so many bytes after a 64-byte boundary."""
    raw = np.zeros(array.nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    there = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    there[...] = array
    return there


@pytest.mark.parametrize("case", ["linear of 5 rows", "a block", "one row"])
def test_bits_do_not_depend_on_where_arrays_lie(case: str) -> None:
    module = torch.nn.Linear(256, 10) if case == "linear of 5 rows" else torch.nn.Conv2d(1, 8, 3)
    shape = (5, 256) if case == "linear of 5 rows" else (1 if case == "one row" else 3, 1, 9, 9)
    (layer,) = as_layers([module], "float32", 1)
    layout = prepared([layer], "float32")
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    dy = np.random.default_rng(1).standard_normal((shape[0], *layer.output_shape(shape[1:]))).astype("float32")
    results = []
    for offset in (0, 4, 16, 64):
        there, gradient = placed(x, offset), placed(dy, offset)
        there.flags.writeable = offset != 16
        if offset == 64:  # an axis of length 1 may have any stride
            strides = [s if n > 1 else 4 * 10**6 for s, n in zip(there.strides, there.shape, strict=True)]
            there = np.lib.stride_tricks.as_strided(there, there.shape, strides)
        assert as_tensor(there).stride() == torch.empty(shape).stride()
        assert np.shares_memory(as_tensor(there).numpy(), there) == (offset in (0, 64))
        y, backward = layer(there, AT)
        grads = Gradients(layout, layout.zeros())
        dx = backward(gradient, grads)
        results.append((y.tobytes(), dx.tobytes(), grads.vector.tobytes()))
    assert len(set(results)) == 1
    layer.needs_dx = False
    y, backward = layer(x, AT)
    assert backward(dy, grads) is None
    assert grads.vector.tobytes() == results[0][2]


def test_evaluation_draws_nothing_and_writes_nothing() -> None:
    module = Sequential(torch.nn.ReLU(inplace=True), torch.nn.Dropout(0.5))
    layers = as_layers([module], "float32", 1)
    prepared(layers, "float32")
    x = np.linspace(-1, 1, 64, dtype=np.float32).reshape(4, 16)
    y, _ = layers[0](x, nn.At(training=False))
    np.testing.assert_array_equal(y, np.maximum(x, 0))
    assert x.min() == -1
    y, _ = layers[0](x, AT)
    assert (y != np.maximum(x, 0)).any()
    assert x.min() == -1


def test_what_is_drawn_depends_on_seed_place_step_and_micro_batch_alone() -> None:
    layers = as_layers([torch.nn.Dropout(0.5), torch.nn.Dropout(0.5)], "float32", 1)
    prepared(layers, "float32")
    x = np.ones((4, 64), np.float32)
    before = torch.get_rng_state()
    places = [(layers[0], AT), (layers[1], AT)]
    places += [(layers[0], nn.At(True, *key)) for key in ((4, 5, 2), (3, 6, 2), (3, 5, 1))]
    first = [layer(x, at)[0].tobytes() for layer, at in places]
    assert len(set(first)) == len(places)
    torch.rand(7)
    assert [layer(x, at)[0].tobytes() for layer, at in reversed(places)] == first[::-1]
    torch.set_rng_state(before)
    layers[0](x, AT)
    assert torch.equal(torch.get_rng_state(), before)


def test_parameters_are_views_of_the_values_and_nothing_else_is_kept() -> None:
    layers = as_layers(Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)), "float32", 1)
    nn.name(layers)
    assert [p.name for p in nn.parameters(layers)] == [f"layers.{n}.{p}" for n in (0, 1) for p in ("weight", "bias")]
    layout, other = (Layout(nn.parameters([layer]), "float32") for layer in layers)
    values = layout.zeros()
    layout.bind(values)
    first = layers[0].module.weight.detach().clone()
    layout.initialise(values, 0)
    np.testing.assert_array_equal(layout.parameters[0].value, first)
    layers[0](np.ones((3, 6), np.float32), AT)
    for parameter, tensor in zip(layout.parameters, layers[0].module.parameters(), strict=True):
        assert tensor.data_ptr() == parameter.value.ctypes.data
    elsewhere = values + 1  # other values, as of a checkpoint that is evaluated
    layout.bind(elsewhere)
    y, _ = layers[0](np.ones((3, 6), np.float32), AT)
    np.testing.assert_allclose(
        y, np.ones((3, 6)) @ layout.parameters[0].value.T + layout.parameters[1].value, rtol=1e-6
    )
    module, weight = weakref.ref(layers[1].module), weakref.ref(layers[1].module.weight)
    del layers[1], tensor
    gc.collect()
    assert (module(), weight()) == (None, None)  # of another stage: its layout is all that stays
    assert other.size == 48


OWN: Any = {"loss": "my:loss", "metric": "my:metric"}  # which take outputs of any shape


def build(made: Any, shape: tuple[int, ...] = (6,), outputs: int = 4, seed: int = 0) -> list[nn.Layer]:
    return model_for(Config(seed=seed, **OWN), Task(shape, (), True, outputs, 0), made)


@pytest.mark.parametrize(("dtype", "complex_"), [("float32", torch.complex64), ("float64", torch.complex128)])
def test_only_real_numbers_become_those_of_the_run(dtype: str, complex_: Any) -> None:
    module = Lambda(lambda x: x * module.turn.real)
    turn = torch.polar(torch.ones(6), torch.arange(6.0)).conj()
    for name, values in {"turn": turn, "low": torch.ones(2).half(), "places": torch.arange(6)}.items():
        module.register_buffer(name, values.clone())
    module.still = torch.nn.Parameter(turn.clone(), requires_grad=False)
    (layer,) = as_layers([module], dtype, 1)
    assert torch.equal(module.turn, turn.to(complex_))
    assert torch.equal(module.still, turn.to(complex_))
    kinds = {name: tensor.dtype for name, tensor in module.named_buffers()}
    assert kinds == {"turn": complex_, "low": getattr(torch, dtype), "places": torch.int64}
    assert layer.output_shape((6,)) == (6,)
    nn.name([layer])
    assert described([layer], 0)


def test_a_sequential_is_cut_between_its_children() -> None:
    relu = torch.nn.ReLU()
    layers = build(Sequential(torch.nn.Linear(6, 5), relu, torch.nn.Linear(5, 5), relu, torch.nn.Linear(5, 4)))
    assert len(layers) == 5
    assert [layer.needs_dx for layer in layers] == [False, True, True, True, True]
    assert nn.stack_shapes(layers, (6,)) == [(6,), (5,), (5,), (5,), (5,), (4,)]
    assert nn.stack_flops(layers, (6,)) == [66, 5, 55, 5, 45]

    class Sum(Sequential):
        def forward(self, x: Any) -> Any:
            return super().forward(x) + x

    assert len(build(Sum(torch.nn.Linear(6, 6), torch.nn.Tanh()))) == 1
    assert len(build(torch.nn.Linear(6, 4))) == 1
    mixed = build([nn.Linear(6, 5), torch.nn.Linear(5, 5), nn.Tanh(), Sequential(torch.nn.Linear(5, 4))])
    assert [type(layer) for layer in mixed] == [nn.Linear, TorchLayer, nn.Tanh, TorchLayer]


def test_first_values_follow_the_seed() -> None:
    def made(seed: int) -> Any:
        torch.rand(3)
        layers = build(lambda shape, outputs: torch.nn.Linear(*shape, outputs), seed=seed)
        return layers[0].module.weight.detach().clone(), described(layers, 0)

    (one, text), (same, same_text), (other, other_text) = made(1), made(1), made(2)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert text == same_text != other_text


def test_what_modules_are_made_of_is_compared_between_ranks() -> None:
    class Modes(torch.nn.Module):
        def __init__(self, index: list[int], offset: float):
            super().__init__()
            self.index = index
            self.register_buffer("offset", torch.tensor(offset))
            self.net = torch.nn.Linear(2, 4)

        def forward(self, x: Any) -> Any:
            return self.net(x[:, self.index] + self.offset)

    def text(index: list[int], offset: float = 0.0) -> Any:
        with keyed(["PyTorch"], 0):
            return described(build(Sequential(Modes(index, offset), torch.nn.Tanh())), 0)

    assert text([1, 4]) == text([1, 4])
    differing = [name for name, value in text([1, 4]).items() if value != text([1, 5])[name]]
    assert differing == ["the model, layers.0"]
    differing = [name for name, value in text([1, 4]).items() if value != text([1, 4], 0.5)[name]]
    assert differing == ["the model, layers.0.offset"]


def test_constants_are_what_training_does_not_change() -> None:
    def checksums(change: str = "") -> dict[str, str]:
        with keyed(["PyTorch"], 0):
            module = Odd()
        for name in change.split():
            module.get_parameter(name).data += 1
        return {name: own.checksum for name, own in constants(build([module], (3, 6))).items()}

    assert list(checksums()) == ["layers.0.fixed", "layers.0.offset"]
    assert checksums("first.weight second.bias") == checksums()
    assert constants([nn.Linear(6, 4)]) == {}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: [torch.nn.Embedding(4, 4, max_norm=1.0)], ["changes weight"]),
        (lambda: torch.nn.LazyLinear(4), ["weight has no shape"]),
        (lambda: torch.nn.Linear(6, 4, device="meta"), ["on meta", "CPU"]),
        (lambda: Sequential(torch.nn.BatchNorm1d(6, affine=False)), ["no parameters"]),
        (
            lambda: torch.nn.Linear(7, 4),
            ["does not fit the data", "layers.0, Linear, cannot take rows of shape (6,)", "7"],
        ),
        (lambda: Sequential(Tokens(), torch.nn.Linear(6, 4)), ["(6,)", "size of tensor a (6)"]),
        (lambda: torch.nn.LSTM(6, 4), ["returns a tuple"]),
        (lambda: torch.nn.Flatten(0), ["shape (12,)"]),
        (lambda: Lambda(lambda x: x.argmax(1)), ["torch.int64"]),
        (lambda: torch.nn.ModuleList([torch.nn.Linear(6, 4)]), ["ModuleList", "forward"]),
        (Sequential, ["no layers"]),
    ],
)
def test_what_cannot_be_trained_is_refused(make: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        build(make())
    assert all(word in str(error.value) for word in words), str(error.value)
    assert ("changes" in str(error.value)) + ("cannot take rows" in str(error.value)) < 2


@pytest.mark.parametrize("outputs", [1, 2, 3, 6])
def test_rows_are_never_taken_for_another_axis(outputs: int) -> None:
    for mixed in (lambda x: x.t(), lambda x: x @ x.t()):
        with pytest.raises(ConfigError, match=r"for [24] rows it returns torch.float32 of shape"):
            build([torch.nn.Linear(6, outputs), Lambda(mixed)])


def test_what_gets_no_gradient_is_refused() -> None:
    class Cut(torch.nn.Linear):
        def forward(self, x: Any) -> Any:
            return super().forward(x).detach()

    halves = [torch.nn.Linear(6, 5), Lambda(lambda x: x.detach()), torch.nn.Linear(5, 4)]
    for made, words in (
        (Cut(6, 4), "layers.0, Cut, gives no gradient to any of its parameters"),
        (Sequential(*halves), "layers.1, Lambda, gives no gradient to the layers before it"),
        (Sequential(torch.nn.ReLU()), "the model has no parameters"),
        (torch.nn.Linear(6, 4).requires_grad_(False), "the model has no parameters"),
        ([nn.Tanh()], "the model has no parameters"),
    ):
        with pytest.raises(ConfigError, match=words):
            build(made)
    build(Sequential(*halves[1:], torch.nn.Linear(4, 4)), (5,))  # nobody reads that gradient
    build(Sequential(halves[0].requires_grad_(False), *halves[1:]))


def test_token_ids_must_have_a_vector_each() -> None:
    class Places(Module):
        """A table for token ids and one, which is smaller, for places."""

        def __init__(self) -> None:
            super().__init__()
            self.token, self.place = torch.nn.Embedding(7, 6), torch.nn.Embedding(5, 6)

        def forward(self, ids: Any) -> Any:
            return self.token(ids) + self.place(torch.arange(5))

    def made(model: Any, tokens: int) -> list[nn.Layer]:
        return model_for(Config(**OWN), Task((5,), (), True, 7, tokens), model)

    for model, name in (
        (torch.nn.Embedding(7, 6), r"layers.0, Embedding, cannot take token ids up to 7: Embedding\(7, 6\)"),
        (Sequential(torch.nn.Identity(), Places()), r"layers.1, Places, .* ids up to 7: Embedding\(7, 6\), Em"),
        ([nn.Embedding(7, 6)], r"layers.0, Embedding\(7, 6\), has no vector for .* above 6; they go up to 7"),
    ):
        made(model, 7)
        made(model, 0)
        with pytest.raises(ConfigError, match=name):
            made(model, 8)


def test_an_error_in_ones_own_code_stays_what_it_is() -> None:
    with pytest.raises(AttributeError):
        build(Lambda(lambda x: x.no_such_thing))


def test_weights_go_back_into_a_module(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    def make() -> Any:
        return Sequential(torch.nn.Linear(6, 5), Odd(), torch.nn.Linear(5, 4))

    source = make()
    names = {f"layers.{name}": p.detach().numpy() for name, p in source.named_parameters() if p.requires_grad}
    save_file(names, tmp_path / "whole")
    target = make()
    assert load_into(target, tmp_path / "whole") is target
    state = target.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in source.state_dict().items())
    with pytest.raises(ValueError, match=r"another model: layers\.0\.weight is \(5, 6\) in it, and \(5, 7\) here"):
        load_into([torch.nn.Linear(7, 5)], tmp_path / "whole")
    with pytest.raises(ValueError, match=r"layers\.1\.weight is not in it, and \(5, 6\) here"):
        load_into([nn.Linear(6, 5), torch.nn.Linear(6, 5)], tmp_path / "whole")
    with pytest.raises(ValueError, match=r"another model: layers\.2\.bias is in it, and not here"):
        load_into(source[:2], tmp_path / "whole")
    with pytest.raises(OutputError, match="is not a regular file"):
        load_into(make(), tmp_path)


def test_pytorch_is_not_imported_for_other_models() -> None:
    import subprocess

    code = "import sys, mpiml.train, mpiml.training.model; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def block() -> Any:
    return Sequential(torch.nn.Linear(6, 6), torch.nn.BatchNorm1d(6), torch.nn.Tanh())


def blocks(again: bool = False) -> list[Any]:
    """Three modules, of which the first may be computed again in its backward pass."""
    made = [block(), block(), torch.nn.Linear(6, 4)]
    checkpoint = torch.utils.checkpoint.checkpoint
    return [Lambda(lambda x: checkpoint(made[0], x, use_reentrant=True), own=made[0]), *made[1:]] if again else made


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("frozen", [{0}, {1}, {2}, {0, 1}, {0, 2}, {1, 2}])
def test_frozen_modules_are_constants_to_autograd(frozen: set[int], again: bool, stacked: bool) -> None:
    """Their running averages go on, nothing is worked out for their parameters, and the modules are as they were."""
    task, x = Task((6,), (), True, 4, 0), np.random.default_rng(0).standard_normal((5, 6))
    with keyed(["PyTorch"], 0):
        plain = Sequential(*blocks()).double()
    with keyed(["PyTorch"], 0):
        rates = tuple(f"layers.{index}=0" for index in frozen)
        layers = model_for(Config(rates=rates, dtype="float64"), task, blocks(again))
    for index in frozen:
        plain[index].requires_grad_(False)
    layout = Layout(nn.parameters(layers), "float64")
    layout.bind(values := layout.zeros())
    layout.initialise(values, 0)
    before = values.copy()
    gradient = layout.zeros(gradients=True)
    y, backward = nn.forward(stack(layers) if stacked else layers, x, AT)
    backward(np.ones_like(y), grads := Gradients(layout, gradient))
    plain(torch.from_numpy(x)).sum().backward()
    named = {name.replace("own.", ""): tensor for name, tensor in plain.named_parameters()}
    for parameter in layout.parameters:
        name = parameter.name.removeprefix("layers.").replace("own.", "")
        if parameter.momentum is not None:
            buffer = dict(plain.named_buffers())[name].double().numpy()
            np.testing.assert_allclose(grads[parameter] / 5, buffer, rtol=1e-12)
        elif not parameter.frozen:
            np.testing.assert_array_equal(grads[parameter], named[name].grad.numpy())
    assert "unread" not in vars(layout)
    assert values.tobytes() == before.tobytes()
    for layer in layers:
        assert all(tensor.requires_grad and tensor.grad is None for tensor in layer.tensors.values())


def test_nothing_is_kept_of_what_is_frozen_at_the_beginning() -> None:
    """No graph is made for it, even where parameters are only reached if the rows need a gradient."""
    for again in (False, True):
        layers = model_for(Config(rates=("layers.0=0",)), Task((6,), (), True, 4, 0), blocks(again))
        layout = prepared(layers, "float32")
        y, observed = layers[0].forward(torch.zeros(5, 6), AT)
        assert not y.requires_grad
        assert observed
        assert layout.updated < layout.size
