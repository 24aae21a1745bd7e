"""Contract test 1: the layout never changes the answer, not by one bit of weights, optimizer state, loss or norm."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.conftest import Job
from tests.contract.features import FEATURES, FILES, PERCEPTRON
from tests.contract.table import GRIDS, NODES, Table, assert_same, saved

pytestmark = pytest.mark.contract
Train = Callable[..., Job]
PAIRS = [(layout, name) for name, feature in FEATURES.items() for layout in feature.on]
PAIRS += [(layout, "perceptron") for layout in GRIDS | NODES]
PAIRS += [(layout, "double") for layout in ("4 --pipe 4 --schedule zb-h1", "16 --pipe 4 --schedule gpipe")]


@pytest.mark.parametrize(("layout", "feature"), PAIRS)
def test_same_bits(table: Table, layout: str, feature: str) -> None:
    """Each feature on each kind of layout that means something to it, and one on all layouts, as on one rank."""
    assert_same(table.on(layout, feature), table.alone(feature))


@pytest.mark.parametrize(
    ("ranks", "flags", "nodes"), [(3, "", ""), (4, "--pipe 2 --bucket 0.0005", "2,2"), (16, "--pipe 4", "")]
)
def test_same_bits_of_a_job_of_its_own(table: Table, train: Train, ranks: int, flags: str, nodes: str) -> None:
    """The table trains many features in one job."""
    assert_same(train(ranks, f"{PERCEPTRON} {flags}", MPIML_NODES=nodes), table.alone("perceptron"))


def test_a_perceptron_is_worth_comparing(table: Table, train: Train) -> None:
    """It learns, every step is clipped, all that is compared is there, and the seed matters."""
    job = table.alone("perceptron")
    steps = [line for line in job.metrics if "evaluation" not in line]
    assert (len(steps), len(job.metrics) - len(steps), job.result["step"]) == (15, 3, 45)
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    assert all(line["gradient_norm"] > 0.3 for line in steps)
    assert len(saved(job)) == 3 * 6
    assert train(0, f"{PERCEPTRON} --seed 6").result["weights_sha256"] != job.result["weights_sha256"]


def test_features_make_a_difference(table: Table) -> None:
    """No two of them end with the same weights, but those that are the same rows in other files."""
    rows = [name for name, feature in FEATURES.items() if feature.on not in ((), FILES)]
    ends = {table.alone(name).result["weights_sha256"] for name in rows}
    assert len(ends) == len(rows)


def test_the_best_is_worth_comparing(table: Table) -> None:
    job = table.alone("best")
    step, best = job.result["step"], job.result["best_step"]
    assert best < step < 40  # which steps these are depends on the processor
    assert f"no better validation loss in 3 evaluations since step {best}" in job.result["reason"]
    assert len(list((job.run / "checkpoints").iterdir())) == 3
    going_on = table.alone("going-on").result
    assert 0 < going_on["best_step"] < going_on["step"]


def test_running_averages_are_worth_comparing(table: Table) -> None:
    for name in ("averages", "averages-double", "averages-of-a-row", "averages-cnn"):
        averages = [array for array in saved(table.alone(name)) if "running" in array]
        assert len(averages) == 2 * (2 if "cnn" in name else 7)
        assert not any(array.startswith("optimizer.") for array in averages)


def test_averages_of_weights_are_worth_comparing(table: Table) -> None:
    """They are there, of parameters alone, and are others than the weights."""
    arrays = saved(table.alone("ema"))
    averages = {name.removeprefix("ema."): array for name, array in arrays.items() if name.startswith("ema.")}
    assert averages.keys() == {name for name in arrays if name.startswith("layers.") and "running" not in name}
    assert not any(np.array_equal(array, arrays[name]) for name, array in averages.items())
    assert any(line.get("loss") == 0 for line in table.alone("ema").metrics)  # steps without rows


def test_the_noise_scale_is_worth_comparing(table: Table) -> None:
    """It is known, and it was before the checkpoint that a run goes on from."""
    noise = {line["step"]: line["noise_scale"] for line in table.alone("noise").metrics if "noise_scale" in line}
    assert list(noise) == [2, 4, 6, 8, 9]
    assert all(noise.values())
    assert noise[9] == table.alone("noise").result["noise_scale"]


def test_steps_without_rows_are_worth_comparing(table: Table) -> None:
    losses = [line["loss"] for line in table.alone("empty-steps").metrics if "loss" in line]
    assert 5 < losses.count(0) < 15


@pytest.mark.parametrize("feature", ["masked", "own"])
def test_rows_weigh_what_they_weigh_in_whichever_part_they_are(table: Table, feature: str) -> None:
    """Steps on all rows in parts of unequal weight are those on all rows at once."""
    job, whole = table.alone(feature), table.alone(f"{feature}-whole")
    assert job.result["loss"] == pytest.approx(whole.result["loss"], rel=1e-9)
    metric = "error" if feature == "own" else "accuracy"
    assert job.result[metric] == pytest.approx(whole.result[metric], rel=1e-9)
    for name, array in saved(whole).items():
        np.testing.assert_allclose(saved(job)[name], array, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(
    ("layout", "feature"),
    [("alone", "library"), ("data", "library"), ("4  2,2", "library"), ("4 --pipe 2", "library")],
)
def test_library_sum_is_close(table: Table, layout: str, feature: str) -> None:
    job = table.on(layout, feature)
    assert job.code == 0, job.err
    expected = table.alone("double")
    for name, array in saved(job).items():
        np.testing.assert_allclose(array, saved(expected)[name], rtol=1e-8, atol=1e-10, err_msg=name)
    assert job.result["loss"] == pytest.approx(expected.result["loss"], rel=1e-9)
