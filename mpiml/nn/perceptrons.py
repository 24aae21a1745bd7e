"""The multi-layer perceptron. A model is a list of layers, so that it can be cut into pipeline stages."""

from __future__ import annotations

from collections.abc import Sequence

from mpiml.nn.activations import GELU, ReLU, Tanh
from mpiml.nn.base import Layer
from mpiml.nn.basic import Dropout, Flatten, Linear
from mpiml.nn.parameters import Shape

ACTIVATIONS: dict[str, type[Layer]] = {"relu": ReLU, "gelu": GELU, "tanh": Tanh}


def mlp(
    shape: Shape, outputs: int, hidden: Sequence[int] = (128, 128), activation: str = "relu", dropout: float = 0.0
) -> list[Layer]:
    """A multi-layer perceptron: linear layers of `hidden` widths, each with an activation and dropout, and a linear
    output layer.

    Args:
        shape: of an input row; rows of several axes are flattened first.
        outputs: width of the output: classes, or values to predict.
    """
    layers: list[Layer] = [] if len(shape) == 1 else [Flatten()]
    (inputs,) = Flatten().output_shape(shape)
    for width in hidden:
        layers += [Linear(inputs, width), ACTIVATIONS[activation](), *dropout_if_any(dropout)]
        inputs = width
    layers.append(Linear(inputs, outputs, gain=1.0))
    return layers


def dropout_if_any(rate: float) -> list[Layer]:
    """A dropout layer in a list, or an empty list if `rate` is 0."""
    return [Dropout(rate)] if rate else []
