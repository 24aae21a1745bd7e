"""Models for images: convolutional networks, plain and residual."""

from __future__ import annotations

import math

from mpiml.nn.activations import ReLU
from mpiml.nn.base import Layer, stack_shapes
from mpiml.nn.basic import Flatten, Linear, Reshape, Residual
from mpiml.nn.batchnorm import BatchNorm2d
from mpiml.nn.convolution import Conv2d
from mpiml.nn.norms import GroupNorm
from mpiml.nn.parameters import Shape
from mpiml.nn.perceptrons import dropout_if_any
from mpiml.nn.pooling import GlobalAvgPool, MaxPool2d
from mpiml.nn.recompute import Recompute

GROUP = 8  # channels in a group of GroupNorm; all channels are one group if their number is not a multiple of this


def cnn(shape: Shape, outputs: int, channels: int = 32, norm: str | None = None, dropout: float = 0.0) -> list[Layer]:
    """A small convolutional network: two 3 x 3 convolutions, to `channels` channels and to twice as many, each followed
    by 2 x 2 max pooling and ReLU; then dropout and a linear output layer.

    Args:
        shape: of an input row; see `as_image`.
        outputs: width of the output: classes, or values to predict.
        norm: "batch" for BatchNorm2d after each convolution, None for no normalisation.
    """
    layers, inputs = as_image(shape)
    for width in (channels, 2 * channels):
        layers += [Conv2d(inputs, width), *([BatchNorm2d(width)] if norm == "batch" else [])]
        layers += [MaxPool2d(), ReLU()]  # the same result as ReLU first, on a quarter of the values
        inputs = width
    layers += [Flatten(), *dropout_if_any(dropout)]
    (features,) = stack_shapes(layers, shape)[-1]
    return [*layers, Linear(features, outputs, gain=1.0)]


def resnet(
    shape: Shape,
    outputs: int,
    channels: int = 32,
    blocks: int = 2,
    norm: str = "group",
    dropout: float = 0.0,
    recompute: bool = False,
) -> list[Layer]:
    """A small residual network: `blocks` residual blocks of two 3 x 3 convolutions at each of three image sizes. A
    convolution of stride 2 between the sizes halves height and width and doubles the channels.

    He et al., "Identity mappings in deep residual networks", ECCV 2016.

    Args:
        shape: of an input row; see `as_image`.
        outputs: width of the output: classes, or values to predict.
        channels: at the full image size.
        norm: "group" for GroupNorm, "batch" for BatchNorm2d.
        recompute: as of mpiml.nn.transformers.gpt.
    """
    layers, inputs = as_image(shape)
    for size in range(3):
        width = channels << size
        layers.append(Conv2d(inputs, width, stride=2 if size else 1))
        for _ in range(blocks):
            block = Residual(*_convolution(width, norm), *_convolution(width, norm))
            layers.append(Recompute(block) if recompute else block)
        inputs = width
    layers += [_norm(inputs, norm), ReLU(), GlobalAvgPool(), *dropout_if_any(dropout)]
    return [*layers, Linear(inputs, outputs, gain=1.0)]


def as_image(shape: Shape) -> tuple[list[Layer], int]:
    """The layers that turn rows of `shape` into images (height, width, channels), and the number of channels.

    Rows (height, width), and flat rows of a square number of pixels, become images of one channel. Raises ValueError
    for other shapes.
    """
    if len(shape) == 3:
        return [], shape[2]
    side = math.isqrt(math.prod(shape))
    image = (*shape, 1) if len(shape) == 2 else (side, side, 1)
    if not 1 <= len(shape) <= 2 or math.prod(image) != math.prod(shape):
        raise ValueError(
            f"images are rows of shape (height, width, channels), (height, width) or (pixels,) of a square, got {shape}"
        )
    return [Reshape(image)], 1


def _convolution(channels: int, norm: str) -> list[Layer]:
    return [_norm(channels, norm), ReLU(), Conv2d(channels, channels)]


def _norm(channels: int, norm: str) -> Layer:
    if norm == "batch":
        return BatchNorm2d(channels)
    return GroupNorm(1 if channels % GROUP else channels // GROUP, channels)
