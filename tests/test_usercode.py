"""Names of the user's own code, and what they stand for."""

from __future__ import annotations

import numpy as np
import pytest

from mpiml.usercode import is_name, named


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("a:b", True),
        ("a.b_1:c.d", True),
        ("a", False),
        ("a:", False),
        (":a", False),
        ("a b:c", False),
        ("a:b:c", False),
    ],
)
def test_names(text: str, good: bool) -> None:
    assert is_name(text) is good


def test_what_a_name_stands_for() -> None:
    assert named("math:pi", "--loss") == np.pi
