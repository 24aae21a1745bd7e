"""Labels of any kind: those that mean no label, masks, values, labels of 0 and 1, and rows that have weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.errors import ConfigError, DataError
from mpiml.evaluate import evaluate
from mpiml.nn.layers import Conv2d, Layer
from mpiml.run import checkpoint, step_files
from mpiml.train import train
from tests.forging import save_changed

pytestmark = pytest.mark.contract
Arrays = dict[str, np.ndarray]


def arrays(several: bool) -> Arrays:
    """Rows with a class of three, or with one for each of four tokens; some have none, which is -1."""
    random = np.random.default_rng(0)
    x = random.integers(0, 3, (120, 4)) if several else random.standard_normal((120, 4)).astype(np.float32)
    y = x % 3 if several else np.add(x[:, 0] > 0, x[:, 1] > 0, dtype=int)
    y = np.where(random.random(y.shape) < 0.2, -1, y)
    return {"x_train": x[:80], "y_train": y[:80], "x_test": x[80:], "y_test": y[80:]}


def instead(made: Arrays, label: int, dtype: str) -> Arrays:
    """The same with another number for those that have no label."""
    return {name: np.where(of == -1, label, of).astype(dtype) if name[0] == "y" else of for name, of in made.items()}


def trained(out: Path, made: Arrays, **settings: Any) -> Any:
    several = made["y_train"].ndim > 1 and made["x_train"].dtype.kind == "i"
    model = {"model": "gpt", "width": 8, "heads": 2, "blocks": 1} if several else {"hidden": (8,)}
    fixed = {"out": str(out), "steps": 5, "batch": 20, "log_every": 1, "quiet": True}
    return train(Config(**fixed | model | settings), data=Dataset.from_arrays(**made))


def test_minus_one_is_refused_in_one_label_a_row_unless_it_is_said_to_be_none(tmp_path: Path) -> None:
    """Whether -1 is a class or no label only its owner knows: where +1 is the other class, it is a class."""
    made = arrays(several=False)
    hint = "number the classes from 0; .* train with --loss mse; if it means no label, train with --ignore -1"
    signs = made | {"y_train": np.where(made["y_train"] > 0, 1, -1), "y_test": np.ones(40, int)}
    for wrong in (made, signs, made | {"y_train": np.arange(80) % 3}):
        where = "y_test" if wrong["y_train"].min() == 0 else "y_train"
        with pytest.raises(DataError, match=f"^{where}: label -1 is below 0: {hint}, in row [0-9]+$"):
            trained(tmp_path / "run", wrong)
    with pytest.raises(DataError, match="label -1 is below 0"):
        trained(tmp_path / "run", made, ignore=255)
    assert not (tmp_path / "run").exists()


def test_minus_one_is_refused_in_rows_to_score(tmp_path: Path) -> None:
    made = arrays(several=False)
    trained(tmp_path / "run", made | {"y_train": np.arange(80) % 2, "y_test": np.arange(40) % 2})
    new = {"x_test": made["x_test"], "y_test": np.full(40, -1)}
    with pytest.raises(DataError, match="label -1 is below 0: if it means no label, leave the labels out, and --pred"):
        evaluate(tmp_path / "run", data=new)


@pytest.mark.parametrize(
    ("several", "dtype", "label"), [(True, "uint8", 255), (True, "int32", -100), (False, "int8", 7)]
)
def test_any_number_may_mean_no_label(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], several: bool, dtype: str, label: int
) -> None:
    made = arrays(several)
    expected = trained(tmp_path / "a", made, **{} if several else {"ignore": -1})
    other = instead(made, label, dtype)
    result = trained(tmp_path / "b", other, ignore=label, quiet=False)
    for key in ("weights_sha256", "accuracy", "test_loss", "loss"):
        assert result[key] == expected[key]
    said = capsys.readouterr().out
    for name in ("y_train", "y_test"):
        assert f"{name}: {np.sum(made[name] == -1)} labels are {label} and do not count" in said
    scored = evaluate(str(tmp_path / "b"), data=Dataset.from_arrays(**other))
    assert (scored["accuracy"], scored["test_loss"]) == (expected["accuracy"], expected["test_loss"])
    saved = checkpoint.newest(tmp_path / "b" / "checkpoints")[0]
    assert saved is not None
    assert (json.loads(saved.task)["outputs"], json.loads(saved.task)["ignore"]) == (3, label)


def test_a_transform_gives_classes_or_what_is_said_to_be_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "signs.py").write_text("def drop(x, y, rng):\n    return x, y - 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    made = {name: np.maximum(of, 0) if name[0] == "y" else of for name, of in arrays(several=False).items()}
    with pytest.raises(DataError, match="--transform signs:drop gave a label of -1, but classes are numbered from 0"):
        trained(tmp_path / "a", made, transform="signs:drop")
    assert trained(tmp_path / "b", made, transform="signs:drop", ignore=-1)["status"] == "done"


def test_a_run_that_says_nothing_of_it_has_ignored_minus_one(tmp_path: Path) -> None:
    """As all did before there was a word for it: scored and gone on with as it was trained."""
    made = arrays(several=False)
    long = trained(tmp_path / "long", made, ignore=-1)
    expected = trained(tmp_path / "run", made, ignore=-1, steps=3)
    forget(tmp_path / "run")
    scored = evaluate(str(tmp_path / "run"), data=Dataset.from_arrays(**made))
    assert (scored["accuracy"], scored["test_loss"]) == (expected["accuracy"], expected["test_loss"])
    asked = {"out": str(tmp_path / "run"), "resume": True, "steps": 5, "quiet": True}
    with pytest.raises(DataError, match="train with --ignore -1"):
        train(Config(**asked), data=Dataset.from_arrays(**made))
    gone_on = train(Config(**asked, ignore=-1), data=Dataset.from_arrays(**made))
    assert gone_on["weights_sha256"] == long["weights_sha256"]


def forget(run: Path) -> None:
    """Make a run one that says nothing of labels to be ignored."""
    line = re.compile("^ignore = .*\n", re.MULTILINE)
    (run / "config.toml").write_text(line.sub("", (run / "config.toml").read_text()))
    saved = checkpoint.newest(run / "checkpoints")[0]
    assert saved is not None
    saved.config = line.sub("", saved.config)
    saved.task = json.dumps({key: value for key, value in json.loads(saved.task).items() if key != "ignore"})
    (run / "checkpoints" / step_files.file_name(saved.step)).unlink()
    save_changed(run / "checkpoints", saved)


def predicted(run: Path, made: Arrays, **asked: Any) -> np.ndarray:
    """What the run's model makes of the test rows."""
    evaluate(str(run), data=Dataset.from_arrays(**made), predictions=str(run / "p.npy"), **asked)
    array: np.ndarray = np.load(run / "p.npy")
    return array


def split(x: np.ndarray, y: np.ndarray, **weights: np.ndarray) -> Arrays:
    return {"x_train": x[:80], "y_train": y[:80], "x_test": x[80:], "y_test": y[80:], **weights}


X = np.random.default_rng(1).standard_normal((120, 4, 5, 2)).astype(np.float32)
ROWS = X.reshape(120, 40)


def convolution(shape: tuple[int, ...], outputs: int) -> list[Layer]:
    return [Conv2d(shape[-1], outputs, 1)]


@pytest.mark.parametrize("labels", [(4, 5), (4, 5, 1)])
def test_masks_are_predicted_in_their_shape(tmp_path: Path, labels: tuple[int, ...]) -> None:
    made = split(X, (X[..., 0] > 0).astype(np.uint8).reshape(120, *labels))
    result = train(
        Config(out=str(tmp_path), steps=60, batch=40, lr=0.1, quiet=True),
        model=convolution,
        data=Dataset.from_arrays(**made),
    )
    masks = predicted(tmp_path, made, model=convolution)
    assert masks.shape == (40, *labels)
    assert masks.dtype == np.int64
    assert np.mean(masks == made["y_test"]) == result["accuracy"] > 0.95
    probabilities = predicted(tmp_path, made, model=convolution, probabilities=True)
    assert probabilities.shape == (40, *labels, 2)
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(probabilities.argmax(axis=-1), masks)


def test_fields_are_predicted_in_their_shape_and_scored_together(tmp_path: Path) -> None:
    made = split(X, X * np.float32(2) + np.arange(2, dtype=np.float32))
    result = train(
        Config(out=str(tmp_path), steps=200, batch=40, lr=0.1, quiet=True),
        model=[Conv2d(2, 2, 1)],
        data=Dataset.from_arrays(**made),
    )
    fields, truth = predicted(tmp_path, made, model=[Conv2d(2, 2, 1)]), made["y_test"]
    assert fields.shape == truth.shape
    expected = 1 - np.sum((fields - truth) ** 2) / np.sum((truth - truth.mean()) ** 2)
    assert result["r2"] == pytest.approx(expected, rel=1e-4)
    assert result["r2"] > 0.9
    with pytest.raises(ConfigError, match="--probabilities: the run is a regression, which has none"):
        evaluate(str(tmp_path), predictions=str(tmp_path / "q.npy"), probabilities=True)
    with pytest.raises(ConfigError, match="--probabilities: say to which file, with --predictions FILE"):
        evaluate(str(tmp_path), probabilities=True)


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", "bool"])
def test_labels_of_0_and_1_of_any_type_are_the_same(tmp_path: Path, dtype: str) -> None:
    made = split(ROWS, (ROWS[:, :3] > 0).astype(dtype))
    result = trained(tmp_path / "a", made, loss="bce", steps=40)
    same = trained(tmp_path / "b", split(ROWS, (ROWS[:, :3] > 0).astype(float)), metric="exact_match", steps=40)
    assert (result["weights_sha256"], result["test_loss"]) == (same["weights_sha256"], same["test_loss"])
    labels, likely = predicted(tmp_path / "a", made), predicted(tmp_path / "a", made, probabilities=True)
    assert (labels.shape, labels.dtype, likely.shape) == ((40, 3), np.int64, (40, 3))
    np.testing.assert_array_equal(labels, likely >= 0.5)
    right = labels == made["y_test"]
    assert (result["accuracy"], same["exact_match"]) == (np.mean(right), np.mean(right.all(axis=1)))
    scored = evaluate(str(tmp_path / "a"), data=Dataset.from_arrays(**made), loss="tests.usercode:absolute")
    assert scored["accuracy"] == result["accuracy"]  # whatever the loss, the run's labels are no classes


def test_numbers_0_and_1_taken_for_values_are_told_of_bce(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for directory, y, loss, told in (
        ("a", (ROWS[:, :2] > 0) * 1.0, "auto", True),
        ("b", (ROWS[:, :2] > 0) * 1.0, "bce", False),
        ("c", ROWS[:, :2], "auto", False),
        ("d", (ROWS[:, :2] > 0) * 1, "mse", False),
    ):
        trained(tmp_path / directory, split(ROWS, y), loss=loss, quiet=False)
        line = "y_train: all labels are 0 or 1, but are taken for values; see --loss bce"
        assert (line in capsys.readouterr().out) is told


def test_one_logit_tells_two_classes(tmp_path: Path) -> None:
    made = split(ROWS[:, :4], (ROWS[:, 0] > 0).astype(int))
    result = trained(tmp_path / "a", made, loss="bce", steps=80, lr=0.02)
    labels = predicted(tmp_path / "a", made)
    assert labels.shape == (40,)
    assert np.mean(labels == made["y_test"]) == result["accuracy"] > 0.7
    with pytest.raises(DataError, match=r"^y_train: label 2 is not from 0 to 1, in row [0-9]+$"):
        trained(tmp_path / "b", split(ROWS, 2 * (ROWS[:, 0] > 0)), loss="bce")


def test_integers_are_values_where_the_loss_says_so(tmp_path: Path) -> None:
    y = np.round(3 * ROWS[:, :2]).astype(int)
    made = split(ROWS, y)
    result = trained(tmp_path / "a", made, loss="mse")
    assert result["r2"] == trained(tmp_path / "b", split(ROWS, y.astype(float)))["r2"]
    assert predicted(tmp_path / "a", made).dtype == np.float32
    assert evaluate(str(tmp_path / "b"), data=Dataset.from_arrays(**made))["r2"] == result["r2"]


def test_a_weight_of_0_leaves_a_row_out_and_one_of_2_counts_it_twice(tmp_path: Path) -> None:
    y, times = ROWS[:, :2] * 2, np.arange(80) % 3
    made = {"x_test": ROWS[80:], "y_test": y[80:]}
    weighted = made | {"x_train": ROWS[:80], "y_train": y[:80], "w_train": times.astype(float)[:, None]}
    repeated = made | {"x_train": np.repeat(ROWS[:80], times, axis=0), "y_train": np.repeat(y[:80], times, axis=0)}
    whole = {"batch": 80, "steps": 1, "dtype": "float64"}
    result, same = trained(tmp_path / "a", weighted, **whole), trained(tmp_path / "b", repeated, **whole)
    assert result["loss"] == pytest.approx(same["loss"], rel=1e-12)
    assert result["test_loss"] == pytest.approx(same["test_loss"], rel=1e-9)
    heavy = weighted | {"w_test": np.where(np.arange(40) < 10, 1, 0)}
    scored = evaluate(str(tmp_path / "a"), data=Dataset.from_arrays(**heavy))["test_loss"]
    errors = np.mean((predicted(tmp_path / "a", weighted) - y[80:]) ** 2, axis=1)
    assert scored == pytest.approx(np.mean(errors[:10]), rel=1e-6)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (np.full(80, -1), "w_train: weight -1 is not a finite number of at least 0, in row 0"),
        (np.zeros(80), "w_train: all weights are 0, so that no row counts, from row 0"),
    ],
)
def test_weights_that_cannot_be(tmp_path: Path, weights: np.ndarray, words: str) -> None:
    with pytest.raises(DataError, match=f"^{words}$"):
        trained(tmp_path / "a", split(ROWS, ROWS[:, :2], w_train=weights))
    assert not (tmp_path / "a").exists()


def test_signs_and_255_in_masks_are_asked_about(tmp_path: Path) -> None:
    signs, void = np.sign(ROWS[:, :3]).astype(int), np.where(ROWS[:, :3] > 0, 255, 1).astype(np.uint8)
    for y, words in ((signs, "all labels are -1 or 1: if both are classes"), (void, "train with --ignore 255")):
        with pytest.raises(DataError, match=words):
            trained(tmp_path / "a", split(ROWS, y))


def test_a_test_loss_of_rows_that_weigh_nothing_is_no_number(tmp_path: Path) -> None:
    made = split(ROWS, ROWS[:, 0])
    result = trained(tmp_path / "a", made, loss="tests.usercode:weightless", eval_every=2)
    assert (result["test_loss"], result["loss"], result["status"]) == (None, 0, "done")


def test_what_is_no_data_set() -> None:
    with pytest.raises(DataError, match=r"^data: must be a Dataset, .* but is int$"):
        train(Config(quiet=True), data=3)
