"""Contract test 2: training on any grid against a plain serial reference that shares no code with the package."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.conftest import Job, launch
from tests.contract import reference

pytestmark = pytest.mark.contract
Train = Callable[..., Job]
Begin = Callable[[str, str], "Given"]
STEPS, ROWS, INPUTS = 6, 23, 5
FIXED = f"--batch {ROWS} --hidden 8,6,7 --dtype float64 --seed 3 --log-every 1 --eval-every 3 --quiet"


def arrays(loss: str) -> dict[str, NDArray[Any]]:
    """A small data set whose every step is the whole of it, so that the order of rows does not matter."""
    random = np.random.default_rng(7)
    x, noise = random.standard_normal((2 * ROWS, INPUTS)), random.standard_normal((2 * ROWS, 2))
    labels = (x[:, 0] > 0).astype(int) + (x[:, 1] > 0) if loss == "cross_entropy" else x[:, :2] * x[:, 2:4] + noise
    return {"x_train": x[:ROWS], "y_train": labels[:ROWS], "x_test": x[ROWS:], "y_test": labels[ROWS:]}


def saved(job: Job, step: int) -> reference.Weights:
    """The linear layers in a checkpoint, in order."""
    assert job.code == 0, job.err
    found = load_file(job.run / "checkpoints" / f"step-{step:09d}.safetensors")
    layers = sorted({int(name.split(".")[1]) for name in found if name.startswith("layers.")})
    return [(found[f"layers.{layer}.weight"], found[f"layers.{layer}.bias"]) for layer in layers]


NORMAL = """
from mpiml.nn.layers import BatchNorm2d, Flatten, Linear

def model(shape, outputs):
    return [BatchNorm2d(2, momentum=0.25), Flatten(), Linear(12, outputs)]
"""


@pytest.mark.parametrize(("ranks", "grid"), [(3, ""), (2, "--allreduce mpi"), (2, "--pipe 2")])
def test_running_averages_are_means_over_rows_whatever_their_weight(
    train: Train, tmp_path: Path, ranks: int, grid: str
) -> None:
    """Two steps on all rows, of which some do not count, in parts of 3 and 4 rows."""
    random = np.random.default_rng(7)
    x, y = random.standard_normal((2 * ROWS, 3, 2, 2)) * [1, 4] + [5, -3], random.integers(-1, 3, 2 * ROWS)
    np.savez(tmp_path / "data.npz", x_train=x[:ROWS], y_train=y[:ROWS], x_test=x[ROWS:], y_test=y[ROWS:])
    (tmp_path / "normal.py").write_text(NORMAL)
    arguments = f"--data {tmp_path}/data.npz --model normal:model --batch {ROWS + 4} --dtype float64 --clip 0.1 --quiet"
    how = f"{arguments} --ignore -1 --microbatches 6 --shuffle none --steps 2 --weight-decay 0.5 {grid}"
    own = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    job = train(ranks, how, **own)
    assert job.code == 0, job.err
    found = load_file(job.run / "checkpoints" / "step-000000002.safetensors")
    parts = np.split(x[:ROWS], [3, 7, 11, 15, 19])  # as ROWS * m // 6 cuts them
    variance = sum(len(part) * part.var(axis=(0, 1, 2), ddof=1) for part in parts) / ROWS
    mean, old = x[:ROWS].mean(axis=(0, 1, 2)), 0.75**2
    np.testing.assert_allclose(found["layers.0.running_mean"], (1 - old) * mean, rtol=1e-12)
    np.testing.assert_allclose(found["layers.0.running_variance"], old + (1 - old) * variance, rtol=1e-12)
    assert not any(name.startswith("optimizer.") and "running" in name for name in found)
    begun = train(ranks, f"{how} --steps 1 --init {job.run}/checkpoints/step-000000002.safetensors", "begun", **own)
    found = load_file(begun.run / "checkpoints" / "step-000000001.safetensors")
    np.testing.assert_allclose(found["layers.0.running_mean"], (1 - 0.75**3) * mean, rtol=1e-12)


@dataclass
class Given:
    """Where training begins: a file of data, its arrays, and the first weights."""

    path: Path
    data: dict[str, NDArray[Any]]
    weights: reference.Weights


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Given]:
    """`given(loss, activation)`: the first weights are those after a step with a learning rate of zero."""

    def begin(loss: str, activation: str) -> Given:
        folder = tmp_path_factory.mktemp("given")
        path, data = folder / "data.npz", arrays(loss)
        np.savez(path, **data)
        arguments = f"{FIXED} --data {path} --activation {activation} --steps 1 --optimizer sgd --lr 0 --save-every 1"
        done = launch(1, "-m", "mpiml.train", "--out", str(folder / "run"), *arguments.split())
        return Given(path, data, saved(Job(done.returncode, done.stdout, done.stderr, folder / "run"), 1))

    return functools.cache(begin)


def compare(given: Given, train: Train, loss: str, ranks: int, grid: str, **settings: Any) -> None:
    """Train by the real command and by the reference, from the same first weights."""
    settings = {"optimizer": "sgd", "lr": 0.1, "activation": "relu"} | settings
    flags = " ".join(f"--{'weight-decay' if name == 'decay' else name} {value}" for name, value in settings.items())
    job = train(ranks, f"{FIXED} --data {given.path} {flags} --steps {STEPS} --save-every {STEPS} {grid}")
    found, data = saved(job, STEPS), given.data
    expected, losses, norms = reference.train(
        given.weights, data["x_train"], data["y_train"], STEPS, loss=loss, **settings
    )
    assert [w.shape for w, _ in found] == [(INPUTS, 8), (8, 6), (6, 7), (7, 3 if loss == "cross_entropy" else 2)]
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got[0], want[0], rtol=0, atol=1e-10)
        np.testing.assert_allclose(got[1], want[1], rtol=0, atol=1e-10)
    lines = [line for line in job.metrics if "evaluation" not in line]
    np.testing.assert_allclose([line["loss"] for line in lines], losses, rtol=1e-10)
    np.testing.assert_allclose([line["gradient_norm"] for line in lines], norms, rtol=1e-10)
    check_evaluation(job, found, data, loss, settings["activation"])


def check_evaluation(
    job: Job, weights: reference.Weights, data: dict[str, NDArray[Any]], loss: str, activation: str
) -> None:
    """The last evaluation is that of the last weights, on the test rows."""
    value, _ = reference.loss_and_gradient(weights, data["x_test"], data["y_test"], activation, loss)
    assert job.result["test_loss"] == pytest.approx(value, rel=1e-10)


# Micro-batches even, ragged (23 rows in 7 parts), and fewer than stages. With --cuts 2 a stage begins with a linear
# layer, which still needs what it received when it goes backward.
GRIDS = [
    (1, "--microbatches 1"),
    (1, "--microbatches 7"),
    (2, "--microbatches 4"),
    (3, "--microbatches 7"),
    (4, "--pipe 2 --microbatches 4"),
    (4, "--pipe 2 --cuts 2 --microbatches 7 --schedule gpipe"),
    (4, "--pipe 4 --microbatches 1"),
    (4, "--pipe 4 --microbatches 7"),
]


@pytest.mark.parametrize(("ranks", "grid"), GRIDS)
def test_gradient_descent_on_every_grid(given: Begin, train: Train, ranks: int, grid: str) -> None:
    """Plain descent, because Adam would hide a gradient that is off by a factor."""
    compare(given("cross_entropy", "relu"), train, "cross_entropy", ranks, grid)


RULES = [
    {"optimizer": "momentum", "lr": 0.05, "decay": 0.03},
    {"optimizer": "nesterov", "lr": 0.05},
    {"optimizer": "adam", "lr": 0.02, "decay": 0.1, "activation": "tanh"},
    {"optimizer": "adamw", "lr": 0.02, "decay": 0.1, "activation": "gelu"},
    {"optimizer": "sgd", "lr": 0.1, "decay": 0.2, "clip": 0.25},
]


@pytest.mark.parametrize("settings", RULES, ids=lambda rule: str(rule["optimizer"]))
def test_every_rule(given: Begin, train: Train, settings: dict[str, Any]) -> None:
    start = given("cross_entropy", settings.get("activation", "relu"))
    compare(start, train, "cross_entropy", 4, "--pipe 2 --microbatches 7", **settings)


@pytest.mark.parametrize(("ranks", "grid"), [(1, "--microbatches 1"), (4, "--pipe 2 --microbatches 7")])
def test_regression(given: Begin, train: Train, ranks: int, grid: str) -> None:
    compare(given("mse", "tanh"), train, "mse", ranks, grid, activation="tanh")


def test_library_sum(given: Begin, train: Train) -> None:
    compare(given("cross_entropy", "relu"), train, "cross_entropy", 4, "--pipe 2 --microbatches 7 --allreduce mpi")
