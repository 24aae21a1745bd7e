"""The noise scale: its estimates have no bias, are those of the paper, and come back when a run goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.errors import ConfigError, freed
from mpiml.nn.layers import Linear
from mpiml.train import train
from mpiml.training.job import job_of
from mpiml.training.noise import NoiseScale, averaged, averages_of, estimates, scale
from mpiml.training.run import Due, unsaved
from mpiml.vectors import Block

Array = NDArray[np.float64]
MANY = 4000  # steps, or parts


def estimates_of(sums: Array, weights: Array, rows: int) -> tuple[float, float]:
    """The estimates of a step from the gradient (parameters,) of each micro-batch, summed over its rows."""
    norm = float(np.linalg.norm(sums.sum(axis=0)) / weights.sum())
    pair = estimates(float((sums**2).sum()), float((weights**2).sum()), float(weights.sum()), norm, rows)
    assert pair
    return pair


def test_equal_parts_give_the_formulas_of_the_paper() -> None:
    rows = np.random.default_rng(0).standard_normal((6, 4, 3)) + 1.0  # micro-batches, rows, parameters
    small, large = 4, 24
    squares, square = (rows.mean(axis=1) ** 2).sum(axis=1).mean(), (rows.mean(axis=(0, 1)) ** 2).sum()
    expected = (squares - square) / (1 / small - 1 / large), (large * square - small * squares) / (large - small)
    assert estimates_of(rows.sum(axis=1), np.full(6, 4.0), 24) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("unit", [1.0, 7.0])  # what a row weighs
def test_parts_of_unequal_size_give_the_truth_on_average(unit: float) -> None:
    """Of rows whose gradients have a known mean and covariance; an empty micro-batch changes nothing."""
    random, sizes = np.random.default_rng(1), [1, 5, 0, 2, 16]
    mean, deviation = np.array([0.6, -0.8, 0.0]), np.array([1.0, 2.0, 3.0])  # G2 = 1, S = 14
    pairs = []
    for _ in range(MANY):
        gradients = unit * (mean + deviation * random.standard_normal((sum(sizes), 3)))
        sums = np.array([part.sum(axis=0) for part in np.split(gradients, np.cumsum(sizes)[:-1])])
        pairs.append(estimates_of(sums, unit * np.array(sizes), sum(sizes)))
    error = np.std(pairs, axis=0) / math.sqrt(MANY)
    assert np.all(np.abs(np.mean(pairs, axis=0) - [14.0, 1.0]) < 4 * error)
    assert np.all(error < [0.3, 0.03])
    averages = averages_of(pairs)
    assert scale(averages) == averages[0] / averages[1]
    sums = np.mean(pairs, axis=0)
    assert scale((sums[0], sums[1])) == pytest.approx(14.0, rel=0.1)


@pytest.mark.parametrize("sizes", [(0, 0), (0, 3)])
def test_one_part_with_rows_tells_nothing(sizes: tuple[int, int]) -> None:
    weight, squares = float(sum(sizes)), float(sum(size**2 for size in sizes))
    assert estimates(1.0, squares, weight, 1.0, 9) is None


@pytest.mark.parametrize("averages", [(0.0, 0.0), (1.0, -1.0), (-1.0, 1.0), (1e300, 1e-300)])
def test_averages_may_tell_no_scale(averages: tuple[float, float]) -> None:
    assert scale(averages) is None


def test_steps_count_less_the_older_they_are() -> None:
    averages = averages_of([(1.0, 0.0), (0.0, 1.0)])
    assert averages == averaged(averaged((0.0, 0.0), (1.0, 0.0)), (0.0, 1.0))
    assert scale(averages) == pytest.approx(0.9)


def test_running_averages_have_no_gradient() -> None:
    """Their blocks, and what is in no block, do not count, and nothing is left of the step before."""
    noise = NoiseScale(MPI.COMM_SELF, [Block(0, 2, False, 0.1), Block(2, 4, False), Block(5, 6, True)])
    for _ in range(2):
        for gradient in ([9, 9, 1, 2, 9, 3], [9, 9, 3, 1, 9, 4]):
            noise.count(np.array(gradient, np.float32))
        norm = math.sqrt(16 + 9 + 49) / 2
        measured = noise.measured(np.array([1.0, 1.0]), 2.0, norm, 2)
        assert measured[1:] == pytest.approx((3.0, 17.0), rel=1e-12)  # a row in each of two: 2 G2 = 74 - 40


ROWS, PARTS = 23, 7
X, Y = np.random.default_rng(2).standard_normal((2, ROWS, 3))
WEIGHTS = np.where(np.arange(ROWS) < 3, 0.0, np.arange(ROWS) % 3 + 0.5)  # the first micro-batch counts nothing
SETTINGS: dict[str, Any] = {
    "batch": ROWS,
    "microbatches": PARTS,
    "shuffle": "none",
    "dtype": "float64",
    "loss": "mse",
    "steps": 1,
    "eval_every": 0,
    "noise_scale": True,
}


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize(
    "settings", [{}, {"allreduce": "mpi"}, {"bucket": 1e-6}, {"clip": 1e-3}, {"rates": ("layers.0.weight=0.1",)}]
)
def test_a_linear_model_has_the_noise_that_numpy_gets(settings: dict[str, Any], weights: Array | None) -> None:
    """Of two layers, a bucket each, whose gradients are sent, and added up, while the last one goes backward."""
    data = Dataset.from_arrays(X, Y, X, Y, weights, weights)
    run = unsaved(
        MPI.COMM_SELF, Config(**SETTINGS | settings), data, lambda shape, outputs: [Linear(3, 3), Linear(3, 3)]
    )
    with freed(run, 1), run.data.ahead:
        one, one_bias, two, two_bias = (p.value.copy() for p in run.model.layouts[0].parameters)
        measured = run.step(1, Due(log=True)).noise
    w = np.ones(ROWS) if weights is None else weights
    hidden = X @ one + one_bias
    dy = w[:, None] * (hidden @ two + two_bias - Y) * 2 / 3
    dh = dy @ two.T
    columns = [X[:, :, None] * dh[:, None], dh, hidden[:, :, None] * dy[:, None], dy]
    gradients = np.concatenate([column.reshape(ROWS, -1) for column in columns], axis=1)
    cuts = [ROWS * m // PARTS for m in range(1, PARTS)]
    sums = np.array([part.sum(axis=0) for part in np.split(gradients, cuts)])
    expected = estimates_of(sums, np.array([part.sum() for part in np.split(w, cuts)]), ROWS)
    assert measured
    assert measured[1:] == pytest.approx(expected, rel=1e-9)


def test_only_steps_that_are_logged_are_measured() -> None:
    run = unsaved(MPI.COMM_SELF, Config(**SETTINGS), Dataset.from_arrays(X, Y, X, Y), lambda *_: [Linear(3, 3)])
    with freed(run, 1), run.data.ahead:
        assert run.step(1, Due(save=True)).noise is None
        assert run.noise
        assert not run.noise._squares.any()


def run_of(out: Path, **more: Any) -> dict[str, Any]:
    settings = {"hidden": (4,), "microbatches": 3, "log_every": 2, "eval_every": 0, "save_every": 5, "quiet": True}
    return train(Config(**settings | {"noise_scale": True, "seed": 1, "out": str(out)} | more))


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def noise_in(out: Path) -> list[Any]:
    names = ("step", "noise_scale", "gradient_variance", "gradient_square")
    return [[line.get(name) for name in names] for line in lines(out)]


def test_a_run_that_goes_on_has_the_averages_of_one_that_never_stopped(tmp_path: Path, capsys: Any) -> None:
    """The line of step 5, which is there because the run was to end, and is none of one that does not, counts no more;
    nor does what is not in the log."""
    whole = run_of(tmp_path / "whole", steps=12, quiet=False)
    assert all(None not in line for line in noise_in(tmp_path / "whole"))
    assert whole["noise_scale"] == noise_in(tmp_path / "whole")[-1][1]
    assert (
        f"noise scale: batches beyond about {whole['noise_scale']:,.0f} rows bring little\n" in capsys.readouterr().out
    )
    run_of(tmp_path / "parts", steps=5)
    assert len(noise_in(tmp_path / "parts")) == 3
    assert run_of(tmp_path / "parts", steps=12, resume=True)["noise_scale"] == whole["noise_scale"]
    assert noise_in(tmp_path / "parts") == noise_in(tmp_path / "whole")


def test_it_changes_nothing_and_may_begin_late(tmp_path: Path) -> None:
    without = run_of(tmp_path / "without", steps=10, noise_scale=False)
    assert "noise_scale" not in without
    assert "noise_scale" not in lines(tmp_path / "without")[-1]
    late = run_of(tmp_path / "without", steps=12, resume=True)
    assert late["weights_sha256"] == run_of(tmp_path / "whole", steps=12)["weights_sha256"]
    last = noise_in(tmp_path / "without")[-1]
    assert last[1] == late["noise_scale"] == pytest.approx(last[2] / last[3])  # of one line alone


def test_a_job_is_planned_with_the_micro_batches_of_its_grid() -> None:
    x, y = np.ones((12, 4), np.float32), np.arange(12) % 3
    config, data = Config(batch=6, noise_scale=True), Dataset.from_arrays(x, y, x, y)
    assert job_of(config, 2, 2, data).microbatches == 2
    with pytest.raises(ConfigError, match="--noise-scale --microbatches 1"):
        job_of(config, 1, 1, data)
