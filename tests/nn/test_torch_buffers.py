"""What PyTorch modules keep besides parameters: buffers that a forward pass changes, flags, other attributes, names."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mpiml import vectors
from mpiml.config import Config
from mpiml.errors import ConfigError
from mpiml.nn import layers as nn
from mpiml.nn.base import skip_first_dx
from mpiml.nn.parameters import Gradients, Layout, Statistic
from mpiml.training.model import described, model_for
from mpiml.training.stages import cut
from mpiml.training.task import Task

torch = pytest.importorskip("torch")
from torch.utils.checkpoint import checkpoint  # noqa: E402

from mpiml.nn.torch_modules import TorchLayer, as_layers  # noqa: E402
from mpiml.nn.torch_state import load_into  # noqa: E402

Module, Sequential, Linear = torch.nn.Module, torch.nn.Sequential, torch.nn.Linear
OWN: Any = {"loss": "my:loss", "metric": "my:metric"}  # which take outputs of any shape


class Calls(Module):
    """A module whose forward pass is a function of itself and x; other keywords become attributes, tensors buffers."""

    def __init__(self, f: Callable[[Any, Any], Any], **own: Any):
        super().__init__()
        self.f, self.linear = f, Linear(6, 4)
        for name, value in own.items():
            if isinstance(value, torch.Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Any) -> Any:
        return self.f(self, x)


def build(made: Any, shape: tuple[int, ...] = (6,)) -> list[Any]:
    return model_for(Config(**OWN), Task(shape, (), True, 4, 0), made)


class Training:
    """Layers with their values, trained by hand: only the running averages change."""

    def __init__(self, made: Any, dtype: str = "float64"):
        self.layers = as_layers(made, dtype, 1)
        nn.name(self.layers)
        nn.stack_shapes(self.layers, (6,))
        skip_first_dx(self.layers)
        self.layout = Layout(nn.parameters(self.layers), dtype)
        self.values = self.layout.zeros()
        self.layout.bind(self.values)
        self.layout.initialise(self.values, 0)

    def step(self, step: int, *batches: Any) -> list[Any]:
        """All micro-batches are in flight at once. Returns the gradient of each."""
        flights = [nn.forward(self.layers, x, nn.At(True, 0, step, m)) for m, x in enumerate(batches)]
        vectors_ = []
        for y, backward in reversed(flights):
            vectors_.append(self.layout.zeros() + 9)
            backward(np.ones_like(y), Gradients(self.layout, vectors_[-1]))
        total, rows = sum(vectors_), sum(map(len, batches))
        for piece in self.layout.blocks():
            if piece.momentum is not None:
                value, part = (vector[piece.start : piece.stop] for vector in (self.values, total))
                scratch = (part, np.empty_like(part))
                vectors.average(vectors.Operands(value, [], scratch, part, False), rows, piece.momentum)
        return vectors_[::-1]

    def state(self) -> dict[str, Any]:
        return {p.name: p.value for p in self.layout.parameters if isinstance(p, Statistic)}


def rows(*sizes: int) -> list[Any]:
    return [np.random.default_rng(n).standard_normal((n, 6)) + n for n in sizes]


def remember(self: Any, x: Any) -> Any:
    if self.training:
        with torch.no_grad():
            self.seen.mul_(0.5).add_(x.mean(0))
            self.calls += 1
            self.turn.mul_(1j)
            self.odd.logical_not_()
    return self.linear(x - self.seen)


def remembering() -> Any:
    kept = {"seen": torch.ones(6), "calls": torch.tensor(3), "turn": torch.ones(2) + 0j, "odd": torch.tensor(True)}
    return Calls(remember, **kept)


def test_a_buffer_becomes_the_mean_over_rows_of_what_micro_batches_make_of_it() -> None:
    training = Training([remembering()])
    x, y = rows(2, 6)
    training.step(1, x, y)
    state = training.state()
    assert list(state) == ["layers.0.seen", "layers.0.calls", "layers.0.turn", "layers.0.odd"]
    mean = (2 * (0.5 + x.mean(0)) + 6 * (0.5 + y.mean(0))) / 8
    np.testing.assert_allclose(state["layers.0.seen"], mean, rtol=1e-12)
    np.testing.assert_allclose(state["layers.0.turn"], [[0, 1]] * 2, atol=1e-7)
    assert (state["layers.0.calls"], state["layers.0.odd"]) == (4, 0)
    training.step(2, x)
    assert (state["layers.0.calls"], state["layers.0.odd"]) == (5, 1)
    before = training.values.copy()
    one, _ = nn.forward(training.layers, x, nn.At(False))
    module = training.layers[0].module
    expected = module.linear(torch.from_numpy(x - state["layers.0.seen"])).detach()
    np.testing.assert_array_equal(one, expected)
    np.testing.assert_array_equal(training.values, before)


@pytest.mark.parametrize("inplace", [True, False])
def test_a_frozen_copy_may_follow_a_part(inplace: bool) -> None:
    def follow(self: Any, x: Any) -> Any:
        if self.training:
            for own, other in zip(self.teacher.parameters(), self.linear.parameters(), strict=True):
                if inplace:
                    own.data.mul_(0.5).add_(other.data, alpha=0.5)
                else:
                    own.data = own.data * 0.5 + other.data * 0.5
        return self.linear(x) + self.teacher(x).detach()

    def made() -> Any:
        module = Calls(follow)
        module.teacher = copy.deepcopy(module.linear).requires_grad_(False)
        return module

    training = Training([made()])
    assert list(training.state()) == ["layers.0.teacher.weight", "layers.0.teacher.bias"]
    first, weight = training.state()["layers.0.teacher.weight"].copy(), training.layers[0].parameters["linear.weight"]
    weight.value[:] = 1
    training.step(1, *rows(2, 6))
    np.testing.assert_allclose(training.state()["layers.0.teacher.weight"], first * 0.5 + 0.5, rtol=1e-12)
    assert isinstance(training.layers[0].module.teacher.weight, torch.nn.Parameter)


def test_whole_numbers_stay_whole_and_values_that_stay_do_not_drift() -> None:
    def rewrite(self: Any, x: Any) -> Any:
        self.kept = self.kept.clone()
        return self.norm(self.linear(x))

    training = Training([Calls(rewrite, kept=torch.rand(64), norm=torch.nn.BatchNorm1d(4))], "float32")
    state, first = training.state(), training.state()["layers.0.kept"].copy()
    for step in range(1, 200):
        training.step(step, *(x.astype("f4") for x in rows(3, 7, 39)))
        assert abs(float(state["layers.0.norm.num_batches_tracked"]) - step) < 1e-4
    np.testing.assert_allclose(state["layers.0.kept"], first, rtol=3e-6)
    for off in (-0.01, 0.02):
        state["layers.0.norm.num_batches_tracked"][...] += off
        nn.forward(training.layers, rows(2)[0].astype("f4"), nn.At(False))
        assert training.layers[0].module.norm.num_batches_tracked == 199


def test_a_buffer_may_begin_as_infinity() -> None:
    def lowest(self: Any, x: Any) -> Any:
        self.low = torch.minimum(self.low, x.detach().min())
        return self.linear(x)

    training = Training([Calls(lowest, low=torch.tensor(float("inf")))])
    (x,) = rows(4)
    training.step(1, x)
    np.testing.assert_allclose(training.state()["layers.0.low"], x.min(), rtol=1e-12)


def test_averages_of_torch_count_even_where_a_trial_does_not_come_by() -> None:
    def rarely(self: Any, x: Any) -> Any:
        return self.linear(self.norm(x) if x.max() > 1000 else x)

    training = Training([Calls(rarely, norm=torch.nn.BatchNorm1d(6))])
    assert len(training.state()) == 3
    training.step(1, *rows(4))
    training.step(2, *rows(2000))
    assert training.state()["layers.0.norm.num_batches_tracked"] == 1


def test_gradients_that_a_module_comes_with_are_not_added() -> None:
    training = Training([Calls(lambda self, x: self.linear(x))])
    (first,) = training.step(1, *rows(4))
    training.layers[0].module.linear.weight.grad = torch.ones(4, 6, dtype=torch.float64)
    np.testing.assert_array_equal(training.step(1, *rows(4))[0], first)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("place", ["first", "later"])
def test_a_forward_pass_that_is_computed_again_counts_once(reentrant: bool, place: str) -> None:
    def run(again: bool) -> tuple[list[Any], dict[str, Any]]:
        torch.manual_seed(0)
        block = Sequential(torch.nn.utils.spectral_norm(Linear(6, 6)), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.5))

        def forward(self: Any, x: Any) -> Any:
            x = self.before(x) if place == "later" else x
            return self.linear(checkpoint(self.block, x, use_reentrant=reentrant) if again else self.block(x))

        training = Training([Calls(forward, before=Linear(6, 6), block=block)])
        gradients = training.step(1, *rows(4, 3)) + training.step(2, *rows(5, 4))
        return gradients, training.state()

    (plain, state), (other, other_state) = run(False), run(True)
    for one, two in zip(plain, other, strict=True):
        np.testing.assert_array_equal(one, two)
    assert state.keys() == other_state.keys() == {f"layers.0.block.{n}" for n in STATE}
    for name in state:
        np.testing.assert_array_equal(state[name], other_state[name])


STATE = ("0.weight_u", "0.weight_v", "1.running_mean", "1.running_var", "1.num_batches_tracked")


def test_averages_are_seen_where_no_gradient_goes() -> None:
    """In front of all that is optimised, and where all of a layer is constant but its averages."""
    frozen = Linear(6, 6).requires_grad_(False)
    norm = torch.nn.BatchNorm1d(6).requires_grad_(False)
    training = Training(
        Sequential(torch.nn.BatchNorm1d(6, affine=False), torch.nn.Identity(), frozen, norm, Linear(6, 4))
    )
    assert [layer.needs_dx for layer in training.layers] == [False] * 5
    (x,) = rows(5)
    training.step(1, x)
    np.testing.assert_allclose(training.state()["layers.0.running_mean"], 0.1 * x.mean(0), rtol=1e-6)
    assert training.state()["layers.3.num_batches_tracked"] == 1
    with pytest.raises(ConfigError, match="gives no gradient to the layers before it"):
        build(Sequential(Linear(6, 6), Calls(lambda self, x: self.linear(x.detach()))))


def test_a_buffer_that_changes_later_ends_the_run() -> None:
    def rarely(self: Any, x: Any) -> Any:
        if x.max() > 1000:
            self.clipped += 1
        return self.linear(x)

    training = Training([Calls(rarely, clipped=torch.zeros(()))])
    assert training.state() == {}
    training.step(1, *rows(4))
    with pytest.raises(ConfigError, match=r"layers.0, Calls, changes its clipped in step 2, .* must write to it"):
        training.step(2, *rows(2000))


def test_layers_that_the_function_has_frozen_stay_so() -> None:
    def net(part: Any) -> Any:
        return Sequential(Linear(6, 6), part, Linear(6, 4))

    frozen = net(torch.nn.BatchNorm1d(6).eval())
    inner = Sequential(net(Sequential(torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.5)).eval()))

    class Own(Sequential):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self[1].eval()
            return self

    own = Own(Linear(6, 6), torch.nn.BatchNorm1d(6), Linear(6, 4))
    for made, note in ((frozen, "layers.1, BatchNorm1d, stays in"), (own, "layers.1, B"), (inner, "its parts 1, 1.0")):
        training = Training(made)
        assert training.state() == {}
        assert any(note in text for layer in training.layers for text in layer.notes)
        y, _ = nn.forward(training.layers, rows(4)[0], nn.At(True))
        np.testing.assert_array_equal(y, nn.forward(training.layers, rows(4)[0], nn.At(False))[0])
    for made in (net(torch.nn.BatchNorm1d(6)).eval(), [part.eval() for part in net(torch.nn.BatchNorm1d(6))]):
        training = Training(made)  # all of it: as models come from a hub
        assert len(training.state()) == 3
        assert not any(layer.notes for layer in training.layers)


def test_train_that_changes_weights_is_not_called_between_steps() -> None:
    class Merging(Linear):
        def train(self, mode: bool = True) -> Any:
            with torch.no_grad():
                self.weight += 0 if mode == self.training else 1.0 - 2 * mode
            return super().train(mode)

    training = Training([Merging(6, 4)])
    before = training.values.copy()
    for step, (x,) in enumerate(itertools.repeat(rows(4), 3)):
        training.step(step, x)
        nn.forward(training.layers, x, nn.At(False))
    np.testing.assert_array_equal(training.values, before)


@pytest.mark.parametrize("inner", [False, True])
def test_compiled_modules_have_the_names_of_others(inner: bool, tmp_path: Any) -> None:
    def net(compiled: bool) -> Any:
        torch.manual_seed(0)
        made = Sequential(Linear(6, 6), torch.nn.BatchNorm1d(6), Linear(6, 4))
        if inner and compiled:
            made[0] = torch.compile(made[0], backend="eager")
        return torch.compile(made, backend="eager") if compiled and not inner else made

    plain, compiled = build(net(False)), build(net(True))
    assert described(plain, 0) == described(compiled, 0)
    assert isinstance(compiled[0].module, torch._dynamo.OptimizedModule)
    y, z = (nn.forward(Training(net(c)).layers, rows(4)[0], nn.At(True))[0] for c in (False, True))
    np.testing.assert_allclose(y, z, rtol=1e-12)
    with pytest.raises(ConfigError) as error:
        build(torch.compile(Linear(7, 4), backend="eager"))
    assert "layers.0, Linear, cannot take rows" in str(error.value)


def test_a_compiler_that_fails_is_found_before_step_1() -> None:
    def broken(*_: Any) -> Any:
        raise OSError("no compiler\nhere")

    torch.compiler.reset()  # what another test has compiled would do
    with pytest.raises(ConfigError, match=r"layers.0, Linear, cannot be compiled: .*no compiler here"):
        build([torch.compile(Linear(6, 4), backend=broken)])


def test_complex_parameters_are_pairs_of_real_ones() -> None:
    class Wave(Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(6, 3, dtype=torch.cfloat))
            self.turn = torch.nn.Parameter(torch.tensor(1 + 2j))

        def forward(self, x: Any) -> Any:
            return torch.view_as_real((x.to(self.weight.dtype) @ self.weight) * self.turn).flatten(1)

    module = Wave()
    weight, turn = module.weight.detach().clone(), module.turn.detach().clone()
    training = Training([module])
    assert [(p.shape, p.decay) for p in training.layout.parameters] == [((6, 3, 2), True), ((2,), False)]
    (x,) = rows(4)
    (vector,) = training.step(1, x)
    theirs = [t.to(torch.complex128).requires_grad_() for t in (weight, turn)]
    ((torch.from_numpy(x).to(torch.complex128) @ theirs[0]) * theirs[1]).real.sum().backward(retain_graph=True)
    y = torch.view_as_real((torch.from_numpy(x).to(torch.complex128) @ theirs[0]) * theirs[1])
    for tensor in theirs:
        tensor.grad = None
    y.sum().backward()
    for (_, gradient), tensor in zip(training.layout.views(vector), theirs, strict=True):
        np.testing.assert_allclose(gradient, torch.view_as_real(tensor.grad), rtol=1e-12)


def tied() -> Any:
    one, other = Linear(6, 6), Linear(6, 6)
    other.weight = one.weight
    return Sequential(torch.nn.Identity(), one, torch.nn.ReLU(), other, Linear(6, 4))


def test_children_that_share_parameters_are_one_layer(tmp_path: Any) -> None:
    from safetensors.numpy import save_file

    text = "parts 1 to 3 of the model share weight: they are one layer"
    layers = build(tied())
    assert [type(layer) for layer in layers] == [TorchLayer] * 3
    assert layers[1].notes == [text]
    assert list(layers[1].own_parameters()) == ["0.weight", "0.bias", "2.bias"]
    with pytest.raises(ConfigError, match=rf"--cuts 3: .* \(3 layers\); {text}"):
        cut(Config(cuts=(3,), pipe=2), layers, (6,))
    norm = torch.nn.BatchNorm1d(6, affine=False)
    assert len(build(Sequential(Linear(6, 6), norm, torch.nn.ReLU(), norm, Linear(6, 4)))) == 3
    chain = Sequential(*(Linear(6, 6) for _ in range(4)), Linear(6, 4))
    chain[2].weight, chain[3].weight = chain[0].weight, chain[1].weight
    assert [layer.joined for layer in build(chain)] == [
        "parts 0 to 3 of the model share weight: they are one layer",
        "",
    ]
    module = tied()
    names = {"0.weight": module[1].weight, "0.bias": module[1].bias, "2.bias": module[3].bias}
    arrays = {f"layers.1.{n}": t.detach().numpy() for n, t in names.items()}
    arrays |= {f"layers.2.{n}": t.detach().numpy() for n, t in module[4].named_parameters()}
    save_file(arrays, tmp_path / "saved")
    assert torch.equal(load_into(tied(), tmp_path / "saved")[3].weight, module[3].weight)
    one, _, other = tied()[1:4]
    with pytest.raises(ConfigError, match="layers 0 and 2 of the model share weight"):
        build([one, nn.Tanh(), other])


def test_only_generators_that_are_drawn_from_are_keyed(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: dict[str, tuple[Any, set[str]]] = {
        "none": (lambda self, x: self.linear(x), set()),
        "dropout": (lambda self, x: torch.nn.functional.dropout(self.linear(x), 0.5, self.training), {"PyTorch"}),
        "depth": (lambda self, x: self.linear(x) * (random.random() < 0.5 or not self.training), {"Python"}),
        "always": (lambda self, x: self.linear(x) + np.random.gumbel(), {"NumPy"}),
    }
    x = rows(5)[0]
    for case, (f, which) in cases.items():
        training = Training([Calls(f)])
        (trial,) = training.layers[0]._trials.values()
        assert trial.draws == which, case
        outputs = {m: nn.forward(training.layers, x, nn.At(True, 1, 1, m))[0].tobytes() for m in range(8)}
        np.random.seed(None)
        random.seed()
        assert outputs[5] == nn.forward(training.layers, x, nn.At(True, 1, 1, 5))[0].tobytes()
        assert (len(set(outputs.values())) > 1) == bool(which), case
