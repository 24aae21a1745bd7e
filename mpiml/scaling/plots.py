"""The figures of a scaling study."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mpiml.clock import SHARES
from mpiml.command import plural
from mpiml.pages import colours
from mpiml.pages.drawing import Drawing
from mpiml.scaling.laws import Interval
from mpiml.scaling.results import Line, Study
from mpiml.scaling.trained import median_noise, several

BLUE, ORANGE, GREEN, RED, GREY = (
    one.light for one in (colours.BLUE, colours.ORANGE, colours.GREEN, colours.RED, colours.GREY)
)
COLOURS = dict(zip(SHARES, (BLUE, ORANGE, RED, GREEN, GREY), strict=True))
CROWDED = "more ranks than cores"
STYLES = ((BLUE, "o"), (RED, "s"), (GREEN, "^"), (ORANGE, "D"), (GREY, "v"))  # of curves


def draw_time(axes: Any, study: Study) -> None:
    """Milliseconds of a step by ranks, and the ideal."""
    ranks = _curves(axes, _by_stages(study), lambda line: line.step.scaled(1e3))
    first = 1e3 * study.base.step.value
    _ideal(axes, ranks, [first / p if study.mode == "strong" else first for p in ranks])
    _logarithmic(axes, ranks, "time of a step (ms)")
    _decades(axes)


def draw_speed_up(axes: Any, study: Study) -> None:
    """Speed-up by ranks."""
    ranks = _curves(axes, _by_stages(study), lambda line: line.speed_up)
    _ideal(axes, ranks, [float(p) for p in ranks])
    what = "speed-up" if study.mode == "strong" else "scaled speed-up"
    _logarithmic(axes, ranks, f"{what} over one rank at its best")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")


def draw_efficiency(axes: Any, study: Study) -> None:
    """Speed-up per rank."""
    ranks = _curves(axes, _by_stages(study), lambda line: line.efficiency.scaled(100))
    _ideal(axes, ranks, [100.0] * len(ranks))
    _logarithmic(axes, ranks, "efficiency (%)")
    axes.set_ylim(0, max(110.0, axes.get_ylim()[1]))


def draw_shares(axes: Any, study: Study) -> None:
    """The activities that a step's time is spent on, by grid."""
    lines = study.grids()
    bottom = [0.0] * len(lines)
    for name in SHARES:
        heights = [100 * line.share(name) for line in lines]
        colour = {"color": COLOURS[name], "edgecolor": colours.PAPER.light, "linewidth": 0.7}
        axes.bar(range(len(lines)), heights, 0.7, bottom, label=name, **colour)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    piped = any(line.point.stages > 1 for line in lines)
    grids = [f"{one.point.grid if piped else one.point.ranks}{'*' if one.oversubscribed else ''}" for one in lines]
    axes.set_xticks(range(len(lines)), grids, rotation=60 if len(lines) > 8 else 0)
    what = "stages x replicas" if piped else "ranks"
    axes.set_xlabel(what + (" (* more ranks than cores)" if any(line.oversubscribed for line in lines) else ""))
    axes.set_ylabel("share of a step's time (%)")
    axes.set_ylim(0, 100)
    _legend(axes)


def draw_accuracy(axes: Any, study: Study) -> None:
    """Seconds of training to the target by ranks, each with the grid and the micro-batches that reach it first."""
    trained = [line for line in study.lines if line.target]
    slowest_first = sorted(trained, key=lambda line: -(line.seconds_to_target or 0))
    reached = {line.point.ranks: line for line in slowest_first if line.seconds_to_target}
    lines = [reached[count] for count in sorted(reached)]
    if lines:
        ranks = _curves(axes, {"fastest grid": lines}, _to_target)
        first = lines[0].point
        start = _to_target(lines[0]).value * first.ranks
        since = f"ideal, from {plural(first.ranks, 'rank')} with M = {first.microbatches}"
        _ideal(axes, ranks, [start / count for count in ranks], since, columns=2)
    missed = {line.point.ranks for line in trained} - reached.keys()
    for count in missed:
        axes.axvline(count, color=GREY, linestyle=":")
        place = {"xycoords": ("data", "axes fraction"), "rotation": 90, "ha": "right", "va": "center"}
        axes.annotate("not reached", (count, 0.5), **place)
    _logarithmic(axes, sorted({*reached, *missed}), f"time to a score of {study.target:g} (s)")
    if lines:
        _decades(axes)
    else:
        axes.set_yticks([])


def draw_epochs(axes: Any, study: Study) -> None:
    """Epochs to the target by batch, with the law, and the noise scale that was measured."""
    law, reached = study.law, [run.reached for run in study.trained if run.reached]
    batches, middles = [one.batch for one in reached], [one.epochs for one in reached]
    errors = [(one.by - one.after) / 2 for one in reached]
    axes.errorbar(batches, middles, errors, fmt="none", ecolor=BLUE, capsize=3)
    axes.plot(batches, middles, "o", color=BLUE, label="runs, between evaluations", zorder=3)
    if law:
        places = np.geomspace(law.smallest, law.largest, 50).tolist()
        curve = [law.at(place) for place in places]
        axes.plot(places, [one.value for one in curve], "-", color=RED, linewidth=1, label="E0 (1 + B / B_noise)")
        if law.draws is not None:
            bounds = [one.low for one in curve], [one.high for one in curve]
            axes.fill_between(places, *bounds, color=RED, alpha=0.15, linewidth=0, label="95 % of runs")
    if (noise := median_noise(study.trained)) is not None:
        axes.axvline(noise, color=GREEN, linestyle=":", label="measured noise scale, median")
    _legend(axes, columns=2)
    _logarithmic(axes, sorted({round(batch) for batch in batches}), f"epochs to a score of {study.target:g}")
    axes.set_xlabel("rows of a step")
    _decades(axes)


def _to_target(line: Line) -> Interval:
    return line.step.scaled(line.target.steps if line.target and line.target.steps else 0)


PLOTS: dict[str, Callable[[Any, Study], None]] = {
    "time": draw_time,
    "speed-up": draw_speed_up,
    "efficiency": draw_efficiency,
    "shares": draw_shares,
}
TITLES = {
    "time": "Time of a step",
    "speed-up": "Speed-up",
    "efficiency": "Efficiency",
    "shares": "Where the time goes",
    "accuracy": "Time to the target",
    "epochs": "Epochs to the target",
}


def drawings(study: Study) -> list[Drawing]:
    """The figures of a study."""
    rows = study.base.point.batch
    about = f"strong scaling, batch {rows}" if study.mode == "strong" else f"weak scaling, {rows} rows a rank"
    plots = PLOTS | ({"accuracy": draw_accuracy} if any(line.target for line in study.lines) else {})
    reached = any(run.reached for run in study.trained)  # else there is nothing to draw
    plots |= {"epochs": draw_epochs} if several(study.trained) and reached else {}

    def on(plot: Callable[[Any, Study], None], figure: Any) -> None:
        plot(figure.subplots(), study)

    return [
        Drawing(name, f"{TITLES[name]}: {about}", functools.partial(on, plot), height=3.1)
        for name, plot in plots.items()
    ]


def _by_stages(study: Study) -> dict[str, list[Line]]:
    """The curves of a plot by label: one for each number of stages."""
    lines = study.grids()
    depths = sorted({line.point.stages for line in lines})
    if len(depths) == 1:
        return {"median, interval": lines}
    return {plural(depth, "stage"): [line for line in lines if line.point.stages == depth] for depth in depths}


def _curves(axes: Any, series: Mapping[str, list[Line]], measure: Callable[[Line], Interval]) -> list[int]:
    """Draw medians with their intervals; hollow with more ranks than cores. Returns all numbers of ranks."""
    for (label, lines), (colour, marker) in zip(series.items(), itertools.cycle(STYLES), strict=False):
        ranks = [line.point.ranks for line in lines]
        low, values, high = np.array([(one.low, one.value, one.high) for one in map(measure, lines)]).T
        errors = np.nan_to_num(np.maximum([values - low, high - values], 0.0), posinf=0.0)  # none without an interval
        axes.errorbar(ranks, values, errors, fmt="none", ecolor=colour, capsize=3)
        axes.plot(ranks, values, marker, linestyle="-", linewidth=1, color=colour, label=label)
        if crowded := [index for index, line in enumerate(lines) if line.oversubscribed]:
            hollow = {"color": colour, "mfc": colours.PAPER.light, "label": CROWDED}
            axes.plot([ranks[i] for i in crowded], [values[i] for i in crowded], marker, **hollow)
    return sorted({line.point.ranks for lines in series.values() for line in lines})


def _ideal(axes: Any, ranks: list[int], values: list[float], label: str = "ideal", columns: int = 3) -> None:
    axes.plot(ranks, values, "--", color=colours.MUTED.light, linewidth=1, label=label)
    _legend(axes, columns)


def _legend(axes: Any, columns: int = 3) -> None:
    """Place the legend above the axes, where it hides nothing; merge equal labels."""
    handles, labels = axes.get_legend_handles_labels()
    named = dict(sorted(zip(labels, handles, strict=True), key=lambda pair: pair[0] == CROWDED))
    place = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2}
    axes.legend(named.values(), named, ncols=columns, columnspacing=1, handlelength=1.5, **place)


def _logarithmic(axes: Any, ranks: list[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(p) for p in ranks])
    axes.minorticks_off()
    axes.set_xlabel("ranks")
    axes.set_ylabel(label)


def _decades(axes: Any) -> None:
    """Make the y axis logarithmic, labelled 0.5, 1, 2, 5, 10."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
