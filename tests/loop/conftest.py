"""Sums that tests make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mpiml.loop.sums import Sum


@pytest.fixture
def made() -> Iterator[Callable[..., Sum]]:
    """Makes sums, and closes them."""
    sums: list[Sum] = []

    def make(*arguments: Any, **settings: Any) -> Sum:
        sums.append(Sum(*arguments, **settings))
        return sums[-1]

    yield make
    for one in sums:
        one.close()
