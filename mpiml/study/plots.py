"""The plots of a scaling study, drawn with matplotlib (extra [plots])."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpiml.clock import SHARES
from mpiml.errors import ConfigError
from mpiml.study.fits import Interval
from mpiml.study.table import Line, Study

# Told apart by the colour-blind too: Okabe and Ito, "Color universal design", 2008.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"
DARK = "#444444"
COLOURS = dict(zip(SHARES, (BLUE, ORANGE, RED, GREEN, GREY), strict=True))
Draw = Callable[[Any, Study], None]


def step_time(axes: Any, study: Study) -> None:
    """Milliseconds of a step by ranks, and what they would be without any loss."""
    lines = study.best()
    _points(axes, lines, [1e3 * line.step.value for line in lines], [_thousand(line.step) for line in lines])
    first = 1e3 * lines[0].step.value
    ranks = [line.point.ranks for line in lines]
    _ideal(axes, ranks, [first / p if study.mode == "strong" else first for p in ranks])
    _logarithmic(axes, ranks, "time of a step (ms)")
    _decades(axes)


def speed(axes: Any, study: Study) -> None:
    """Speed-up by ranks."""
    lines = study.best()
    ups = [line.speed_up for line in lines]
    _points(axes, lines, [up.value for up in ups], [(up.low, up.high) for up in ups])
    ranks = [line.point.ranks for line in lines]
    _ideal(axes, ranks, [float(p) for p in ranks])
    what = "speed-up" if study.mode == "strong" else "scaled speed-up"
    _logarithmic(axes, ranks, f"{what} over one rank at its best")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")


def efficiency(axes: Any, study: Study) -> None:
    """Speed-up per rank."""
    lines = study.best()
    found = [line.efficiency for line in lines]
    _points(axes, lines, [100 * e.value for e in found], [(100 * e.low, 100 * e.high) for e in found])
    ranks = [line.point.ranks for line in lines]
    _ideal(axes, ranks, [100.0] * len(ranks))
    _logarithmic(axes, ranks, "efficiency (%)")
    axes.set_ylim(0, max(110.0, axes.get_ylim()[1]))


def shares(axes: Any, study: Study) -> None:
    """What the ranks spend a step's time on."""
    lines = study.best()
    bottom = [0.0] * len(lines)
    for name in SHARES:
        heights = [100 * line.share(name) for line in lines]
        colour = {"color": COLOURS[name], "edgecolor": "white", "linewidth": 0.7}
        axes.bar(range(len(lines)), heights, 0.7, bottom, label=name, **colour)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_xticks(range(len(lines)), [_label(line) for line in lines])
    axes.set_xlabel("ranks" + (" (* more than cores)" if any(line.oversubscribed for line in lines) else ""))
    axes.set_ylabel("share of a step's time (%)")
    axes.set_ylim(0, 100)
    _legend(axes)


def accuracy(axes: Any, study: Study) -> None:
    """Seconds until training has reached the target, by ranks, with the grid that does so first."""
    reached: dict[int, Line] = {}
    for line in sorted(study.asked(), key=lambda line: -(line.seconds_to_target or 0)):
        if line.seconds_to_target:
            reached[line.point.ranks] = line
    ranks, lines = sorted(reached), [reached[count] for count in sorted(reached)]
    seconds = [line.seconds_to_target or 0.0 for line in lines]
    bounds = [
        (line.step.low * second / line.step.value, line.step.high * second / line.step.value)
        for line, second in zip(lines, seconds, strict=True)
    ]
    _points(axes, lines, seconds, bounds)
    if lines:
        _ideal(axes, ranks, [seconds[0] * ranks[0] / count for count in ranks])
    missed = sorted({line.point.ranks for line in study.asked() if line.target} - set(ranks))
    for count in missed:
        axes.axvline(count, color=GREY, linestyle=":")
        axes.annotate(
            "not reached", (count, 0.5), xycoords=("data", "axes fraction"), rotation=90, ha="right", va="center"
        )
    _logarithmic(axes, sorted([*ranks, *missed]), f"time to a test score of {study.target:g} (s)")
    if lines:
        _decades(axes)
    else:
        axes.set_yticks([])


PLOTS: dict[str, Draw] = {"time": step_time, "speed-up": speed, "efficiency": efficiency, "shares": shares}


def draw(study: Study, directory: Path) -> dict[str, str]:
    """Write each plot as PNG and SVG; returns the SVGs' texts by name. Raises ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'mpiml[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    texts = {}
    trained = any(line.target for line in study.lines)
    for name, plot in (PLOTS | ({"accuracy": accuracy} if trained else {})).items():
        figure, axes = pyplot.subplots(figsize=(5, 3.75), layout="constrained")
        figure.suptitle(_title(study), fontsize=10)
        plot(axes, study)
        figure.savefig(directory / f"{name}.png", dpi=150)
        content = io.StringIO()
        figure.savefig(content, format="svg")
        texts[name] = content.getvalue()
        (directory / f"{name}.svg").write_text(texts[name])
        pyplot.close(figure)
    return texts


def _points(axes: Any, lines: list[Line], values: list[float], bounds: list[tuple[float, float]]) -> None:
    """Medians with their intervals; hollow where ranks took turns on the cores."""
    ranks = [line.point.ranks for line in lines]
    axes.plot(ranks, values, color=BLUE, linewidth=1)
    inside = [
        (min(a, v), max(b, v)) if abs(a) + abs(b) < float("inf") else (v, v)
        for (a, b), v in zip(bounds, values, strict=True)
    ]
    errors = [
        [v - a for (a, _), v in zip(inside, values, strict=True)],
        [b - v for (_, b), v in zip(inside, values, strict=True)],
    ]
    axes.errorbar(ranks, values, errors, fmt="none", ecolor=BLUE, capsize=3)
    for crowded, face, label in ((False, BLUE, "median, interval"), (True, "white", "more ranks than cores")):
        some = [i for i, line in enumerate(lines) if line.oversubscribed == crowded]
        if some:
            axes.plot([ranks[i] for i in some], [values[i] for i in some], "o", color=BLUE, mfc=face, label=label)


def _title(study: Study) -> str:
    rows = study.base.point.batch
    return "strong scaling, batch " + f"{rows}" if study.mode == "strong" else f"weak scaling, {rows} rows a rank"


def _thousand(interval: Interval) -> tuple[float, float]:
    return 1e3 * interval.low, 1e3 * interval.high


def _ideal(axes: Any, ranks: list[int], values: list[float]) -> None:
    axes.plot(ranks, values, "--", color=DARK, linewidth=1, label="ideal")
    _legend(axes)


def _legend(axes: Any) -> None:
    """Above the axes, where it hides nothing."""
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "frameon": False}
    axes.legend(fontsize=8, ncols=len(SHARES), columnspacing=1, handlelength=1.5, **place)


def _logarithmic(axes: Any, ranks: list[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(p) for p in ranks])
    axes.minorticks_off()
    axes.set_xlabel("ranks")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)


def _decades(axes: Any) -> None:
    """A logarithmic axis with numbers that are read at a glance: 0.5, 1, 2, 5, 10."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _label(line: Line) -> str:
    return f"{line.point.ranks}{'*' if line.oversubscribed else ''}"
