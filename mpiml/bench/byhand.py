"""A training step written by hand in plain NumPy, against which the package's step is measured.

It does the arithmetic of one rank that trains a perceptron with ReLU, softmax cross-entropy and momentum, in the usual
way: parameter by parameter, without a framework.
"""

import itertools
import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class Perceptron:
    """A stack of linear layers with ReLU between them.

    Args:
        widths: widths of the input, the hidden layers and the output.
    """

    def __init__(self, widths: list[int], seed: int = 0):
        rng = np.random.default_rng(seed)
        self.weights = [rng.normal(0, (2 / a) ** 0.5, (a, b)).astype(np.float32) for a, b in itertools.pairwise(widths)]
        self.biases = [np.zeros(width, np.float32) for width in widths[1:]]
        self.velocities = [np.zeros_like(p) for p in self.weights + self.biases]

    def gradients(self, x: Array, labels: NDArray[np.intp]) -> tuple[float, list[Array], list[Array]]:
        """The summed loss of some rows, and its gradients by weights and biases."""
        inputs = []
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            inputs.append(x)
            x = x @ weight
            x += bias
            if index < len(self.weights) - 1:
                x = np.maximum(x, 0)
        rows = np.arange(len(x))
        x -= x.max(axis=1, keepdims=True)
        chosen = x[rows, labels]
        dy = np.exp(x)
        total = dy.sum(axis=1, keepdims=True)
        loss = float((np.log(total[:, 0]) - chosen).sum(dtype=np.float64))
        dy /= total
        dy[rows, labels] -= 1
        d_weights, d_biases = [], []
        for index in reversed(range(len(self.weights))):
            d_weights.append(inputs[index].T @ dy)
            d_biases.append(dy.sum(axis=0))
            if index:
                dy = (dy @ self.weights[index].T) * (inputs[index] > 0)
        return loss, d_weights[::-1], d_biases[::-1]

    def step(
        self, parts: list[tuple[Array, NDArray[np.intp]]], rate: float, momentum: float, checked: bool = False
    ) -> float:
        """One step on micro-batches: sum their gradients, divide by the rows, update with momentum; if it is to be
        `checked`, with a look whether loss and gradients are finite."""
        rows = sum(len(x) for x, _ in parts)
        loss, d_weights, d_biases = self.gradients(*parts[0])
        sums = d_weights + d_biases
        for part in parts[1:]:
            part_loss, d_weights, d_biases = self.gradients(*part)
            loss += part_loss
            for total, gradient in zip(sums, d_weights + d_biases, strict=True):
                total += gradient
        if checked and not (math.isfinite(loss) and all(np.isfinite(gradient).all() for gradient in sums)):
            raise FloatingPointError("loss or gradients are not finite")
        for parameter, velocity, gradient in zip(self.weights + self.biases, self.velocities, sums, strict=True):
            gradient /= rows
            velocity *= momentum
            velocity += gradient
            parameter -= rate * velocity
        return loss / rows
