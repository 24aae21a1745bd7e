"""Curves are thinned without losing a peak, smoothed without being moved, and drawn over the axes that are known."""

from __future__ import annotations

import numpy as np

from mpiml.report.curves import Curve, axes_of, is_wide, known, largest, least, means, smoothed, thinned
from mpiml.report.runs import read_run
from tests.report.conftest import Make, step_line


def test_a_long_curve_keeps_its_ends_and_each_peak() -> None:
    x = np.arange(100_000.0)
    y = np.sin(x / 1000)
    y[[777, 54_321]] = 50, -50
    curve = thinned(Curve(x, y))
    assert len(curve.x) <= 2002
    assert {0, 777, 54_321, 99_999} <= set(curve.x)
    assert (np.diff(curve.x) > 0).all()
    short = Curve(x[:2000], y[:2000])
    assert thinned(short) is short


def test_smoothing_is_a_mean_of_neighbours() -> None:
    x = np.arange(100.0)
    curve, window = smoothed(Curve(x, 3 * x + 1))
    assert window == 5
    np.testing.assert_allclose(curve.y, 3 * x + 1)  # a line stays where it is, at its ends too
    peak = np.zeros(100)
    peak[50] = 5.0
    assert smoothed(Curve(x, peak))[0].y[46:55].tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0]
    few, window = smoothed(Curve(x[:10], x[:10]))
    assert (len(few.x), window) == (0, 0)


def test_unknown_points_are_left_out() -> None:
    curve = known(np.array([1.0, np.nan, 3.0]), np.array([1.0, 2.0, np.inf]))
    assert (curve.x.tolist(), curve.y.tolist()) == ([1.0], [1.0])


def test_runs_of_rows_are_reduced() -> None:
    values = np.array([[1.0, 5.0], [3.0, 1.0], [8.0, 0.0]])
    assert means(values, 2).tolist() == [[1.0, 5.0], [5.5, 0.5]]
    assert least(values, 1).tolist() == [[1.0, 0.0]]
    assert largest(values, 9).tolist() == values.tolist()


def test_an_axis_is_logarithmic_if_values_are_far_apart() -> None:
    def wide(*values: float) -> bool:
        return is_wide([Curve(np.arange(len(values)), np.array(values))])

    assert [wide(1.0, 30.0), wide(1.0, 10.0), wide(0.0, 30.0), wide(-1.0, 30.0), wide()] == [True, *[False] * 4]
    assert not is_wide([])


def test_the_axes_that_runs_have(made: Make) -> None:
    short = axes_of([read_run(made("seconds", [step_line(24)]), "a")])
    assert [axis.label for axis in short] == ["step", "epochs", "seconds of training"]
    empty = read_run(made("empty", [], environment=None), "a")
    assert [axis.label for axis in axes_of([empty])] == ["step"]
    run = read_run(made("hours", [step_line(24, speed=0.1)]), "a")
    step, epoch, time = axes_of([run])
    assert time.label == "hours of training"
    assert step.at(run, np.array([6.0])).tolist() == [6]
    assert epoch.at(run, np.array([6.0])).tolist() == [0.5]
    assert time.at(run, np.array([12.0, 24.0])).tolist() == [4, 8]
