"""Figures, drawn by matplotlib (extra [plots]): one look, the same bytes for the same numbers, as SVG and PNG."""

from __future__ import annotations

import importlib.util
import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from mpiml.errors import ConfigError
from mpiml.pages import page
from mpiml.pages.colours import INK, LINES, MUTED, PAPER, as_variables

WIDTH, HEIGHT = 4.4, 2.7  # inches; in a page a figure is as wide as its column, 370 to 540 pixels
LEGEND = 0.17  # inches of a line of a legend
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mpiml",
    "font.family": "DejaVu Sans",  # comes with matplotlib; so places do not depend on the machine
    "font.size": 8.5,
    "figure.facecolor": PAPER.light,
    "savefig.facecolor": PAPER.light,
    "savefig.dpi": 200,
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED.light,
    "axes.labelcolor": INK.light,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 6),
    "grid.color": LINES.light,
    "grid.linewidth": 0.6,
    "text.color": INK.light,
    "text.parse_math": False,  # a name may have dollar signs
    "xtick.color": MUTED.light,
    "ytick.color": MUTED.light,
    "xtick.labelcolor": INK.light,
    "ytick.labelcolor": INK.light,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "hatch.color": MUTED.light,
}


@dataclass
class Drawing:
    """A figure: its name in file names, title and a sentence about it; `plot` draws it on a matplotlib Figure."""

    name: str
    title: str
    plot: Callable[[Any], None]
    note: str = ""
    height: float = HEIGHT

    def svg(self) -> str:
        """The figure without its title as an element of a page, whose style sheet gives its colours."""
        text = re.sub(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>", "", self._svg(), flags=re.DOTALL).strip()
        text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self.name}-", text)  # a page has several
        label = escape(self.title)
        # The size is that of its place. A name space for links is of no use in a page.
        head = re.compile(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>')
        text = head.sub(rf'<svg viewBox="\1" role="img" aria-label="{label}">', text, count=1)
        return as_variables(text.replace("xlink:href", "href"))

    def html(self) -> str:
        """The figure in its box."""
        return page.figure(self.name, self.title, self.note, self.svg())

    def files(self) -> dict[str, bytes]:
        """The figure with its title as PNG and SVG, by file name."""
        svg = self._svg(titled=True).encode()
        return {f"{self.name}.svg": svg, f"{self.name}.png": self._saved("png", titled=True)}

    def _svg(self, titled: bool = False) -> str:
        return self._saved("svg", titled).decode()

    def _saved(self, form: str, titled: bool) -> bytes:
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(WIDTH, self.height + (0.25 if titled else 0)), layout="constrained")
            self.plot(figure)
            if titled:
                figure.suptitle(self.title, fontsize=10)
            content = io.BytesIO()
            about = {"Date": None} if form == "svg" else {"Software": None}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of names in letters that the font lacks
                figure.savefig(content, format=form, metadata=about)
        return content.getvalue()


def check_matplotlib() -> None:
    """Raise ConfigError without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("figures need matplotlib: pip install 'mpiml[plots]'")


def save(drawings: list[Drawing], write: Callable[[Path, bytes], None], directory: Path) -> list[Path]:
    """Write each drawing as PNG and SVG. Returns the paths."""
    paths = []
    for drawing in drawings:
        for name, content in drawing.files().items():
            write(directory / name, content)
            paths.append(directory / name)
    return paths
