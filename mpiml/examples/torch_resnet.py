"""A small residual network in PyTorch, and the handwritten digits as images: `make example-torch`."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from mpiml.api import Dataset
from mpiml.data.dataset import DIGITS

GROUPS = 4  # groups of channels in a GroupNorm


class Block(nn.Module):
    """y = relu(f(x) + s(x)): f is two 3 x 3 convolutions, s the identity, or a 1 x 1 convolution if the shape changes.

    x and y (rows, channels, H, W). He et al., "Deep residual learning for image recognition", CVPR 2016, with GroupNorm
    in place of batch normalisation.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(GROUPS, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.GroupNorm(GROUPS, outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return self.relu(y + self.shortcut(x))


def resnet(shape: tuple[int, ...], outputs: int, width: int = 16) -> nn.Sequential:
    """The model; it can be cut into stages between any two of its children.

    Args:
        shape: of an input row: (channels, height, width), as PyTorch's convolutions take images.
    """
    stem = nn.Sequential(nn.Conv2d(shape[0], width, 3, padding=1, bias=False), nn.GroupNorm(GROUPS, width), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, outputs))
    blocks = [
        Block(width, width),
        Block(width, width),
        Block(width, 2 * width, stride=2),
        Block(2 * width, 2 * width),
        Block(2 * width, 4 * width, stride=2),
        Block(4 * width, 4 * width),
    ]
    return nn.Sequential(stem, *blocks, head)


def images() -> Dataset:
    """The handwritten digits as images of one channel: rows of shape (1, 8, 8)."""
    with np.load(DIGITS) as digits:
        x_train, x_test = digits["x_train"][:, None], digits["x_test"][:, None]
        return Dataset.from_arrays(x_train, digits["y_train"], x_test, digits["y_test"])
