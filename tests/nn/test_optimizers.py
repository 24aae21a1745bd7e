"""Optimizers against their formulas, written once more here, one number at a time as in the papers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mpiml.nn import optimizers
from mpiml.vectors import Operands

NAMES = ("sgd", "momentum", "nesterov", "lars", "adam", "adamw", "lamb")
every_optimizer = pytest.mark.parametrize("name", NAMES)
STEPS, RATE, MOMENTUM = 6, 0.03, 0.8
Betas = tuple[float, float]
USUAL: Betas = (0.9, 0.999)


def gradients(size: int = 7) -> list[np.ndarray]:
    random = np.random.default_rng(5)
    return [random.standard_normal(size) * 10.0 ** random.integers(-6, 3, size) for _ in range(STEPS)]


def first_values(size: int = 7) -> np.ndarray:
    return np.random.default_rng(6).standard_normal(size)


def reference(
    name: str, value: float, gradients: list[float], decay: float, betas: Betas = USUAL, trust: float = 1.0
) -> float:
    """One number after all steps, in PyTorch's conventions."""
    velocity = m = v = 0.0
    for t, g in enumerate(gradients, 1):
        if name == "adamw":
            value = value - RATE * decay * value
        elif name != "lamb":
            g = trust * (g + decay * value)
        if name in ("adam", "adamw", "lamb"):
            b1, b2 = betas
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g**2
            unbiased_m, unbiased_v = m / (1 - b1**t), v / (1 - b2**t)
            if name == "lamb":
                value = value - RATE * trust * (unbiased_m / (math.sqrt(unbiased_v) + 1e-6) + decay * value)
                continue
            value = value - RATE * unbiased_m / (math.sqrt(unbiased_v) + 1e-8)
            continue
        velocity = MOMENTUM * velocity + g
        direction = {"sgd": g, "momentum": velocity, "lars": velocity, "nesterov": g + MOMENTUM * velocity}[name]
        value = value - RATE * direction
    return value


def run(
    name: str,
    weight_decay: float,
    pieces: list[slice],
    decay: bool = True,
    dtype: str = "float64",
    betas: Betas = USUAL,
    trust: float = 1.0,
) -> np.ndarray:
    """The package's values after all steps, updated piece by piece."""
    optimizer = optimizers.build(name, MOMENTUM, weight_decay, betas)
    size = pieces[-1].stop
    values = first_values(size).astype(dtype)
    states = [np.zeros(size, dtype) for _ in optimizer.states]
    for step, gradient in enumerate(gradients(size), 1):
        for piece in pieces:
            total = 4 * gradient[piece].astype(dtype)
            # What lies in scratch must not matter, and the total may be part of it.
            grad, spare = (np.full(len(total), np.nan, dtype) for _ in range(2))
            scratch = (total if step % 2 else grad, spare)
            if optimizer.layerwise:  # then the total is kept
                scratch = (grad, spare)
            on = Operands(values[piece], [s[piece] for s in states], scratch, total, decay, trust=trust)
            optimizer.prepare(on, 0.25, step)
            grad.fill(np.nan)
            optimizer.update(on, 0.25, RATE, step)
    return values


@every_optimizer
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_update_is_the_formula(name: str, weight_decay: float) -> None:
    columns = np.stack(gradients(), axis=1)
    expected = [reference(name, w, list(g), weight_decay) for w, g in zip(first_values(), columns, strict=True)]
    np.testing.assert_allclose(run(name, weight_decay, [slice(0, 7)]), expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["lars", "lamb"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_the_step_of_a_matrix_is_multiplied_by_its_trust_ratio(name: str, weight_decay: float) -> None:
    columns = np.stack(gradients(), axis=1)
    of_columns = zip(first_values(), columns, strict=True)
    expected = [reference(name, w, list(g), weight_decay, trust=0.3) for w, g in of_columns]
    np.testing.assert_allclose(run(name, weight_decay, [slice(0, 7)], trust=0.3), expected, rtol=1e-12)


def test_trust_ratios() -> None:
    """That of lars is of the mean gradient, and with weight decay."""
    lars, lamb = (optimizers.build(name, 0.9, 0.5) for name in ("lars", "lamb"))
    assert lars.trust_ratio(3.0, 8.0, 0.25) == pytest.approx(0.001 * 3 / (8 * 0.25 + 0.5 * 3 + 1e-8), rel=1e-14)
    assert lamb.trust_ratio(3.0, 8.0, 0.25) == 3 / 8
    tiny = np.float32(1e-40)
    for value, total in ((0.0, 2.0), (2.0, 0.0), (0.0, 0.0)):
        assert lars.trust_ratio(value, total, 0.25) == lamb.trust_ratio(value, total, 0.25) == 1
    assert np.isfinite(np.float32(lamb.trust_ratio(1.0, float(tiny), 1.0)))


@pytest.mark.parametrize("name", ["adam", "adamw", "lamb"])
@pytest.mark.parametrize("betas", [(0.8, 0.95), (0.0, 0.5), (0.95, 0.0)])
def test_betas_are_of_the_mean_and_of_the_variance(name: str, betas: Betas) -> None:
    columns = np.stack(gradients(), axis=1)
    expected = [reference(name, w, list(g), 0.2, betas) for w, g in zip(first_values(), columns, strict=True)]
    np.testing.assert_allclose(run(name, 0.2, [slice(0, 7)], betas=betas), expected, rtol=1e-12)


@every_optimizer
def test_a_piece_that_does_not_decay_is_updated_without(name: str) -> None:
    whole = [slice(0, 7)]
    np.testing.assert_array_equal(run(name, 0.2, whole, decay=False), run(name, 0.0, whole))
    assert not np.array_equal(run(name, 0.2, whole), run(name, 0.0, whole))


@every_optimizer
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_pieces_give_the_bits_of_the_whole(name: str, dtype: str) -> None:
    # Lengths and starts off every vector register's, so that remainder loops are met.
    cuts = [0, 1, 20, 53, 300, 301, 1003]
    pieces = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    whole = run(name, 0.2, [slice(0, 1003)], dtype=dtype)
    np.testing.assert_array_equal(run(name, 0.2, pieces, dtype=dtype), whole)
    assert np.isfinite(whole).all()


@every_optimizer
def test_no_gradient_and_no_decay_change_nothing_at_rest(name: str) -> None:
    optimizer = optimizers.build(name, MOMENTUM, 0.0)
    values = first_values()
    states = [np.zeros(7) for _ in optimizer.states]
    on = Operands(values, states, (np.zeros(7), np.zeros(7)), np.zeros(7), True)
    optimizer.prepare(on, 1.0, 1)
    optimizer.update(on, 1.0, RATE, 1)
    np.testing.assert_array_equal(values, first_values())


def test_the_first_step_of_adam_is_the_rate_whatever_the_gradient() -> None:
    for size in (1e-3, 1.0, 1e6):
        value = np.zeros(1)
        adam = optimizers.build("adam", 0.0, 0.0)
        scratch, states = (np.zeros(1), np.zeros(1)), [np.zeros(1), np.zeros(1)]
        adam.update(Operands(value, states, scratch, np.array([-size]), False), 1.0, RATE, 1)
        assert value[0] == pytest.approx(RATE, rel=1e-4)


def test_names_of_states_and_default_rates() -> None:
    assert [optimizers.build(name, 0.9, 0.0).states for name in NAMES] == [
        (),
        ("velocity",),
        ("velocity",),
        ("velocity",),
        ("mean", "variance"),
        ("mean", "variance"),
        ("mean", "variance"),
    ]
    assert all(optimizers.default_rate(name) > 0 for name in NAMES)
