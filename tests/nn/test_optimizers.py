"""Optimizers against their formulas, written once more here, one number at a time as in the papers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mpiml.nn import optimizers
from mpiml.vectors import Operands

NAMES = ("sgd", "momentum", "nesterov", "adam", "adamw")
every_optimizer = pytest.mark.parametrize("name", NAMES)
STEPS, RATE, MOMENTUM = 6, 0.03, 0.8
Betas = tuple[float, float]
USUAL: Betas = (0.9, 0.999)


def gradients(size: int = 7) -> list[np.ndarray]:
    random = np.random.default_rng(5)
    return [random.standard_normal(size) * 10.0 ** random.integers(-6, 3, size) for _ in range(STEPS)]


def first_values(size: int = 7) -> np.ndarray:
    return np.random.default_rng(6).standard_normal(size)


def reference(name: str, value: float, gradients: list[float], decay: float, betas: Betas = USUAL) -> float:
    """One number after all steps, in PyTorch's conventions."""
    velocity = m = v = 0.0
    for t, g in enumerate(gradients, 1):
        if name == "adamw":
            value = value - RATE * decay * value
        else:
            g = g + decay * value
        if name in ("adam", "adamw"):
            b1, b2 = betas
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g**2
            unbiased_m, unbiased_v = m / (1 - b1**t), v / (1 - b2**t)
            value = value - RATE * unbiased_m / (math.sqrt(unbiased_v) + 1e-8)
            continue
        velocity = MOMENTUM * velocity + g
        direction = {"sgd": g, "momentum": velocity, "nesterov": g + MOMENTUM * velocity}[name]
        value = value - RATE * direction
    return value


def run(
    name: str,
    weight_decay: float,
    pieces: list[slice],
    decay: bool = True,
    dtype: str = "float64",
    betas: Betas = USUAL,
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
            on = Operands(values[piece], [s[piece] for s in states], scratch, total, decay)
            optimizer.update(on, 0.25, RATE, step)
    return values


@every_optimizer
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_update_is_the_formula(name: str, weight_decay: float) -> None:
    columns = np.stack(gradients(), axis=1)
    expected = [reference(name, w, list(g), weight_decay) for w, g in zip(first_values(), columns, strict=True)]
    np.testing.assert_allclose(run(name, weight_decay, [slice(0, 7)]), expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["adam", "adamw"])
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
    optimizer.update(Operands(values, states, (np.zeros(7), np.zeros(7)), np.zeros(7), True), 1.0, RATE, 1)
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
        ("mean", "variance"),
        ("mean", "variance"),
    ]
    assert all(optimizers.default_rate(name) > 0 for name in NAMES)
