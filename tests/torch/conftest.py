"""What tests of mpiml.torch share: a guard around each, at whose end all ranks agree that they have averaged alike."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mpiml.loop.guard import guard


@pytest.fixture(autouse=True)
def guarded() -> Iterator[None]:
    with guard(stall_timeout=0):
        yield
