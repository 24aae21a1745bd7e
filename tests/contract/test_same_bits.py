"""Contract test 1: the layout never changes the answer, not by one bit of weights, optimizer state, loss or norm."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.conftest import Job, launch

pytestmark = pytest.mark.contract
Train = Callable[..., Job]
Alone = Callable[[str], Job]
TIMES = {"seconds", "samples_per_second"}
# Everything that could tell layouts apart: ragged micro-batches, dropout, clipping at every step, several epochs.
FIXED = (
    "--steps 45 --batch 100 --microbatches 24 --hidden 48,40 --dropout 0.1 --activation gelu --clip 0.3 --seed 5 "
    "--lr 0.01 --decay cosine --warmup-steps 5 --log-every 3 --eval-every 20 --eval-rows 50 --save-every 20 --quiet"
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """`alone(arguments)` is the run on one rank, started once for all tests."""

    def run(arguments: str) -> Job:
        path = tmp_path_factory.mktemp("alone") / "run"
        done = launch(1, "-m", "mpiml.train", "--out", str(path), *arguments.split())
        assert done.returncode == 0, done.stderr
        return Job(done.returncode, done.stdout, done.stderr, path)

    return functools.cache(run)


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def saved(job: Job) -> dict[str, Any]:
    """Everything in the newest checkpoint."""
    return load_file(max((job.run / "checkpoints").glob("step-*.safetensors")))


def assert_same(job: Job, expected: Job) -> None:
    """Same results to the last bit; the loss first, for it tells in which step they part."""
    assert job.code == 0, job.err
    assert without_times(job.metrics) == without_times(expected.metrics)
    for key in ("weights_sha256", "step", "loss", "accuracy", "test_loss"):
        assert job.result[key] == expected.result[key]
    mine, theirs = saved(job), saved(expected)
    assert list(mine) == list(theirs)
    assert [name for name in mine if mine[name].tobytes() != theirs[name].tobytes()] == []


def test_the_run_alone_is_worth_comparing(alone: Alone) -> None:
    """It learns, every step is clipped, all that is compared is there, and the seed matters."""
    job = alone(FIXED)
    steps = [line for line in job.metrics if "evaluation" not in line]
    assert (len(steps), len(job.metrics) - len(steps), job.result["step"]) == (15, 3, 45)
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    assert all(line["gradient_norm"] > 0.3 for line in steps)
    assert len(saved(job)) == 3 * 6
    assert alone(f"{FIXED} --seed 6").result["weights_sha256"] != job.result["weights_sha256"]


@pytest.mark.parametrize(
    ("ranks", "grid"),
    [
        (2, ""),
        (2, "--pipe 2 --schedule gpipe"),
        (3, ""),
        (4, "--pipe 2"),
        (4, "--pipe 4 --schedule gpipe"),
        (6, "--pipe 2 --cuts 1"),
        (8, ""),
        (8, "--pipe 4"),
        (16, ""),
        (16, "--pipe 4"),
    ],
)
def test_same_bits_on_every_grid(alone: Alone, train: Train, ranks: int, grid: str) -> None:
    assert_same(train(ranks, f"{FIXED} {grid}"), alone(FIXED))


@pytest.mark.parametrize(("ranks", "grid"), [(3, ""), (4, "--pipe 4"), (16, "--pipe 4 --schedule gpipe")])
def test_same_bits_in_double_precision(alone: Alone, train: Train, ranks: int, grid: str) -> None:
    """With another rule, whose norm is taken only at the steps that are logged."""
    arguments = f"{FIXED} --dtype float64 --optimizer nesterov --clip 0"
    assert_same(train(ranks, f"{arguments} {grid}"), alone(arguments))


@pytest.mark.parametrize(
    ("ranks", "grid", "nodes"),
    [
        (4, "", "2,2"),
        (6, "", "3,2,1"),
        (8, "", "4,4"),
        (8, "--pipe 2", "2,4,2"),
        (8, "--pipe 4", "5,3"),
        (5, "--memory private", "3,2"),
    ],
)
def test_same_bits_on_several_nodes(alone: Alone, train: Train, ranks: int, grid: str, nodes: str) -> None:
    assert_same(train(ranks, f"{FIXED} {grid}", MPIML_NODES=nodes), alone(FIXED))


@pytest.mark.parametrize(
    ("ranks", "grid", "nodes"),
    [
        (4, "", "2,2"),
        (5, "--memory private", "3,2"),
        (6, "--pipe 2", "3,3"),
        (8, "", "2,2,2,2"),
        (8, "--pipe 4 --schedule gpipe", "2,4,2"),
    ],
)
def test_same_bits_when_sums_start_early(alone: Alone, train: Train, ranks: int, grid: str, nodes: str) -> None:
    """Every matrix in a bucket of its own."""
    assert_same(train(ranks, f"{FIXED} {grid} --bucket 0.0005", MPIML_NODES=nodes), alone(FIXED))


@pytest.mark.parametrize("memory", ["shared", "private"])
def test_same_bits_in_either_memory(alone: Alone, train: Train, memory: str) -> None:
    assert_same(train(6, f"{FIXED} --pipe 2 --memory {memory}"), alone(FIXED))


def small_data(path: Path, rows: int) -> str:
    """A data set of so few rows that micro-batches stay empty."""
    random = np.random.default_rng(0)
    x, y = random.standard_normal((2 * rows, 6)), random.integers(0, 3, 2 * rows)
    np.savez(path, x_train=x[:rows], y_train=y[:rows], x_test=x[rows:], y_test=y[rows:])
    return f"--data {path} --hidden 8,8 --steps 40 --batch 7 --log-every 1 --save-every 40 --quiet"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_data(tmp_path_factory.mktemp("small") / "data.npz", 30)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows of tokens, of which later rows, and so later micro-batches, have ever more that do not count."""
    random = np.random.default_rng(0)
    rows = random.integers(0, 11, (90, 13), np.uint8)
    rows[:, 1::2] = rows[:, :-1:2] * 3 % 11  # every second one can be told
    x, y = rows[:, :-1], rows[:, 1:].astype(np.int16)
    y[np.arange(12) > 14 - np.arange(90)[:, None] % 60 // 5] = -1
    path = tmp_path_factory.mktemp("tokens") / "tokens.npz"
    np.savez(path, x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:])
    return f"--data {path} --model gpt --width 16 --heads 2 --dropout 0.1 --optimizer sgd --quiet"


IMAGES = "--model cnn --channels 6 --steps 8 --batch 60 --microbatches 6 --dropout 0.1 --clip 0.3 --log-every 1 --quiet"


@pytest.mark.parametrize(("ranks", "grid"), [(2, ""), (2, "--pipe 2"), (4, "--pipe 2")])
@pytest.mark.parametrize("model", ["cnn", "gpt"])
def test_same_bits_of_images_and_tokens(
    alone: Alone, train: Train, tokens: str, model: str, ranks: int, grid: str
) -> None:
    arguments = IMAGES if model == "cnn" else f"{tokens} --steps 8 --batch 25 --microbatches 6 --log-every 1"
    assert_same(train(ranks, f"{arguments} {grid}"), alone(arguments))


@pytest.fixture(scope="module")
def normal(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A network with batch normalisation, on so few images that some micro-batches stay empty, whose labels do not all
    count."""
    random, path = np.random.default_rng(0), tmp_path_factory.mktemp("normal") / "images.npz"
    x, y = random.standard_normal((90, 4, 5, 2)), random.integers(-1, 3, 90)
    np.savez(path, x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:])
    flags = "--model resnet --norm batch --channels 4 --blocks 1 --batch 9 --microbatches 13 --clip 0.3"
    return f"--data {path} --ignore -1 {flags} --steps 9 --log-every 1 --eval-every 4 --eval-rows 8 --quiet"


@pytest.mark.parametrize(
    ("ranks", "grid", "nodes"),
    [
        (3, "", ""),
        (4, "--pipe 2", ""),
        (3, "--pipe 3 --schedule gpipe --dtype float64", ""),
        (4, "--bucket 0.0005", "2,2"),
        (3, "--batch 1", ""),
        (4, "--pipe 2 --model cnn", "2,2"),
    ],
)
def test_same_bits_of_running_averages(
    alone: Alone, train: Train, normal: str, ranks: int, grid: str, nodes: str
) -> None:
    """--batch 1: most micro-batches are empty, and steps whose only row does not count change nothing."""
    arithmetic = " ".join(words for words in ("--dtype float64", "--batch 1", "--model cnn") if words in grid)
    job = train(ranks, f"{normal} {grid}", MPIML_NODES=nodes)
    assert_same(job, alone(f"{normal} {arithmetic}"))
    averages = [name for name in saved(job) if "running" in name]
    assert len(averages) == 2 * (2 if "cnn" in grid else 7)
    assert not any(name.startswith("optimizer.") for name in averages)


@pytest.mark.parametrize(("ranks", "grid"), [(1, ""), (4, ""), (4, "--pipe 2")])
def test_masked_tokens_weigh_nothing_wherever_they_are(
    alone: Alone, train: Train, tokens: str, ranks: int, grid: str
) -> None:
    """One step on all rows in parts of unequal weight is the step on all rows at once."""
    arguments = f"{tokens} --dropout 0 --dtype float64 --steps 1 --batch 60 --log-every 1"
    job, whole = train(ranks, f"{arguments} --microbatches 5 {grid}"), alone(f"{arguments} --microbatches 1")
    assert job.code == 0, job.err
    assert job.result["loss"] == pytest.approx(whole.result["loss"], rel=1e-13)
    for name, array in saved(whole).items():
        np.testing.assert_allclose(saved(job)[name], array, rtol=1e-10, atol=1e-13, err_msg=name)


OWN = """
import numpy as np
from mpiml.nn.layers import Linear, Tanh

def model(shape, outputs):
    return [Linear(*shape, 8), Tanh(), Linear(8, 1)]

def loss(y, labels):
    value, weight = labels[:, :1], labels[:, 1:]
    error = y - value
    return np.sum(weight * error**2, dtype=float), np.sum(weight, dtype=float), 2 * weight * error

class Error:
    name, columns = "error", 2

    def __init__(self, outputs):
        assert outputs == 2

    def sums(self, y, labels):
        return np.array([np.sum(labels[:, 1] * abs(y[:, 0] - labels[:, 0])), np.sum(labels[:, 1])])

    def value(self, totals):
        return totals[0] / totals[1]
"""


def test_ones_own_model_loss_and_metric_with_weighted_rows(train: Train, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((90, 5))
    y = np.stack([x[:, 0] * x[:, 1], np.linspace(0, 4, 90) ** 2], axis=1)  # value and weight
    np.savez(tmp_path / "data.npz", x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:])
    (tmp_path / "own.py").write_text(OWN)
    arguments = f"--data {tmp_path}/data.npz --model own:model --loss own:loss --metric own:Error --dtype float64 "
    arguments += "--steps 6 --batch 60 --optimizer sgd --log-every 1 --quiet --microbatches"
    runs = [("6", 1), ("6", 3), ("6 --pipe 2", 4), ("1", 1)]
    jobs = [
        train(ranks, f"{arguments} {rest}", out=f"{ranks}-{rest[0]}", PYTHONPATH=str(tmp_path)) for rest, ranks in runs
    ]
    assert [job.code for job in jobs] == [0] * 4, [job.err for job in jobs]
    assert len({job.result["weights_sha256"] for job in jobs[:3]}) == 1
    assert len({job.result["error"] for job in jobs[:3]}) == 1
    for name, array in saved(jobs[3]).items():  # all rows at once
        np.testing.assert_allclose(saved(jobs[0])[name], array, rtol=1e-9, atol=1e-12, err_msg=name)
    assert jobs[0].result["error"] == pytest.approx(jobs[3].result["error"], rel=1e-9)


@pytest.mark.parametrize("microbatches", [29, 30])
@pytest.mark.parametrize(("ranks", "grid"), [(3, ""), (4, "--pipe 2")])
def test_empty_micro_batches(alone: Alone, train: Train, small: str, ranks: int, grid: str, microbatches: int) -> None:
    """Seven rows a step for 29 or 30 micro-batches."""
    arguments = f"{small} --microbatches {microbatches}"
    assert_same(train(ranks, f"{arguments} {grid}"), alone(arguments))


def test_steps_without_rows_whose_sums_have_begun(alone: Alone, train: Train, small: str) -> None:
    """Of 30 steps of an epoch about half have no row in any of the four micro-batches."""
    arguments = f"{small} --batch 1 --microbatches 4"
    job = train(4, f"{arguments} --bucket 0.0001", MPIML_NODES="2,2")
    assert_same(job, alone(arguments))
    assert {0.0} < {line["loss"] for line in job.metrics if "loss" in line}


@pytest.mark.parametrize(
    ("ranks", "arguments", "message"),
    [
        (3, "--microbatches 31", "--microbatches 31: the data set has only 30 rows to share out"),
        (3, "--microbatches 2", "--microbatches 2: 3 replicas need at least one each"),
        (3, "--pipe 2", "3 ranks do not divide into pipelines of 2 stages; --pipe 1, 3 would work"),
        (2, "--pipe 2 --cuts 1,2", "--cuts 1,2: 2 given, but 1 needed for --pipe 2"),
    ],
)
def test_refused_layouts_are_refused_once(train: Train, small: str, ranks: int, arguments: str, message: str) -> None:
    job = train(ranks, f"{small} {arguments}")
    assert job.code == 78
    assert job.err.count(message) == 1
    assert job.err.count("mpiml.train:") == 1
    assert not job.run.exists()


@pytest.mark.parametrize(("ranks", "grid"), [(1, ""), (3, ""), (4, ""), (4, "--pipe 2")])
def test_library_sum_is_close(alone: Alone, train: Train, ranks: int, grid: str) -> None:
    arguments = f"{FIXED} --dtype float64 --optimizer nesterov --clip 0"
    job = train(ranks, f"{arguments} --allreduce mpi {grid}")
    assert job.code == 0, job.err
    expected = saved(alone(arguments))
    for name, array in saved(job).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-8, atol=1e-10, err_msg=name)
    assert job.result["loss"] == pytest.approx(alone(arguments).result["loss"], rel=1e-9)
