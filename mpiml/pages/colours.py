"""The colours of pages and figures, in light and in dark.

Figures are drawn in the light colours, each of which stands for itself in a file of its own. In a page it is a variable
of the style sheet, so that the same drawing is light or dark as the reader's screen is.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Colour(NamedTuple):
    """A colour by its name in the style sheet, with its values in light and in dark."""

    name: str
    light: str
    dark: str


PAPER = Colour("paper", "#ffffff", "#14181d")
INK = Colour("ink", "#1b222b", "#e6e9ed")
MUTED = Colour("muted", "#57606b", "#9aa4b0")
LINES = Colour("lines", "#dbe0e6", "#323a44")
# What the colour-blind can tell apart: Okabe and Ito, "Color universal design", 2008. Lighter where the page is dark.
BLUE = Colour("blue", "#0072b2", "#4aa3e0")
ORANGE = Colour("orange", "#e69f00", "#f0b030")
GREEN = Colour("green", "#009e73", "#28c296")
RED = Colour("red", "#d55e00", "#f2854a")
PURPLE = Colour("purple", "#cc79a7", "#e09cc3")
SKY = Colour("sky", "#56b4e9", "#a5dbff")
GREY = Colour("grey", "#999999", "#8b939d")

ALL = (PAPER, INK, MUTED, LINES, BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY)
SERIES = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, GREY)  # of curves, in this order
_BY_LIGHT = {colour.light: colour for colour in ALL}
_LIGHT = re.compile("|".join(_BY_LIGHT))


def variables(dark: bool) -> str:
    """The colours as declarations of a style sheet."""
    return " ".join(f"--{one.name}: {one.dark if dark else one.light};" for one in ALL)


def as_variables(svg: str) -> str:
    """A drawing in which each light colour is the variable of that name."""
    return _LIGHT.sub(lambda match: f"var(--{_BY_LIGHT[match[0]].name})", svg)
