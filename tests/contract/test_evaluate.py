"""A checkpoint is scored to the same bits on every grid, and as its run scored it; nothing of the run changes."""

from __future__ import annotations

import csv
import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.config import Config
from mpiml.config import parse as parse_settings
from mpiml.data.dataset import Dataset, open_dataset
from mpiml.errors import ConfigError, DataError, NotFiniteError, OutputError
from mpiml.evaluate import evaluate, parse, text
from mpiml.run import step_files
from mpiml.run.result import FIELDS
from mpiml.train import train as train_here
from tests.conftest import Job, launch

pytestmark = pytest.mark.contract

RAW = "--steps 30 --microbatches 4 --hidden 24,16 --normalize --dropout 0.1 --eval-every 10 --save-every 10"
RAW += " --eval-rows 50"  # 360 rows: the last chunk is ragged
RAW += " --rates layers.1=0"  # values that no replica updates
FLAGS = f"{RAW} --ema 0.9"
TWO_NODES = {"MPIML_NODES": "2,9"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Job:
    path = tmp_path_factory.mktemp("scored") / "run"
    done = launch(0, "-m", "mpiml.train", "--out", str(path), *FLAGS.split())
    assert done.returncode == 0, done.stderr
    return Job(done.returncode, done.stdout, done.stderr, path)


def scored(ranks: int, *arguments: object, **environment: str) -> Any:
    done = launch(ranks, "-m", "mpiml.evaluate", *map(str, arguments), "--json", **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def files(path: Path) -> dict[Path, tuple[bytes, int]]:
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.rglob("*") if file.is_file()}


def logged(run: Job, step: int) -> dict[str, Any]:
    (line,) = (line["evaluation"] for line in run.metrics if "evaluation" in line and line["step"] == step)
    return line


@pytest.mark.parametrize(("ranks", "grid"), [(0, ""), (4, "--pipe 2"), (3, "--pipe 3"), (9, "")])  # 8 chunks
def test_same_bits_on_every_grid_and_as_logged(run: Job, tmp_path: Path, ranks: int, grid: str) -> None:
    before = files(run.run)
    with open(run.run / ".lock") as lock:  # a job that still trains has it
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = scored(ranks, "--run", run.run, "--predictions", tmp_path / "p.npy", *grid.split(), **TWO_NODES)
    last = logged(run, 30)
    assert (found["step"], found["test_loss"], found["accuracy"]) == (30, last["loss"], last["accuracy"])
    assert found["rows"] == last["rows"] == 360
    assert files(run.run) == before
    classes, labels = np.load(tmp_path / "p.npy"), all_labels()
    assert classes.shape == labels.shape
    assert np.mean(classes == labels) == found["accuracy"]


def test_raw_weights_are_those_of_a_run_without_an_average(run: Job, tmp_path: Path, capfd: Any) -> None:
    raw = train_here(parse_settings([*RAW.split(), "--quiet", "--out", str(tmp_path / "raw")]))
    assert raw["weights_sha256"] == run.result["weights_sha256"]
    found = evaluate(str(run.run), raw_weights=True)
    assert found["test_loss"] == raw["test_loss"] != run.result["test_loss"]
    assert capfd.readouterr().err == ""
    evaluate(str(run.run))
    assert (
        capfd.readouterr().err == "the average of the weights is scored, as in the run (--ema 0.9; see --raw-weights)\n"
    )


def all_labels() -> np.ndarray:
    source = open_dataset("digits").test.y
    source.hold(np.arange(len(source)))
    return source.rows(np.arange(len(source)))


def test_metric_of_ones_own_cannot_take_the_place_of_a_field(run: Job) -> None:
    lines = [line.get("evaluation", {}) | line for line in run.metrics]
    found = {name for told in (*lines, run.result, scored(0, "--run", run.run)) for name in told}
    assert found - {"accuracy"} <= FIELDS


def test_checkpoint_by_name_and_a_line_to_read(run: Job) -> None:
    file = run.run / "checkpoints" / step_files.file_name(10)
    found, expected = scored(3, "--checkpoint", file), logged(run, 10)
    assert (found["step"], found["test_loss"], found["accuracy"]) == (10, expected["loss"], expected["accuracy"])
    done = launch(0, "-m", "mpiml.evaluate", "--run", str(run.run))
    line = f"{run.run}, step 30, 360 test rows of digits: loss {run.result['test_loss']:.4f}, "
    assert done.stdout == f"{line}accuracy {run.result['accuracy']:.4f}\n"


def test_language_model_counts_rows_and_predicts_each_token(train: Any, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("so it goes, and so it goes on. " * 40)
    flags = f"--data {tmp_path / 't.txt'} --context 10 --held-out 0.3 --model gpt --width 8 --heads 2 --blocks 1"
    job = train(0, f"{flags} --steps 2 --batch 16 --eval-rows 8")
    assert job.code == 0, job.err
    (line,) = (line["evaluation"] for line in job.metrics if "evaluation" in line)
    assert line["rows"] == 37
    found = scored(4, "--run", job.run, "--pipe", "2", "--predictions", tmp_path / "p.npy")
    assert found == scored(0, "--run", job.run, "--predictions", tmp_path / "q.npy")
    assert (found["rows"], found["test_loss"]) == (37, line["loss"])
    assert np.load(tmp_path / "p.npy").shape == (37, 10)
    assert (tmp_path / "p.npy").read_bytes() == (tmp_path / "q.npy").read_bytes()


def test_regression_as_a_table_and_on_other_data(train: Any, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x, y = random.random((60, 5)), random.random(60)
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x[:21], y_test=y[:21])
    np.savez(tmp_path / "other.npz", x_train=x, y_train=y, x_test=x[7:20], y_test=y[7:20])
    job = train(0, f"--data {tmp_path / 'd.npz'} --hidden 8 --steps 4 --eval-rows 4")
    file = tmp_path / "p.csv"
    found = scored(3, "--run", job.run, "--predictions", file)
    assert found["r2"] == job.result["r2"]
    with open(file) as lines:
        head, *rows = csv.reader(lines)
    assert (head, [int(row) for row, _ in rows]) == (["row", "prediction"], list(range(21)))
    values = np.array([float(value) for _, value in rows])
    assert np.mean((values - y[:21]) ** 2) == pytest.approx(found["test_loss"])
    other = scored(0, "--run", job.run, "--data", tmp_path / "other.npz")
    assert other["rows"] == 13
    assert other["test_loss"] == pytest.approx(np.mean((values[7:20] - y[7:20]) ** 2))


def test_other_data_are_read_as_one_says_or_as_the_run_did(train: Any, tmp_path: Path) -> None:
    for name, label in (("mine", "kind"), ("other", "class")):
        (tmp_path / name).mkdir()
        for which in ("train", "test"):
            (tmp_path / name / f"{which}.csv").write_text(f"{label},a,b\n" + "0,1.5,2\n1,2,0.5\n" * 4)
    job = train(0, f"--data {tmp_path / 'mine'} --label kind --hidden 4 --steps 2")
    own = scored(0, "--run", job.run, "--data", tmp_path / "mine")
    assert own["test_loss"] == job.result["test_loss"]
    assert scored(0, "--run", job.run, "--data", tmp_path / "other", "--label", "class") == own | {
        "data": str(tmp_path / "other")
    }
    with pytest.raises(ConfigError, match=r"other: the rows have no labels, .* in a table, --label NAME"):
        evaluate(str(job.run), data=str(tmp_path / "other"))


def test_other_tokens_and_another_part_of_a_text(train: Any, tmp_path: Path) -> None:
    tokens = np.arange(400) % 7
    for dtype in ("uint16", "uint32"):
        (tmp_path / f"{dtype}.bin").write_bytes(tokens.astype(dtype).tobytes())
    flags = "--context 4 --held-out 0.5 --model gpt --width 8 --heads 2 --blocks 1 --steps 2 --batch 16"
    job = train(0, f"--data {tmp_path / 'uint16.bin'} {flags}")
    whole = scored(0, "--run", job.run, "--data", tmp_path / "uint32.bin", "--token-dtype", "uint32")
    assert whole["test_loss"] == job.result["test_loss"]
    part = evaluate(str(job.run), data=str(tmp_path / "uint16.bin"), held_out=0.1)
    assert 4 * part["rows"] < whole["rows"]


def test_rows_without_labels_are_predicted_on_every_grid(run: Job, tmp_path: Path) -> None:
    """As those of the run were that have labels."""
    test = open_dataset("digits").test
    test.x.hold(np.arange(360))
    np.save(tmp_path / "new.npy", test.x.rows(np.arange(360)))
    new = scored(4, "--run", run.run, "--data", tmp_path / "new.npy", "--predictions", tmp_path / "p.npy", "--pipe", 2)
    assert new == {"run": str(run.run), "step": 30, "data": str(tmp_path / "new.npy"), "rows": 360}
    assert text(new) == f"{run.run}, step 30: predicted 360 rows of {tmp_path / 'new.npy'}"
    evaluate(str(run.run), predictions=str(tmp_path / "q.npy"))
    assert (tmp_path / "p.npy").read_bytes() == (tmp_path / "q.npy").read_bytes()


def test_rows_to_test_on_are_enough(run: Job, tmp_path: Path) -> None:
    x, y, out = np.ones((20, 8, 8)), np.arange(20) % 10, str(tmp_path / "p.csv")
    np.savez(tmp_path / "images.npz", images=x, labels=y, x_train=x[:3])
    images = str(tmp_path / "images.npz")
    named = evaluate(str(run.run), data=images, arrays="x_test=images,y_test=labels")
    assert named["test_loss"] == evaluate(str(run.run), data={"x": x, "y": y})["test_loss"]
    rows = evaluate(str(run.run), data=list(zip(x, y, strict=True)))
    assert (rows["test_loss"], rows["rows"]) == (named["test_loss"], 20)
    for unlabelled in (x, {"x_test": x}, list(x)):
        assert "test_loss" not in evaluate(str(run.run), data=unlabelled, predictions=out)
        with pytest.raises(ConfigError, match="have no labels, so that there is nothing to score; write predictions"):
            evaluate(str(run.run), data=unlabelled)
    with pytest.raises(DataError, match="has no array x_test or x; it holds images, labels, x_train; --arrays"):
        evaluate(str(run.run), data=images)
    with pytest.raises(DataError, match=r"rows of x_test are \(8,\), but the run's \(8, 8\)"):
        evaluate(str(run.run), data=x[0], predictions=out)
    with pytest.raises(DataError, match=r"data: must be a Dataset, .* but is int"):
        evaluate(str(run.run), data=5)


def test_values_are_predicted_without_labels_and_without_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["from mpiml.api import mean_squared_error", "def loss(y, labels):", "    assert labels.any()"]
    (tmp_path / "needs_labels.py").write_text("\n".join([*lines, "    return mean_squared_error(y, labels)"]) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    x = np.random.default_rng(0).random((40, 5))
    config = Config(steps=3, hidden=(4,), loss="needs_labels:loss", quiet=True, out=str(tmp_path / "run"))
    train_here(config, data=Dataset.from_arrays(x, x[:, :3] + 1))
    found = evaluate(str(tmp_path / "run"), data=x, predictions=str(tmp_path / "p.npy"))
    assert (found["rows"], np.load(tmp_path / "p.npy").shape) == (40, (40, 3))


def test_rows_without_labels_are_predicted_where_zero_means_no_label(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((40, 5))
    config = Config(steps=1, hidden=(4,), ignore=0, quiet=True, out=str(tmp_path / "run"))
    train_here(config, data=Dataset.from_arrays(x, np.arange(40) % 3))
    assert evaluate(str(tmp_path / "run"), data=x, predictions=str(tmp_path / "p.npy"))["rows"] == 40


def test_rows_that_were_held_out_are_scored_again(train: Any, tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((60, 5))
    np.savez_compressed(tmp_path / "d.npz", X=x, Y=x[:, 0], W=np.linspace(0, 1, 60))
    flags = f"--data {tmp_path / 'd.npz'} --hidden 8 --steps 4 --seed 3 --held-out"
    job = train(0, f"{flags} 0.25")
    assert "no test rows: 15 of 60 rows, chosen by --seed, are held out (see --held-out)" in job.out
    own = evaluate(str(job.run))
    assert (own["rows"], own["test_loss"]) == (15, job.result["test_loss"])
    assert evaluate(str(job.run), data=str(tmp_path / "d.npz"))["rows"] == 60
    assert evaluate(str(job.run), data=str(tmp_path / "d.npz"), held_out=0.5)["rows"] == 30
    untested = train(0, f"{flags} 0 --eval-every 0", out="untested")
    assert untested.result.keys() & {"test_loss", "r2"} == set()
    assert not [line for line in untested.metrics if "evaluation" in line]
    with pytest.raises(DataError, match="there are no test rows; name others with --data, or hold some out"):
        evaluate(str(untested.run))


def test_rows_to_validate_on_are_scored_on_request_and_test_rows_otherwise(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((60, 5))
    np.savez(tmp_path / "d.npz", x_train=x[:40], y_train=x[:40, 0], x_test=np.full((20, 5), np.nan), y_test=x[40:, 0])
    np.savez(tmp_path / "alone.npz", x_train=x[:40], y_train=x[:40, 0])
    settings: dict[str, Any] = {"hidden": (8,), "steps": 4, "quiet": True, "eval_rows": 3, "held_out": 0.0}
    run, alone = str(tmp_path / "run"), str(tmp_path / "alone")
    result = train_here(Config(data=str(tmp_path / "d.npz"), out=run, validation=0.25, **settings))  # test rows are bad
    assert "test_loss" not in result
    scored = evaluate(run, validation=True)
    assert (scored["rows"], scored["validation_loss"], scored["r2"]) == (10, result["validation_loss"], result["r2"])
    assert "10 validation rows of" in text(scored)
    with pytest.raises(DataError, match="x_test: 20 rows hold values that are not finite"):
        evaluate(run)
    (tmp_path / "d.npz").rename(tmp_path / "e.npz")
    assert evaluate(run, data=str(tmp_path / "e.npz"), validation=True) == scored | {"data": str(tmp_path / "e.npz")}
    with pytest.raises(DataError, match="alone has changed since the run"):
        evaluate(run, data=str(tmp_path / "alone.npz"), validation=True)
    same = train_here(Config(data=str(tmp_path / "alone.npz"), out=alone, validation=0.25, **settings))
    assert same["weights_sha256"] == result["weights_sha256"]
    assert evaluate(alone, validation=True)["validation_loss"] == result["validation_loss"]
    with pytest.raises(DataError, match=r"there are no test rows; name others .* are scored with --validation"):
        evaluate(alone)
    with pytest.raises(ConfigError, match=r"--validation --held-out 0\.1: these rows are chosen as in the run"):
        evaluate(alone, validation=True, held_out=0.1)
    train_here(Config(data=str(tmp_path / "alone.npz"), out=str(tmp_path / "without"), eval_every=0, **settings))
    with pytest.raises(ConfigError, match="--validation: the run was trained without"):
        evaluate(str(tmp_path / "without"), validation=True)
    with pytest.raises(ConfigError, match=r"--validation 0\.5: the run in .* has 0.25, and another"):
        train_here(Config(out=alone, resume=True, validation=0.5, steps=9))


def arrays(x: Any, y: Any) -> Dataset:
    return Dataset.from_arrays(x, y, x, y)


def test_data_that_do_not_fit(run: Job) -> None:
    x, y = np.ones((20, 8, 8)), np.arange(20) % 10
    assert evaluate(str(run.run), data=arrays(x, y))["rows"] == 20
    assert evaluate(str(run.run), data=arrays(x[:3], y[:3]))["rows"] == 3  # of fewer classes
    with pytest.raises(DataError, match=r"rows of x_test are \(8, 7\), but the run's \(8, 8\)"):
        evaluate(str(run.run), data=arrays(x[:, :, :7], y))
    with pytest.raises(DataError, match="labels are values, but the run's classes"):
        evaluate(str(run.run), data=arrays(x, y * 0.5))
    with pytest.raises(DataError, match="label 19 is not one of the 10 classes 0 to 9, in row 9"):
        evaluate(str(run.run), data=arrays(x, y + 10))
    with pytest.raises(NotFiniteError, match=r"test loss is not finite after step 30 \(chunk 0\)"):
        evaluate(str(run.run), data=arrays(x * 1e300, y))


def test_run_that_cannot_be_scored(run: Job, tmp_path: Path) -> None:
    here = tmp_path / "run"
    (tmp_path / "p.npy").mkdir()
    for problem, arguments in (
        ("there is no such directory", {"run": str(here / "none")}),
        ("holds no run", {"run": str(tmp_path)}),
        ("1 ranks do not divide into pipelines of 2 stages", {"run": str(run.run), "pipe": 2}),
        ("--pipe 0: must be at least 1", {"run": str(run.run), "pipe": 0}),
        ("must end in .npy or .csv", {"run": str(run.run), "predictions": "p.txt"}),
        ("p.npy: is a directory", {"run": str(run.run), "predictions": str(tmp_path / "p.npy")}),
        ("must end in .npy or .csv", {"run": str(run.run), "predictions": ""}),
        (f"--checkpoint {run.run}: is a directory", {"checkpoint": str(run.run)}),
        ("--checkpoint : is a directory", {"checkpoint": ""}),
        ("--token-dtype int: choose from uint16, uint32", {"run": str(run.run), "token_dtype": "int"}),
        ("there is no directory", {"run": str(run.run), "predictions": str(here / "p.npy")}),
    ):
        with pytest.raises(ConfigError, match=problem):
            evaluate(**arguments)
    with pytest.raises(OutputError, match="No such file"):
        evaluate(checkpoint=str(here / "none"))
    (here / "checkpoints").mkdir(parents=True)
    with pytest.raises(OutputError, match="has no checkpoint yet"):
        evaluate(str(here))


def test_damaged_newest_checkpoint_is_skipped(run: Job, tmp_path: Path, capfd: Any) -> None:
    shutil.copytree(run.run, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / step_files.file_name(30)
    newest.write_bytes(newest.read_bytes()[:-1])
    assert evaluate(str(tmp_path / "run"))["step"] == 20
    assert "step-000000030.safetensors is damaged" in capfd.readouterr().err


def test_own_data_that_have_changed(train: Any, tmp_path: Path) -> None:
    def write(shift: int) -> str:
        x, y = np.eye(12) + shift, np.arange(12) % 3
        np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y)
        return str(tmp_path / "d.npz")

    spec = write(0)
    job = train(0, f"--data {spec} --hidden 4 --steps 2")
    write(1)
    with pytest.raises(
        DataError, match=r"d.npz has .* but .* in the run; to score it all the same, name it with --data"
    ):
        evaluate(str(job.run))
    assert evaluate(str(job.run), data=spec)["rows"] == 12


def test_errors_of_the_command_are_one_line(run: Job, tmp_path: Path) -> None:
    done = launch(0, "-m", "mpiml.evaluate")
    assert (done.returncode, done.stderr.count("\n")) == (78, 1), done.stderr
    for flag in ("--checkpoint", "--run", "--predictions", "--data"):
        with pytest.raises(ConfigError, match=f"^{flag}: must not be empty$"):
            parse([*([] if flag in ("--run", "--checkpoint") else ["--run", "r"]), flag, ""])
    for code, arguments in (
        (78, ["--run", str(tmp_path), "--pipe", "2"]),
        (74, ["--run", str(run.run), "--raw-weights", "--predictions", "/proc/p.npy"]),
    ):
        done = launch(3, "-m", "mpiml.evaluate", *arguments)
        assert done.returncode == code, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
