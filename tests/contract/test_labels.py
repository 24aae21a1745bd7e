"""Labels that mean no label: refused where nobody has said so, and else the same whatever number stands for them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.errors import DataError
from mpiml.evaluate import evaluate
from mpiml.run import checkpoint
from mpiml.train import train

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
    several = made["y_train"].ndim > 1
    model = {"model": "gpt", "width": 8, "heads": 2, "blocks": 1} if several else {"hidden": (8,)}
    fixed = {"out": str(out), "steps": 5, "batch": 20, "log_every": 1, "quiet": True}
    return train(Config(**fixed | model | settings), data=Dataset.from_arrays(**made))


def test_minus_one_is_refused_in_one_label_a_row_unless_it_is_said_to_be_none(tmp_path: Path) -> None:
    """Whether -1 is a class or no label only its owner knows: where +1 is the other class, it is a class."""
    made = arrays(several=False)
    hint = r"number the classes from 0, or if it means no label, train with --ignore -1"
    signs = made | {"y_train": np.where(made["y_train"] > 0, 1, -1), "y_test": np.ones(40, int)}
    for wrong in (made, signs, made | {"y_train": np.arange(80) % 3}):
        where = "y_test" if wrong["y_train"].min() == 0 else "y_train"
        with pytest.raises(DataError, match=f"^{where}: label -1 is below 0: {hint}, in row [0-9]+$"):
            trained(tmp_path / "run", wrong)
    with pytest.raises(DataError, match="label -1 is below 0"):
        trained(tmp_path / "run", made, ignore=255)
    assert not (tmp_path / "run").exists()


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
    (run / "checkpoints" / checkpoint.file_name(saved.step)).unlink()
    checkpoint.save(run / "checkpoints", saved, 1)
