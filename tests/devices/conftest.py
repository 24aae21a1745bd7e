"""What tests of devices share: a pretended device of a rank, which is given back at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mpiml.devices.fake import Fake


@pytest.fixture
def device() -> Iterator[Fake]:
    fake = pytest.importorskip("mpiml.devices.fake", reason="needs PyTorch", exc_type=ImportError)
    made = fake.Fake(0, "fake", alone=True)
    yield made
    made.free()
