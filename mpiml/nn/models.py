"""Models: each is a list of layers, which is what a pipeline can be cut from."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mpiml.nn.layers import (
    GELU,
    CausalSelfAttention,
    Conv2d,
    Dropout,
    Embedding,
    Flatten,
    GlobalAvgPool,
    GroupNorm,
    Layer,
    LayerNorm,
    Linear,
    MaxPool2d,
    PositionalEmbedding,
    ReLU,
    Reshape,
    Residual,
    Tanh,
    stack_shapes,
)
from mpiml.nn.parameters import Shape

ACTIVATIONS: dict[str, type[Layer]] = {"relu": ReLU, "gelu": GELU, "tanh": Tanh}
GROUP = 8  # channels that GroupNorm takes together; all of them, where their number is no multiple


def mlp(
    shape: Shape, outputs: int, hidden: Sequence[int] = (128, 128), activation: str = "relu", dropout: float = 0.0
) -> list[Layer]:
    """A multi-layer perceptron: linear layers of `hidden` widths, each with an activation and dropout, and a linear
    output layer.

    Args:
        shape: of an input row; anything but one axis is flattened first.
        outputs: width of the output: classes, or values to predict.
    """
    layers: list[Layer] = [] if len(shape) == 1 else [Flatten()]
    (inputs,) = Flatten().output_shape(shape)
    for width in hidden:
        layers += [Linear(inputs, width), ACTIVATIONS[activation](), *_dropout(dropout)]
        inputs = width
    layers.append(Linear(inputs, outputs, gain=1.0))
    return layers


def cnn(shape: Shape, outputs: int, channels: int = 32, dropout: float = 0.0) -> list[Layer]:
    """A small convolutional network: two 3 x 3 convolutions, of `channels` channels and twice as many, each with max
    pooling of 2 x 2 and ReLU, and a linear output layer after dropout.

    Args:
        shape: of an input row, as for `as_image`.
        outputs: width of the output: classes, or values to predict.
    """
    layers, inputs = as_image(shape)
    for width in (channels, 2 * channels):
        layers += [Conv2d(inputs, width), MaxPool2d(), ReLU()]  # as good as ReLU first, on a quarter of the values
        inputs = width
    layers += [Flatten(), *_dropout(dropout)]
    (features,) = stack_shapes(layers, shape)[-1]
    return [*layers, Linear(features, outputs, gain=1.0)]


def resnet(shape: Shape, outputs: int, channels: int = 32, blocks: int = 2, dropout: float = 0.0) -> list[Layer]:
    """A small residual network: `blocks` residual blocks of two 3 x 3 convolutions at each of three sizes of image.

    He et al., "Identity mappings in deep residual networks", ECCV 2016, with group normalisation; images are halved,
    and channels doubled, by a convolution of stride 2 between the blocks.

    Args:
        shape: of an input row, as for `as_image`.
        outputs: width of the output: classes, or values to predict.
        channels: at the full size of the image.
    """
    layers, inputs = as_image(shape)
    for size in range(3):
        width = channels << size
        layers.append(Conv2d(inputs, width, stride=2 if size else 1))
        layers += [Residual(*_convolution(width), *_convolution(width)) for _ in range(blocks)]
        inputs = width
    layers += [_group_norm(inputs), ReLU(), GlobalAvgPool(), *_dropout(dropout)]
    return [*layers, Linear(inputs, outputs, gain=1.0)]


def gpt(
    shape: Shape,
    outputs: int,
    tokens: int | None = None,
    width: int = 128,
    heads: int = 4,
    blocks: int = 2,
    dropout: float = 0.0,
) -> list[Layer]:
    """A language model: token and positional embeddings, pre-norm blocks of attention and perceptron, and a linear map
    to the scores of the next token at every place.

    Radford et al., "Language models are unsupervised multitask learners", 2019.

    Args:
        shape: of an input row: (places,), token ids.
        outputs: how many tokens can come next.
        tokens: how many can be read; by default as many.
        width: of the vector that stands for a token.
    """
    if len(shape) != 1:
        raise ValueError(f"gpt takes rows of token ids, of shape (places,), got {shape}")
    layers: list[Layer] = [Embedding(tokens or outputs, width), PositionalEmbedding(shape[0], width)]
    gain = 1 / math.sqrt(2 * blocks)  # each block adds twice to what passes through
    for _ in range(blocks):
        attention = CausalSelfAttention(width, heads, gain)
        perceptron = [Linear(width, 4 * width), GELU(), Linear(4 * width, width, gain)]
        layers.append(Residual(LayerNorm(width), attention, *_dropout(dropout)))
        layers.append(Residual(LayerNorm(width), *perceptron, *_dropout(dropout)))
    return [*layers, LayerNorm(width), Linear(width, outputs, gain=1.0)]


def as_image(shape: Shape) -> tuple[list[Layer], int]:
    """The layers that make rows of `shape` images (height, width, channels), and the number of channels.

    Rows (height, width) have one channel, and so have flat rows of a square number of pixels. Raises ValueError for
    other rows.
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


def _convolution(channels: int) -> list[Layer]:
    return [_group_norm(channels), ReLU(), Conv2d(channels, channels)]


def _group_norm(channels: int) -> GroupNorm:
    return GroupNorm(1 if channels % GROUP else channels // GROUP, channels)


def _dropout(rate: float) -> list[Layer]:
    return [Dropout(rate)] if rate else []
