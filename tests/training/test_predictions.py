"""What a model makes of tables: words that are its labels, in other files with other columns, and gaps."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.config import Config
from mpiml.errors import ConfigError, DataError
from mpiml.evaluate import evaluate
from mpiml.run import checkpoint
from mpiml.train import train
from tests.forging import save_changed

NAMES = ("rose", "ti, n", 'say "a"')


def write(path: Path, columns: dict[str, list[Any]]) -> None:
    with open(path, "w", newline="") as file:
        out = csv.writer(file, delimiter=";")
        out.writerow(columns)
        out.writerows(zip(*columns.values(), strict=True))


def flowers(rows: int, seed: int) -> dict[str, list[Any]]:
    random = np.random.default_rng(seed)
    kinds = random.integers(3, size=rows)
    long, wide = (100 + 3 * kinds + random.normal(size=rows)).tolist(), random.normal(size=rows).tolist()
    gaps = ["" if row % 5 == 2 else value for row, value in enumerate(wide)]
    return {"id": [f"f{row}" for row in range(rows)], "long": long, "wide": gaps, "kind": [NAMES[k] for k in kinds]}


def job(**settings: Any) -> dict[str, Any]:
    given = {"label": "kind", "hidden": (8,), "batch": 20, "microbatches": 2, "normalize": True, "fill": "mean"}
    return train(Config(**given | {"drop_columns": ("id",), "lr": 0.05} | settings), MPI.COMM_SELF)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with tables in it, and the run that was trained on them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    write(tmp_path / "d/train.csv", flowers(80, 0))
    write(tmp_path / "d/test.csv", flowers(30, 1))
    return tmp_path / "run"


def scored(run: Path, **more: Any) -> dict[str, Any]:
    return evaluate(str(run), comm=MPI.COMM_SELF, **more)


def test_words_come_back_and_other_tables_are_matched_by_name(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = job(data="d", out="run", epochs=30)
    assert 'labels are words: 3 classes, rose = 0, say "a" = 1, ti, n = 2' in capsys.readouterr().out
    assert result["accuracy"] > 0.8
    assert scored(run, predictions="p.csv")["accuracy"] == result["accuracy"]
    scored(run, predictions="p.npy")
    predicted, labels = np.load("p.npy"), np.array(flowers(30, 1)["kind"])
    assert np.mean(predicted == labels) == result["accuracy"]
    with open("p.csv", newline="") as file:
        assert [row["prediction"] for row in csv.DictReader(file)] == predicted.tolist()
    scored(run, predictions="p.csv", probabilities=True)
    with open("p.csv", newline="") as file:
        table = [{word: float(value) for word, value in list(row.items())[1:]} for row in csv.DictReader(file)]
    assert [max(row, key=lambda word: row[word]) for row in table] == predicted.tolist()
    inputs = [[float(flowers(30, 1)[name][row] or "nan") for name in ("long", "wide")] for row in range(30)]
    np.save("new.npy", inputs)  # no table, whose columns could be dropped
    scored(run, data="new.npy", predictions="q.npy")
    assert np.load("q.npy").tolist() == predicted.tolist()

    columns = flowers(30, 1)
    other = {name: columns[name] for name in ("kind", "wide", "long")} | {"more": ["x"] * 30}
    Path("other").mkdir()
    for which in ("train", "test"):
        write(Path(f"other/{which}.csv"), other)
    assert scored(run, data="other")["test_loss"] == result["test_loss"]
    write(Path("other/test.csv"), other | {"kind": ["rose"] * 29 + ["cow"]})
    with pytest.raises(
        DataError, match=r"test.csv, line 31: the label 'cow' is none of the words that are known: rose, "
    ):
        scored(run, data="other")
    write(Path("other/test.csv"), {name: other[name] for name in ("kind", "wide")})
    with pytest.raises(DataError, match=r"test.csv has no column long; there are kind, wide$"):
        scored(run, data="other")


def test_gaps_are_filled_as_the_checkpoint_says(run: Path) -> None:
    whole = job(data="d", out="whole", steps=8)
    job(data="d", out="run", steps=4)
    assert job(out="run", resume=True, steps=8)["weights_sha256"] == whole["weights_sha256"]
    saved, _ = checkpoint.newest(run / "checkpoints")
    assert saved
    wide = [value for value in flowers(80, 0)["wide"] if value != ""]
    np.testing.assert_allclose(saved.arrays["data.fill"], [np.mean(flowers(80, 0)["long"]), np.mean(wide)], rtol=1e-12)
    saved.arrays["data.fill"][1] += 9
    for file in (run / "checkpoints").iterdir():
        file.unlink()
    save_changed(run / "checkpoints", saved)
    assert scored(run)["test_loss"] != whole["test_loss"]
    on, whole_on = (job(out=out, resume=True, steps=9)["weights_sha256"] for out in ("run", "whole"))
    assert on != whole_on
    zero = job(data="d", out="zero", steps=8, fill="0")
    assert zero["weights_sha256"] != whole["weights_sha256"]


def test_words_are_no_values(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--loss mse: labels are words \(rose = 0, say \"a\" = 1, ti, n = 2\)"):
        job(data="d", out="run", loss="mse")
    with pytest.raises(ConfigError, match=r"^--classes 5: labels are 3 words; leave it out"):
        job(data="d", out="run", classes=5)
    np.savez("d.npz", x_train=np.eye(2), y_train=[0, 1], x_test=np.eye(2), y_test=[0, 1])
    with pytest.raises(ConfigError, match=r"^--drop-columns: d.npz is not a table; leave it out"):
        job(data="d.npz", out="run")
    job(data="d", out="run", steps=1)
    for which in ("train", "test"):
        write(Path(f"d/{which}.csv"), flowers(30, 1) | {"kind": [1] * 30})
    with pytest.raises(DataError, match="line 2: the label '1' is none of the words that are known"):
        scored(run, data="d")


def test_a_model_of_numbers_takes_no_words(run: Path) -> None:
    Path("n").mkdir()
    for which in ("train", "test"):
        write(Path(f"n/{which}.csv"), flowers(30, 1) | {"kind": [0, 1, 2] * 10})
    job(data="n", out="run", steps=1)
    with pytest.raises(DataError, match=r"^d: labels are words, but the run's are numbers$"):
        scored(run, data="d")
