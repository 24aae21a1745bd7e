"""Patterns of names: * stands for any text, and every other character for itself."""

from __future__ import annotations

import pytest

from mpiml.nn.patterns import compiled, selects, texts


def test_each_star_is_a_group_and_nothing_else_is_special() -> None:
    match = compiled("layers.*.a[0]*").fullmatch("layers.3.1.a[0]x")
    assert match
    assert match.groups() == ("3.1", "x")
    assert not compiled("layers.*").fullmatch("layersX3")
    assert compiled("a").fullmatch("a")
    assert not compiled("a").fullmatch("ab")


@pytest.mark.parametrize(
    ("pattern", "name", "yes"),
    [
        ("layers.1.weight", "layers.1.weight", True),
        ("layers.1", "layers.1.weight", True),
        ("layers.1", "layers.10.weight", False),
        ("layers.1", "layers.1.layers.0.weight", True),
        ("layers.0", "layers.1.layers.0.weight", False),
        ("*.layers.0", "layers.1.layers.0.weight", True),
        ("*", "layers.1.weight", True),
        ("*.bias", "layers.1.bias", True),
        ("bias", "layers.1.bias", True),
        ("head.*", "layers.0.head.weight", True),
        ("head", "layers.0.head.weight", True),
        ("head", "layers.0.overhead.weight", False),
        ("head", "layers.0.body.head.weight", False),
        ("*.head", "layers.0.body.head.weight", True),
        ("layers", "layers.0.weight", True),
        ("layers.0", "layers.2.layers.0.weight", False),
    ],
)
def test_a_pattern_selects_by_name_by_layer_and_by_name_within_a_layer(pattern: str, name: str, yes: bool) -> None:
    assert selects(pattern, name) is yes


def test_the_texts_of_stars() -> None:
    assert texts("*.weight", "layers.1.head.weight") == [("layers.1.head",), ("head",)]
    assert texts("layers.*.weight", "layers.2.layers.0.weight") == [("2.layers.0",)]
    assert texts("layers.0.*", "layers.2.layers.0.weight") == []
    assert texts("bias", "layers.1.bias") == [()]
