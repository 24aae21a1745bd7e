"""Convolutional networks: the rows that they take for images."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mpiml.nn import layers as nn
from mpiml.nn.convnets import as_image, cnn, resnet


@pytest.mark.parametrize(
    ("shape", "image"), [((5, 4, 3), (5, 4, 3)), ((5, 4), (5, 4, 1)), ((64,), (8, 8, 1)), ((1,), (1, 1, 1))]
)
def test_rows_that_are_images(shape: tuple[int, ...], image: tuple[int, ...]) -> None:
    layers, channels = as_image(shape)
    assert (*nn.stack_shapes(layers, shape)[-1][:2], channels) == image


@pytest.mark.parametrize("build", [cnn, resnet])
@pytest.mark.parametrize("shape", [(65,), (), (2, 3, 4, 5)])
def test_rows_that_are_no_images(build: Callable[..., list[nn.Layer]], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as error:
        build(shape, 10)
    assert "(height, width, channels)" in str(error.value)
    assert str(shape) in str(error.value)


def test_images_that_are_too_small_to_halve_twice() -> None:
    with pytest.raises(ValueError, match=r"MaxPool2d\(2\).*\(1, 1, 64\)"):
        cnn((3, 3), 10)
