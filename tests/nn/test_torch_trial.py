"""The trial of a PyTorch module: it runs what training and evaluation will run, and says what is wrong in one line."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mpiml.errors import ConfigError
from mpiml.nn import layers as nn
from tests.nn.test_torch_buffers import Calls, Linear, Sequential, Training, build, rows

torch = pytest.importorskip("torch")

F = torch.nn.functional


def changed(change: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """A forward pass that first changes the module, and whose output depends on what comes of it."""

    def forward(self: Any, x: Any) -> Any:
        return self.linear(x) * change(self)

    return forward


def annealed(self: Any) -> float:
    self.steps += 1
    return 0.5**self.steps


def weaker_gradients(self: Any, x: Any) -> Any:
    y, self.steps = self.linear(x), self.steps + 1
    return y.detach() + (y - y.detach()) / self.steps


def in_training(self: Any, x: Any) -> Any:
    return self.linear(x) if self.training else self.other(self.linear(x))


def momentum_encoder(self: Any, x: Any) -> Any:
    self.pointer += len(x)
    return self.linear(x)


def initialised_by_data(self: Any, x: Any) -> Any:
    self.linear.bias.data -= x.mean() + 1
    return self.linear(x)


def clamped(self: Any, x: Any) -> Any:
    self.linear.bias.data = self.linear.bias.data.clamp(-9, 9)
    return self.linear(x)


def copied_at_times(self: Any, x: Any) -> Any:
    """In the first call, and in every hundredth."""
    if self.calls % 100 == 0:
        self.b = self.b.clone()
    self.calls += 1
    return self.linear(x)


def rising(self: Any, x: Any) -> Any:
    self.calls += 1
    return self.linear(x) * min(1, 0.5 + self.calls // 1000)


def made_when_called(self: Any, x: Any) -> Any:
    if not hasattr(self, "new"):
        self.new = torch.nn.Linear(4, 4, bias=False)
    return self.new(self.linear(x))


def images(self: Any, x: Any) -> Any:
    assert 0 <= x.min() <= x.max() <= 1
    return self.linear(x)


def not_empty(self: Any, x: Any) -> Any:
    assert x.any(dim=1).all()
    return self.linear(x)


def pairs(self: Any, x: Any) -> Any:
    assert len(x) % 2 == 0
    return self.linear(x)


def warming_up(self: Any, x: Any) -> Any:
    self.calls += 1
    self.b += 1 / self.calls
    return self.linear(x)


def growing(self: Any, x: Any) -> Any:
    self.b = self.b.repeat(2)
    return self.linear(x)


def table(self: Any, x: Any) -> Any:
    """It makes what it needs when it is first called."""
    if self.table is None:
        self.table = torch.linspace(0, 1, x.shape[1])
        self.register_buffer("more", torch.ones(6), persistent=False)
    return self.linear(x * self.table * self.more)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Calls(changed(annealed), steps=0), "other outputs .* changes its steps; make it a buffer"),
        (
            lambda: Calls(changed(lambda self: self.rng.normal()), rng=np.random.default_rng(0)),
            "changes its rng; draw from the generators of torch",
        ),
        (lambda: Calls(changed(lambda self: self.own.random()), own=random.Random(1)), "changes its own; draw"),
        (lambda: Calls(changed(lambda self: torch.rand(1, generator=self.g)), g=torch.Generator()), "its g; draw"),
        (lambda: Calls(changed(lambda self: self.seen.append(1) or len(self.seen)), seen=[]), "its seen; make"),
        (lambda: Calls(changed(lambda self: next(self.n)), n=itertools.count(1)), "changes its n; make"),
        (lambda: Calls(changed(lambda self: np.random.default_rng().normal())), "other outputs .* must follow from"),
        (lambda: Calls(weaker_gradients, steps=0), "or gradients .* changes its steps"),
        (lambda: Calls(in_training, other=lambda y: (y, y)), "in evaluation mode: it returns a tuple"),
        (
            lambda: Calls(lambda self, x: {"logits": self.linear(x), "loss": None}),
            r"is no layer: it returns a dict of logits \(2, 4\), loss NoneType, .* wrap it in a module",
        ),
        (lambda: Calls(lambda self, x: self.linear(x.view(-1, 4, 6)[:, 0])), "it was tried with 2 and 4 rows.: .* is"),
        (lambda: Calls(made_when_called), "makes its new.weight when it is called; .* in __init__"),
        (lambda: Calls(lambda self, x: self.linear(x.double())).double(), "as torch.float64 .* as torch.float32, by"),
        (lambda: Calls(in_training, other=lambda y: y[:, :2]), r"evaluation mode: for 2 rows .* \(2, 2\)"),
        (lambda: Calls(in_training, other=lambda y: y @ y), "evaluation mode: mat1 and mat2"),
        (lambda: Calls(momentum_encoder, pointer=torch.tensor(0)), "pointer, of integers, by what .* floating-point"),
        (lambda: Calls(initialised_by_data), "changes linear.bias in its forward pass, .* compute with a changed copy"),
        (lambda: Calls(clamped), "changes linear.bias in its forward pass"),
        (
            lambda: Calls(lambda self, x: [self.linear.bias.data.clamp_(-9, 9), self.linear(x)][1]),
            "changes linear.bias",
        ),
        (lambda: Calls(copied_at_times, b=torch.ones(2), calls=0), "or buffers.* because it changes its calls"),
        (lambda: Calls(rising, calls=0), "other outputs .* because it changes its calls; make it a buffer"),
        (lambda: Calls(warming_up, b=torch.ones(2), calls=0), "or buffers.* because it changes its calls"),
        (
            lambda: Calls(lambda self, x: setattr(self, "b", self.b.repeat(2)) or self.linear(x), b=torch.ones(2)),
            "shape",
        ),
        (
            lambda: Calls(lambda self, x: setattr(self, "b", None) or self.linear(x), b=torch.ones(2)),
            "its buffer b is None now; keep",
        ),
        (lambda: Calls(lambda self, x: self.linear(x) + self.k.add_(1) * 0, k=torch.tensor(2**53 + 1)), "such large"),
        (lambda: Calls(lambda self, x: Two.apply(self.linear(x))), "cannot take rows .* first line second line"),
    ],
)
def test_what_would_fail_later_is_refused_before_step_1(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"layers\.0, Calls, .*{words}") as error:
        build(make())
    assert "\n" not in str(error.value)


class Two(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x * 1

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("first line\nsecond line")


def test_an_error_of_ones_own_code_in_evaluation_says_where() -> None:
    with pytest.raises(AttributeError) as error:
        build(Calls(lambda self, x: self.linear(x) if self.training else self.nothing))
    assert any("in evaluation mode" in note for note in error.value.__notes__)


def counting(self: Any, x: Any) -> Any:
    self.calls += 1
    return self.linear(x)


def following(self: Any, x: Any) -> Any:
    self.mean = (0.9 * self.mean + 0.1 * x.mean(0)).detach()
    return self.linear(x - self.mean)


@pytest.mark.parametrize(
    ("make", "note"),
    [
        (lambda: Calls(table, table=None), "layers.0, Calls, keeps table from call to call; checkpoints do not hold"),
        (
            lambda: Linear(6, 4).bfloat16(),
            "layers.0, Linear,: its parameters come as torch.bfloat16 and are trained as torch.float32",
        ),
        (lambda: Calls(counting, calls=0), "layers.0, Calls, keeps calls from call to call"),
        (lambda: Calls(following, mean=torch.zeros(6)), "changes mean by what the rows are: a step takes the average"),
        (lambda: torch.nn.utils.spectral_norm(Linear(6, 4)), ""),
        (lambda: torch.nn.utils.parametrizations.spectral_norm(Linear(6, 4)), ""),
        (lambda: Sequential(Sequential(Linear(6, 4), torch.nn.BatchNorm1d(4))), ""),
    ],
)
def test_notes_say_what_outputs_do_not_show(make: Any, note: str) -> None:
    (layer,) = build(make())
    assert len(layer.notes) == bool(note)
    assert all(note in text for text in layer.notes)


def test_forces_are_gradients_of_an_energy() -> None:
    """The module calls autograd itself, where counting operations fails."""

    def forces(self: Any, x: Any) -> Any:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.linear(x).tanh().sum(), x, create_graph=self.training)[0]

    training = Training([Calls(forces)])
    (x,) = rows(5)
    (gradient,) = training.step(1, x)
    linear = training.layers[0].module.linear
    slope = 1 - torch.tanh(linear(torch.from_numpy(x))) ** 2
    weight, _ = torch.autograd.grad((slope @ linear.weight).sum(), (linear.weight, linear.bias))
    (view,) = (v for p, v in training.layout.views(gradient) if p.name.endswith("weight"))
    np.testing.assert_allclose(view, weight, rtol=1e-10)
    assert training.layers[0].flops((6,)) == 2 * 28 + 6


@pytest.mark.parametrize(
    ("make", "least"),
    [
        (lambda: Sequential(Linear(6, 4), torch.nn.BatchNorm1d(4)), 2),
        (
            lambda: Sequential(
                torch.nn.Unflatten(1, (1, 6)), torch.nn.BatchNorm1d(1), torch.nn.Flatten(), Linear(6, 4)
            ),
            1,
        ),
        (lambda: Calls(lambda self, x: self.linear(x).squeeze()), 2),
    ],
)
def test_how_many_rows_a_micro_batch_needs(make: Any, least: int) -> None:
    assert max(layer.least_rows for layer in build(Sequential(make()))) == least


@pytest.mark.parametrize(("forward", "least"), [(images, 1), (not_empty, 1), (pairs, 2)])
def test_rows_that_a_module_may_refuse_are_not_needed(forward: Any, least: int) -> None:
    (layer,) = build(Calls(forward))
    assert layer.least_rows == least


def test_rows_that_are_written_to_in_evaluation_alone_stay() -> None:
    training = Training([Calls(lambda self, x: self.linear(x if self.training else x.neg_()))])
    (x,) = rows(4)
    before = x.copy()
    nn.forward(training.layers, x, nn.At(False))
    np.testing.assert_array_equal(x, before)


def test_a_trial_leaves_no_trace() -> None:
    module = Sequential(Linear(6, 4), torch.nn.BatchNorm1d(4))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    own = dict(module.named_buffers())
    torch.manual_seed(1)
    build([module])
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(1)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(tensor is own[name] for name, tensor in module.named_buffers())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_what_a_backward_pass_draws_is_keyed() -> None:
    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x * 1

        @staticmethod
        def backward(ctx: Any, dy: Any) -> Any:  # type: ignore[override]
            return dy + torch.randn_like(dy)

    training = Training([Calls(lambda self, x: Noisy.apply(self.linear(x)))])
    first = [vector.tobytes() for vector in training.step(1, *rows(4, 4))]
    torch.rand(3)
    assert [vector.tobytes() for vector in training.step(1, *rows(4, 4))] == first
    assert len(set(first)) == 2
    assert isinstance(training.layers[0], nn.Layer)
