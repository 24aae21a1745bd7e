"""Patterns of names, such as "layers.*.weight": * stands for any text."""

import re


def compiled(pattern: str) -> re.Pattern[str]:
    """What matches whole names; the group of each * is the text that it stands for."""
    return re.compile("(.*)".join(map(re.escape, pattern.split("*"))))


def selects(pattern: str, name: str) -> bool:
    """Whether a pattern is of a parameter's or a layer's name: "layers.0" and "layers.0.weight" select layers.0.weight.

    Within a layer names may begin with what is in it: "head.*" selects layers.1.head.weight, too; but "layers.0" is the
    model's first layer, and not the first in each layer that has some inside.
    """
    within = name if pattern.startswith("layers.") else re.sub(r"^layers\.\d+\.", "", name)
    return any(compiled(whole).fullmatch(n) for whole in (pattern, f"{pattern}.*") for n in (name, within))
