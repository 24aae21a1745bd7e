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

from tests.conftest import Job, launch_all
from tests.contract import reference

pytestmark = pytest.mark.contract
STEPS, ROWS, INPUTS = 6, 23, 5
FIXED = f"--batch {ROWS} --hidden 8,6,7 --dtype float64 --seed 3 --log-every 1 --eval-every 3 --quiet"


def arrays(loss: str) -> dict[str, NDArray[Any]]:
    """A small data set whose every step is the whole of it, so that the order of rows does not matter."""
    random = np.random.default_rng(7)
    x, noise = random.standard_normal((2 * ROWS, INPUTS)), random.standard_normal((2 * ROWS, 2))
    labels = (x[:, 0] > 0).astype(int) + (x[:, 1] > 0) if loss == "cross_entropy" else x[:, :2] * x[:, 2:4] + noise
    return {"x_train": x[:ROWS], "y_train": labels[:ROWS], "x_test": x[ROWS:], "y_test": labels[ROWS:]}


def checkpoint(job: Job, step: int) -> Path:
    return job.run / "checkpoints" / f"step-{step:09d}.safetensors"


def saved(job: Job, step: int) -> reference.Weights:
    """The linear layers in a checkpoint, in order."""
    assert job.code == 0, job.err
    found = load_file(checkpoint(job, step))
    layers = sorted({int(name.split(".")[1]) for name in found if name.startswith("layers.")})
    return [(found[f"layers.{layer}.weight"], found[f"layers.{layer}.bias"]) for layer in layers]


NORMAL = """
from mpiml.nn.layers import BatchNorm2d, Flatten, Linear

def model(shape, outputs):
    return [BatchNorm2d(2, momentum=0.25), Flatten(), Linear(12, outputs)]
"""


@pytest.mark.parametrize(("ranks", "grids"), [(3, [""]), (2, ["--allreduce mpi", "--pipe 2"])])
def test_running_averages_are_means_over_rows_whatever_their_weight(
    tmp_path: Path, ranks: int, grids: list[str]
) -> None:
    """Two steps on all rows, of which some do not count, in parts of 3 and 4 rows; and one more that begins there."""
    random = np.random.default_rng(7)
    x, y = random.standard_normal((2 * ROWS, 3, 2, 2)) * [1, 4] + [5, -3], random.integers(-1, 3, 2 * ROWS)
    np.savez(tmp_path / "data.npz", x_train=x[:ROWS], y_train=y[:ROWS], x_test=x[ROWS:], y_test=y[ROWS:])
    (tmp_path / "normal.py").write_text(NORMAL)
    flags = f"--data {tmp_path}/data.npz --model normal:model --batch {ROWS + 4} --dtype float64 --clip 0.1 --quiet "
    flags += "--ignore -1 --microbatches 6 --shuffle none --steps 2 --weight-decay 0.5"
    commands = []
    for grid in grids:
        run, more = tmp_path / f"run{grid}".replace(" ", ""), tmp_path / f"more{grid}".replace(" ", "")
        commands.append((run, f"{flags} {grid}"))
        commands.append((more, f"{flags} {grid} --steps 1 --init {run}/checkpoints/step-000000002.safetensors"))
    jobs = launch_all(ranks, commands, PYTHONPATH=str(tmp_path))
    assert [job.code for job in jobs] == [0] * len(jobs), [job.err for job in jobs]
    parts = np.split(x[:ROWS], [3, 7, 11, 15, 19])  # as ROWS * m // 6 cuts them
    variance = sum(len(part) * part.var(axis=(0, 1, 2), ddof=1) for part in parts) / ROWS
    mean, old = x[:ROWS].mean(axis=(0, 1, 2)), 0.75**2
    for job, begun in zip(jobs[::2], jobs[1::2], strict=True):
        arrays = load_file(job.run / "checkpoints" / "step-000000002.safetensors")
        np.testing.assert_allclose(arrays["layers.0.running_mean"], (1 - old) * mean, rtol=1e-12)
        np.testing.assert_allclose(arrays["layers.0.running_variance"], old + (1 - old) * variance, rtol=1e-12)
        assert not any(name.startswith("optimizer.") and "running" in name for name in arrays)
        arrays = load_file(begun.run / "checkpoints" / "step-000000001.safetensors")
        np.testing.assert_allclose(arrays["layers.0.running_mean"], (1 - 0.75**3) * mean, rtol=1e-12)


@dataclass(frozen=True)
class Case:
    """A run that the reference repeats; 0 ranks: without a launcher. By default plain descent, because Adam would hide
    a gradient that is off by a factor."""

    ranks: int
    grid: str
    loss: str = "cross_entropy"
    optimizer: str = "sgd"
    lr: float = 0.1
    decay: float = 0.0
    clip: float = 0.0
    activation: str = "relu"
    betas: tuple[float, float] = (0.9, 0.999)
    rates: tuple[float, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the reference."""
        names = ("loss", "optimizer", "lr", "decay", "clip", "activation", "betas", "rates")
        return {name: getattr(self, name) for name in names}

    @property
    def flags(self) -> str:
        """The same for the command."""
        rule = f"--optimizer {self.optimizer} --lr {self.lr} --weight-decay {self.decay} --clip {self.clip}"
        rule += f" --betas {self.betas[0]},{self.betas[1]}"
        rates = ",".join(f"layers.{2 * linear}={rate}" for linear, rate in enumerate(self.rates))
        rule += f" --rates {rates}" if rates else ""
        return f"{rule} --activation {self.activation} {self.grid} --steps {STEPS} --save-every {STEPS}"


# Micro-batches even, ragged (23 rows in 7 parts), and fewer than stages. With --cuts 2 a stage begins with a linear
# layer, which still needs what it received when it goes backward.
GRIDS = [
    Case(0, "--microbatches 1"),
    Case(0, "--microbatches 7"),
    Case(2, "--microbatches 4"),
    Case(3, "--microbatches 7"),
    Case(4, "--pipe 2 --microbatches 4"),
    Case(4, "--pipe 2 --cuts 2 --microbatches 7 --schedule gpipe"),
    Case(4, "--pipe 4 --microbatches 1"),
    Case(4, "--pipe 4 --microbatches 7"),
    Case(4, "--pipe 2 --microbatches 7 --allreduce mpi"),
]
SEVEN = "--pipe 2 --microbatches 7"
RULES = [
    Case(4, SEVEN, optimizer="momentum", lr=0.05, decay=0.03),
    Case(4, SEVEN, optimizer="nesterov", lr=0.05),
    Case(4, SEVEN, optimizer="lars", lr=1.0, decay=0.03, clip=0.25),
    Case(4, SEVEN, optimizer="lars", lr=1.0),
    Case(4, SEVEN, optimizer="lamb", lr=0.02, decay=0.1, rates=(0.5, 1, 10, 0)),
    Case(4, f"{SEVEN} --allreduce mpi", optimizer="lamb", lr=0.02, betas=(0.8, 0.95)),
    Case(4, SEVEN, optimizer="adam", lr=0.02, decay=0.1, activation="tanh", betas=(0.8, 0.95)),
    Case(4, SEVEN, optimizer="adamw", lr=0.02, decay=0.1, activation="gelu"),
    Case(4, SEVEN, decay=0.2, clip=0.25),
    Case(0, "--microbatches 1", "mse", activation="tanh"),
    Case(4, SEVEN, "mse", activation="tanh"),
    Case(4, SEVEN, decay=0.2, clip=0.25, rates=(0, 10, 0, 0.5)),
    Case(4, SEVEN, optimizer="adamw", lr=0.02, decay=0.1, rates=(0.5, 1, 10, 0)),
    Case(4, f"{SEVEN} --cuts 4 --allreduce mpi", optimizer="nesterov", lr=0.05, rates=(0, 0, 1, 0)),
]
CASES = [*GRIDS, *RULES]
STARTS = list(dict.fromkeys((case.loss, case.activation) for case in CASES))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[Any, Job]]:
    """`runs(ranks)` are all cases of so many ranks, trained in one job; with 0 ranks, also what each STARTS from: the
    weights after a step with a learning rate of zero."""
    path = tmp_path_factory.mktemp("gradients")
    for loss in reference.LOSSES:
        np.savez(path / f"{loss}.npz", **arrays(loss))

    def train(ranks: int) -> dict[Any, Job]:
        flags = {case: f"--data {path}/{case.loss}.npz {case.flags}" for case in CASES if case.ranks == ranks}
        for loss, activation in () if ranks else STARTS:
            start = f"--activation {activation} --steps 1 --optimizer sgd --lr 0 --save-every 1"
            flags[loss, activation] = f"--data {path}/{loss}.npz {start}"
        commands = [(path / f"{ranks}-{number}", f"{FIXED} {flags[key]}") for number, key in enumerate(flags)]
        return dict(zip(flags, launch_all(ranks, commands), strict=True))

    return functools.cache(train)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.ranks} {case.loss} {case.optimizer} {case.grid}")
def test_training_is_the_references(runs: Callable[[int], dict[Any, Job]], case: Case) -> None:
    job, data = runs(case.ranks)[case], arrays(case.loss)
    weights, start = saved(job, STEPS), saved(runs(0)[case.loss, case.activation], 1)
    expected, losses, norms = reference.train(start, data["x_train"], data["y_train"], STEPS, **case.settings)
    assert [w.shape for w, _ in weights] == [(INPUTS, 8), (8, 6), (6, 7), (7, 3 if case.loss == "cross_entropy" else 2)]
    for got, want in zip(weights, expected, strict=True):
        np.testing.assert_allclose(got[0], want[0], rtol=0, atol=1e-10)
        np.testing.assert_allclose(got[1], want[1], rtol=0, atol=1e-10)
    for rate, got, first in zip(case.rates, weights, start, strict=False):
        assert np.array_equal(got[0], first[0]) is np.array_equal(got[1], first[1]) is (rate == 0)
    states = [name for name in load_file(checkpoint(job, STEPS)) if name.startswith("optimizer.")]
    frozen = [f".layers.{2 * linear}." for linear, rate in enumerate(case.rates) if not rate]
    assert not any(layer in name for name in states for layer in frozen)
    lines = [line for line in job.metrics if "evaluation" not in line]
    np.testing.assert_allclose([line["loss"] for line in lines], losses, rtol=1e-10)
    np.testing.assert_allclose([line["gradient_norm"] for line in lines], norms, rtol=1e-10)
    value, _ = reference.loss_and_gradient(weights, data["x_test"], data["y_test"], case.activation, case.loss)
    assert job.result["test_loss"] == pytest.approx(value, rel=1e-10)
