"""What tests of this room are given."""

from collections.abc import Iterator

import pytest

from tests.parallel.sums import MADE


@pytest.fixture
def free_sums() -> Iterator[None]:
    """Sums hold requests of the MPI library, which complains of those that are left at the end."""
    yield
    while MADE:
        sum_ = MADE.pop()
        sum_.free()
        sum_.values.free()
