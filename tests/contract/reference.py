"""A serial trainer in plain NumPy, written from the equations alone: it shares no code with the package.

It trains a multi-layer perceptron on the mean gradient of all rows at every step.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = list[tuple[Array, Array]]  # of each linear layer: (inputs, outputs) matrix and bias


def relu(z: Array) -> tuple[Array, Array]:
    """The function and its derivative."""
    return np.where(z > 0, z, 0.0), np.where(z > 0, 1.0, 0.0)


def tanh(z: Array) -> tuple[Array, Array]:
    """The function and its derivative."""
    e = np.exp(-2 * np.abs(z))
    t = np.sign(z) * (1 - e) / (1 + e)
    return t, 1 - t**2


def gelu(z: Array) -> tuple[Array, Array]:
    """z/2 (1 + tanh(u)) with u = sqrt(2/pi) (z + 0.044715 z^3), and its derivative."""
    u = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    t, dt = tanh(u)
    return z / 2 * (1 + t), (1 + t) / 2 + z / 2 * dt * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z**2)


ACTIVATIONS = {"relu": relu, "tanh": tanh, "gelu": gelu}


def cross_entropy(y: Array, labels: NDArray[np.integer]) -> tuple[float, Array]:
    """The mean over rows of -log softmax(y)[label], and its gradient by y."""
    odds = np.exp(y - y.max(axis=1)[:, None])
    probability = odds / odds.sum(axis=1)[:, None]
    truth = np.eye(y.shape[1])[labels]
    return float(-(truth * np.log(probability)).sum() / len(y)), (probability - truth) / len(y)


def mse(y: Array, labels: Array) -> tuple[float, Array]:
    """The mean over rows and outputs of (y - label)^2, and its gradient by y."""
    error = y - labels.reshape(len(y), -1)
    return float((error**2).mean()), 2 * error / error.size


LOSSES = {"cross_entropy": cross_entropy, "mse": mse}


def loss_and_gradient(weights: Weights, x: Array, labels: Array, activation: str, loss: str) -> tuple[float, Weights]:
    """Backpropagation over all rows at once."""
    inputs, slopes = [x], []
    for w, b in weights[:-1]:
        h, slope = ACTIVATIONS[activation](inputs[-1] @ w + b)
        inputs.append(h)
        slopes.append(slope)
    w, b = weights[-1]
    value, delta = LOSSES[loss](inputs[-1] @ w + b, labels)
    gradients: Weights = []
    for layer in reversed(range(len(weights))):
        gradients.insert(0, (inputs[layer].T @ delta, delta.sum(axis=0)))
        if layer:
            delta = (delta @ weights[layer][0].T) * slopes[layer - 1]
    return value, gradients


class Rule:
    """An update rule, for one array; keeps its own state."""

    def __init__(self, name: str, lr: float, decay: float, betas: tuple[float, float]):
        self.name, self.lr, self.decay, self.betas, self.t = name, lr, decay, betas, 0
        self.first: Array | float = 0.0
        self.second: Array | float = 0.0

    def __call__(self, w: Array, g: Array) -> Array:
        self.t += 1
        if self.name == "adamw":
            w = w - self.lr * self.decay * w
        elif self.name != "lamb":
            g = self._trust(w, g) * (g + self.decay * w)
        if self.name == "sgd":
            return w - self.lr * g
        if self.name in ("momentum", "nesterov", "lars"):
            self.first = 0.9 * self.first + g
            return w - self.lr * (g + 0.9 * self.first if self.name == "nesterov" else self.first)
        b1, b2 = self.betas
        self.first = b1 * self.first + (1 - b1) * g
        self.second = b2 * self.second + (1 - b2) * g**2
        mean, variance = self.first / (1 - b1**self.t), self.second / (1 - b2**self.t)
        if self.name == "lamb":
            u = mean / (np.sqrt(variance) + 1e-6) + self.decay * w
            return w - self.lr * self._trust(w, u) * u
        return w - self.lr * mean / (np.sqrt(variance) + 1e-8)

    def _trust(self, w: Array, of: Array) -> float:
        """The ratio of norms in LARS, where `of` is the gradient, and LAMB, for a matrix."""
        norm, of_norm = np.linalg.norm(w), np.linalg.norm(of)
        if self.name not in ("lars", "lamb") or w.ndim == 1 or not norm or not of_norm:
            return 1.0
        return float(norm / of_norm if self.name == "lamb" else 0.001 * norm / (of_norm + self.decay * norm + 1e-8))


def train(
    weights: Weights,
    x: Array,
    labels: Array,
    steps: int,
    *,
    activation: str = "relu",
    loss: str = "cross_entropy",
    optimizer: str = "sgd",
    lr: float = 0.1,
    decay: float = 0.0,
    clip: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    rates: Sequence[float] = (),
) -> tuple[Weights, list[float], list[float]]:
    """The weights after `steps` steps, and of every step the loss and the gradient's norm. Biases do not decay. `rates`
    are factors of the learning rate for each layer; layers with 0 are constants."""
    factors = rates or [1.0] * len(weights)
    rules = [(Rule(optimizer, lr * rate, decay, betas), Rule(optimizer, lr * rate, 0.0, betas)) for rate in factors]
    losses, norms = [], []
    for _ in range(steps):
        value, gradients = loss_and_gradient(weights, x, labels, activation, loss)
        losses.append(value)
        trained = [pair for pair, rate in zip(gradients, factors, strict=True) if rate]
        norms.append(math.sqrt(sum((g**2).sum() for pair in trained for g in pair)))
        factor = clip / norms[-1] if clip and norms[-1] > clip else 1.0
        weights = [
            (rule_w(w, factor * gw), rule_b(b, factor * gb))
            for (rule_w, rule_b), (w, b), (gw, gb) in zip(rules, weights, gradients, strict=True)
        ]
    return weights, losses, norms
