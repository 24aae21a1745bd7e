"""Patterns of names, such as "layers.*.weight": * stands for any text."""

import re


def compiled(pattern: str) -> re.Pattern[str]:
    """What matches whole names; the group of each * is the text that it stands for."""
    return re.compile("(.*)".join(map(re.escape, pattern.split("*"))))


def within_layer(name: str) -> str:
    """The name that an array has within its layer: head.weight for layers.1.head.weight."""
    return re.sub(r"^layers\.\d+\.", "", name)


def texts(pattern: str, name: str) -> list[tuple[str, ...]]:
    """What each * of a pattern stands for in an array's name; and in the name that it has within its layer, unless the
    pattern begins with a layer of the model."""
    within = name if pattern.startswith("layers.") else within_layer(name)
    matches = (compiled(pattern).fullmatch(n) for n in dict.fromkeys((name, within)))
    return [match.groups() for match in matches if match]


def selects(pattern: str, name: str) -> bool:
    """Whether a pattern is of a parameter's or a layer's name: "layers.0" and "layers.0.weight" select layers.0.weight.

    Within a layer names may begin with what is in it: "head.*" selects layers.1.head.weight, too; but "layers.0" is the
    model's first layer, and not the first in each layer that has some inside.
    """
    return any(texts(whole, name) for whole in (pattern, f"{pattern}.*"))
