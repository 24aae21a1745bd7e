"""Figures of what runs learn: loss and score over steps, epochs and time, learning rate, gradient, noise, workers."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from mpiml.pages import colours
from mpiml.pages.drawing import HEIGHT, LEGEND, Drawing
from mpiml.report.columns import Numbers
from mpiml.report.curves import STEP, Axis, Curve, is_wide, known, smoothed, thinned
from mpiml.report.runs import Run

DASHES = ("-", "--", ":", "-.")  # of the first runs, of as many as have colours, and so on
FEW = 30  # points of a curve that are marked
LONG = 28  # letters of a run's name in a legend
RAW = 0.35  # opacity of a curve beside its smoothed one
QUANTITIES = (  # name, title, column, sentence
    ("rate", "Learning rate", "learning_rate", ""),
    ("norm", "Norm of the gradient", "gradient_norm", ""),
    ("noise", "Noise scale (rows)", "noise_scale", "batches beyond this bring little; averages over the lines so far"),
    ("distance", "Distance of the workers", "distance", "how far apart their models are when they meet"),
    ("speed", "Samples per second", "samples_per_second", "of all ranks, in steps"),
    ("sent", "Bytes sent to other nodes", "sent", "by the rank that sends most, between two lines"),
)
LEARNED, SPED = ("rate", "norm", "noise", "distance"), ("speed", "sent")


def colour_of(index: int) -> str:
    """The colour of a run's curves."""
    return colours.SERIES[index % len(colours.SERIES)].light


def dash_of(index: int) -> str:
    """And their dashes."""
    return DASHES[index // len(colours.SERIES) % len(DASHES)]


def short(run: Run) -> str:
    """A run's name in a legend, which would leave out one that begins with an underscore."""
    text = run.label if len(run.label) <= LONG else "\u2026" + run.label[1 - LONG :]
    return f"./{text}" if text.startswith("_") else text


def learned(runs: list[Run], axes: list[Axis]) -> list[Drawing]:
    """Loss and score over each axis, where any run has them."""
    metrics = dict.fromkeys(run.metrics.metric for run in runs if run.metrics.metric)
    metric = " or ".join(metrics)
    drawings = []
    for column, what in (("loss", "Loss"), ("score", metric.replace("_", " ").capitalize())):
        for axis in axes:
            if any(_curves(run, axis, column) for run in runs):
                plot = functools.partial(_plot, runs, axis, column)
                height = HEIGHT + LEGEND * _legend_lines(runs, extra=4)
                window = max(smoothed(_trained(run, axis, column))[1] for run in runs)
                note = f"thin: each line of the log; thick: the mean of {window}" if window else ""
                drawings.append(Drawing(f"{column}-{axis.name}", f"{what} by {axis.title}", plot, note, height))
    return drawings


def quantities(runs: list[Run], which: tuple[str, ...]) -> list[Drawing]:
    """Curves of one quantity each over steps, where any run has it."""
    drawings = []
    for name, title, column, note in QUANTITIES:
        curves = [known(run.metrics.steps["step"], run.metrics.steps[column]) for run in runs]
        empty = not any(curve.y.any() for curve in curves) if name == "sent" else not any(len(c.y) for c in curves)
        if name in which and not empty:
            plot = functools.partial(_plot_quantity, runs, curves)
            lines = _legend_lines(runs, 2) if len(runs) > 1 or any(run.restarts for run in runs) else 0
            drawings.append(Drawing(name, title, plot, note, HEIGHT + LEGEND * lines))
    return drawings


def _curves(run: Run, axis: Axis, column: str) -> list[Curve]:
    """What was trained, and what was evaluated; without those that have no points."""
    return [curve for curve in (_trained(run, axis, column), _scored(run, axis, column)) if len(curve.y)]


def _trained(run: Run, axis: Axis, column: str) -> Curve:
    return known(axis.of_steps(run), run.metrics.steps[column])


def _scored(run: Run, axis: Axis, column: str) -> Curve:
    evaluations = run.metrics.evaluations
    return known(axis.at(run, evaluations["step"]), evaluations[column])


def _plot(runs: list[Run], axis: Axis, column: str, figure: Any) -> None:
    """What each run trained and evaluated: of one run in two colours, of several in a colour for each run."""
    axes, alone = figure.subplots(), len(runs) == 1
    if column == "loss" and is_wide([curve for run in runs for curve in _curves(run, axis, column)]):
        logarithmic(axes)
    for index, run in enumerate(runs):
        look = {"color": colour_of(index), "linestyle": dash_of(index)}
        _line(axes, _trained(run, axis, column), look)
        scored = thinned(_scored(run, axis, column))
        marks = {"color": colours.RED.light if alone else look["color"], "marker": "o", "markerfacecolor": "white"}
        axes.plot(*scored, **marks, linestyle="-", linewidth=0.9, markevery=max(len(scored.x) // 40, 1), zorder=3)
        _mark_jobs(axes, run, axis, colours.MUTED.light if alone else look["color"])
    axes.set_xlabel(axis.label)
    evaluated = " or ".join(sorted({run.evaluated for run in runs}))
    first, second = (colours.BLUE.light, colours.RED.light) if alone else (colours.MUTED.light, colours.MUTED.light)
    kinds: dict[str, dict[str, Any]] = {
        "training": {"color": first},
        evaluated: {"color": second, "marker": "o", "markerfacecolor": "white", "linewidth": 0.9},
    }
    drawn = [bool(_curves(run, axis, column)) for run in runs]
    _legend(figure, runs, drawn, kinds | _signs(runs, checkpoints=True))


def _line(axes: Any, curve: Curve, look: dict[str, Any]) -> None:
    """A curve, and smoothed if it has many points."""
    mean, window = smoothed(curve)
    dots = {"marker": "."} if len(curve.x) <= FEW else {}
    raw = {"alpha": RAW, "linewidth": 0.8} if window else {}
    axes.plot(*thinned(curve), **look, **dots, **raw)
    if window:
        axes.plot(*thinned(mean), **look)


def _plot_quantity(runs: list[Run], curves: list[Curve], figure: Any) -> None:
    axes = figure.subplots()
    if is_wide([curve for curve in curves if len(curve.y)]):
        logarithmic(axes)
    for index, (run, curve) in enumerate(zip(runs, curves, strict=True)):
        if len(curve.y):
            dots = {"marker": "."} if len(curve.x) <= FEW else {}
            axes.plot(*thinned(curve), color=colour_of(index), linestyle=dash_of(index), linewidth=1.1, **dots)
            mark_restarts(axes, run, STEP, colours.MUTED.light if len(runs) == 1 else colour_of(index))
    if axes.get_yscale() != "log" and all(curve.y.min(initial=0) >= 0 for curve in curves):
        axes.set_ylim(bottom=0)
    axes.set_xlabel(STEP.label)
    drawn = [bool(len(curve.y)) for curve in curves]
    _legend(figure, runs, drawn, _signs([run for run, there in zip(runs, drawn, strict=True) if there], False))


def logarithmic(axes: Any) -> None:
    """A logarithmic axis, labelled 0.1, 1, 10."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")


def mark_restarts(axes: Any, run: Run, axis: Axis, colour: str) -> None:
    """A line where each later job of a run began."""
    for place in axis.at(run, np.array(run.restarts, dtype=np.float64)):
        if np.isfinite(place):
            axes.axvline(place, color=colour, linestyle=(0, (1, 2)), linewidth=1.2, zorder=1)


def _mark_jobs(axes: Any, run: Run, axis: Axis, colour: str) -> None:
    """Where later jobs began, and below, where there are checkpoints."""
    mark_restarts(axes, run, axis, colour)
    places: Numbers = axis.at(run, np.array(run.checkpoints, dtype=np.float64))
    places = places[np.isfinite(places)]
    bottom = {"transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 4}
    if len(places):
        axes.plot(places, [0.0] * len(places), "^", color=colour, markersize=5, **bottom)


def _signs(runs: list[Run], checkpoints: bool) -> dict[str, dict[str, Any]]:
    """The marks of a figure, for its legend."""
    colour = {"color": colours.MUTED.light}
    signs: dict[str, dict[str, Any]] = {}
    if checkpoints and any(run.checkpoints for run in runs):
        signs["checkpoint"] = {**colour, "marker": "^", "markersize": 5, "linestyle": ""}
    if any(run.restarts for run in runs):
        signs["restart"] = {**colour, "linestyle": (0, (1, 2)), "linewidth": 1.2}
    return signs


def _legend(figure: Any, runs: list[Run], drawn: list[bool], signs: dict[str, dict[str, Any]]) -> None:
    """Above the axes, where it hides nothing: the runs that are drawn, if there are several, and what signs mean."""
    from matplotlib.lines import Line2D

    looks = [{"color": colour_of(index), "linestyle": dash_of(index)} for index in range(len(runs))]
    names = [(short(run), look) for run, look, there in zip(runs, looks, drawn, strict=True) if there]
    entries = [*(names if len(runs) > 1 else []), *signs.items()]
    if entries:
        lines = [Line2D([], [], **look) for _, look in entries]
        figure.legend(
            lines, [name for name, _ in entries], loc="outside upper left", ncols=2, handlelength=1.8, columnspacing=1.2
        )


def _legend_lines(runs: list[Run], extra: int) -> int:
    return -(-((len(runs) if len(runs) > 1 else 0) + extra) // 2)
