"""Figures of where the time of steps goes: shares of activities, and how far apart ranks are."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from mpiml.clock import SHARES
from mpiml.pages import colours
from mpiml.pages.drawing import HEIGHT, LEGEND, Drawing
from mpiml.report.columns import LEAST, MOST, Numbers, Slow
from mpiml.report.curves import STEP, largest, least, means
from mpiml.report.learning import mark_restarts, short
from mpiml.report.runs import Run

BANDS = 200  # places of a strip
STACKED = 60  # and of a stack, which is hard to read where it jumps
RUNS = 6  # that have figures of their own
SMALL = 0.02  # of the time: activities that take less on all ranks have no band
PALETTE = (colours.BLUE, colours.ORANGE, colours.RED, colours.GREEN, colours.GREY)
COLOURS = {name: colour.light for name, colour in zip(SHARES, PALETTE, strict=True)}


def timed(runs: list[Run]) -> list[Drawing]:
    """Shares of all runs beside each other, if they are several; shares and spread of each of the first RUNS."""
    told = [run for run in runs if _seconds(run, MOST).sum() > 0]
    drawings = []
    if len(told) > 1:
        height = 1.0 + 0.28 * len(told) + 2 * LEGEND
        plot = functools.partial(_plot_bars, told)
        drawings.append(Drawing("shares", "Where the time goes", plot, "shares of the time of all steps", height))
    for number, run in enumerate(told[:RUNS], 1):
        where, suffix = (f", {run.label}", f"-{number}") if len(runs) > 1 else ("", "")
        note = "the middle between the rank that takes least and the one that takes most"
        plot = functools.partial(_plot_shares, run)
        height = HEIGHT + 2 * LEGEND
        drawings.append(Drawing(f"shares-by-step{suffix}", f"Where the time goes by step{where}", plot, note, height))
        if (_seconds(run, MOST) > _seconds(run, LEAST)).any():
            note = "milliseconds of a step, from the rank that takes least to the one that takes most"
            note += "; triangles: a rank was named slow" if run.metrics.slow else ""
            plot, height = functools.partial(_plot_spread, run), 0.5 + 0.8 * len(_spread(run))
            drawings.append(Drawing(f"spread{suffix}", f"Spread over ranks{where}", plot, note, height))
    return drawings


def shares_of(run: Run) -> dict[str, float]:
    """The shares of a run's activities; nothing if no line tells them."""
    total = _middle(run).sum(axis=0)
    return dict(zip(SHARES, (total / total.sum()).tolist(), strict=True)) if total.sum() else {}


def slow_ranks(run: Run) -> list[tuple[int, str, str, list[Slow]]]:
    """Rank, host, activity and lines of each rank that was named slow, those that were named most often first."""
    named: dict[tuple[int, str, str], list[Slow]] = {}
    for slow in run.metrics.slow:
        named.setdefault((slow.rank, slow.host, slow.activity), []).append(slow)
    return [(*who, lines) for who, lines in sorted(named.items(), key=lambda one: (-len(one[1]), one[0]))]


def _seconds(run: Run, names: list[str]) -> Numbers:
    """(lines, activities) seconds; those that are not known count as none."""
    return np.nan_to_num(np.stack([run.metrics.steps[name] for name in names], axis=1))


def _middle(run: Run) -> Numbers:
    middle: Numbers = (_seconds(run, LEAST) + _seconds(run, MOST)) / 2
    return middle


def _plot_bars(runs: list[Run], figure: Any) -> None:
    axes = figure.subplots()
    left = np.zeros(len(runs))
    for name in SHARES:
        widths = np.array([100 * shares_of(run)[name] for run in runs])
        axes.barh(
            range(len(runs)), widths, 0.7, left, label=name, color=COLOURS[name], edgecolor="white", linewidth=0.6
        )
        left += widths
    axes.set_yticks(range(len(runs)), [short(run) for run in runs])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the time (%)")
    _legend(figure, axes)


def _plot_shares(run: Run, figure: Any) -> None:
    axes = figure.subplots()
    steps, seconds = means(run.metrics.steps["step"], STACKED), means(_middle(run), STACKED)
    total = seconds.sum(axis=1, keepdims=True)
    shares = 100 * np.divide(seconds, total, out=np.zeros_like(seconds), where=total > 0)
    if len(steps) == 1:
        steps, shares = np.array([0.0, steps[0]]), np.repeat(shares, 2, axis=0)
    axes.stackplot(steps, shares.T, labels=SHARES, colors=list(COLOURS.values()), linewidth=0)
    mark_restarts(axes, run, STEP, colours.INK.light)
    axes.set_xlim(steps[0], steps[-1])
    axes.set_ylim(0, 100)
    axes.set_xlabel(STEP.label)
    axes.set_ylabel("share of the time (%)")
    _legend(figure, axes)


def _spread(run: Run) -> list[int]:
    """The activities, by number, whose spread is drawn: those that take time on some rank."""
    most = _seconds(run, MOST).sum(axis=0)
    return [column for column in range(len(SHARES)) if most[column] > SMALL * most.sum()]


def _plot_spread(run: Run, figure: Any) -> None:
    """A strip for each activity, with a scale of its own."""
    steps, shown = run.metrics.steps["step"], _spread(run)
    between = np.diff(steps, prepend=0.0)
    between = np.where(between > 0, between, 1.0)[:, None]
    low, high = (1e3 * _seconds(run, names) / between for names in (LEAST, MOST))
    places, low, high = means(steps, BANDS), least(low, BANDS), largest(high, BANDS)
    strips = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, column in zip(strips, shown, strict=True):
        name = SHARES[column]
        look = {"color": COLOURS[name], "marker": "." if len(places) == 1 else ""}
        axes.fill_between(places, low[:, column], high[:, column], alpha=0.3, color=COLOURS[name], linewidth=0)
        axes.plot(places, high[:, column], **look, linewidth=1.1)
        axes.plot(places, low[:, column], **look, linewidth=0.7)
        slow = [one.step for one in run.metrics.slow if one.activity == name][:BANDS]
        top = {"transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 4}
        if slow:
            axes.plot(slow, [1.0] * len(slow), "v", color=colours.INK.light, markersize=4, **top)
        mark_restarts(axes, run, STEP, colours.MUTED.light)
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="y", nbins=3)
        axes.set_title(name, loc="left", fontsize=8, pad=3)
    strips[-1].set_xlabel(STEP.label)


def _legend(figure: Any, axes: Any) -> None:
    handles, names = axes.get_legend_handles_labels()
    place = {"loc": "outside upper left", "ncols": 3, "handlelength": 1.4, "columnspacing": 1.2}
    figure.legend(handles, names, **place)
