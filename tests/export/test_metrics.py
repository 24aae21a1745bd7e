"""Metrics as CSV and event files: all digits, a column for each field, and what is no run, or half written."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mpiml.export.__main__ import main
from mpiml.export.metrics import table
from tests.conftest import Job
from tests.run.test_tensorboard import SCORED, STEP, shown, without_torch

Say = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has logged a step with a worker's numbers, a plain one and an evaluation, and is writing a line."""
    path = tmp_path / "run"
    path.mkdir()
    lines = [STEP, SCORED, {"step": 3, "loss": 0.1 + 0.2, "bits": None}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    (path / "config.toml").write_text("validation = 0.25\n")
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_tables_have_a_column_for_each_field_and_all_digits(run: Path, capsys: Say) -> None:
    assert main(["metrics", str(run), "--to", "csv"]) == 0
    assert capsys.readouterr() == (f"{run / 'steps.csv'}: 2 rows\n{run / 'evaluations.csv'}: 1 row\n", "")
    first, second = rows_of(run / "steps.csv")
    assert (first["seconds/compute/max"], first["seconds/slowest/host"], first["time"]) == ("0.5", "a", "1000.5")
    assert (first["workers/loss/min"], first["gradient_norm"]) == ("0.5", "")
    assert float(second["loss"]) == 0.1 + 0.2
    assert (second["bits"], second["seconds/compute/max"]) == ("", "")
    wanted = {"step": "2", "epoch": "1", "loss": "1.5", "bits": "0.25", "rows": "7", "time": "1001.5"}
    assert rows_of(run / "evaluations.csv") == [wanted]


def test_a_field_that_only_a_later_line_has_gets_a_column() -> None:
    assert table([{"step": 1}, {"step": 2, "slow": {"host": "a, b"}}]) == 'step,slow/host\n1,\n2,"a, b"\n'


def test_event_files_are_those_of_the_log(run: Path, tmp_path: Path, capsys: Say) -> None:
    pytest.importorskip("tensorboardX")
    assert main(["metrics", str(run), "--to", "tensorboard", "--out", str(tmp_path / "events")]) == 0
    (file,) = (tmp_path / "events").iterdir()
    assert capsys.readouterr() == (f"{file}\n", "")
    assert [step for step, *_ in shown(tmp_path / "events")["train/loss"]] == [2, 3]
    assert [step for step, *_ in shown(tmp_path / "events")["validation/loss"]] == [2]


@pytest.mark.contract
def test_export_and_log_show_the_same(train: Callable[..., Job], tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    flags = "--steps 6 --log-every 2 --log tensorboard --noise-scale --validation 0.2"
    logged = train(2, flags, **without_torch(tmp_path))
    assert logged.code == 0, logged.err
    assert main(["metrics", str(logged.run), "--to", "tensorboard", "--out", str(tmp_path / "events")]) == 0
    of_log = shown(logged.run / "tensorboard")
    assert shown(tmp_path / "events") == of_log
    assert {"train/accuracy", "validation/accuracy", "noise_scale", "seconds/communication/max"} <= of_log.keys()


def test_a_job_that_writes_event_files_is_left_alone(run: Path, capsys: Say) -> None:
    (run / "config.toml").write_text('log = "tensorboard"\n')
    (run / "result.json").write_text('{"status": "running"}')
    assert main(["metrics", str(run), "--to", "tensorboard"]) == 73
    assert capsys.readouterr().err == (
        f"mpiml.export: the job in {run} writes {run / 'tensorboard'} itself; give another directory by --out DIR\n"
    )
    assert not (run / "tensorboard").exists()


def test_damaged_lines_are_named_and_the_rest_is_there(run: Path, capsys: Say) -> None:
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("garbage\n" * 2 + text)
    assert main(["metrics", str(run), "--to", "csv"]) == 0
    err = capsys.readouterr().err
    assert err.startswith(f"mpiml.export: warning: {run / 'metrics.jsonl'}, line 1, is damaged: ")
    assert err.endswith(" (damaged lines in all: 2); the rest is exported\n")
    assert err.count("\n") == 1
    assert len(rows_of(run / "steps.csv")) == 2


def test_what_is_no_run_is_refused_in_one_line(run: Path, tmp_path: Path, capsys: Say) -> None:
    (tmp_path / "empty").mkdir()
    for what, code, message in (
        (tmp_path / "none", 74, "does not exist; give the directory of a run, as runs/digits-mlp-001"),
        (run / "config.toml", 74, "is not a directory; give the directory of a run, as runs/digits-mlp-001"),
        (tmp_path / "empty", 74, "is not the directory of a run: there is no metrics.jsonl in it"),
    ):
        assert main(["metrics", str(what), "--to", "csv"]) == code
        assert capsys.readouterr().err == f"mpiml.export: {what} {message}\n"
    (run / "metrics.jsonl").unlink()
    assert main(["metrics", str(run), "--to", "csv"]) == 74
    assert "has logged nothing yet" in capsys.readouterr().err
    assert main(["metrics", str(run), "--to", "xml"]) == 78
    assert capsys.readouterr().err == "mpiml.export: --to: invalid choice: 'xml' (choose from 'tensorboard', 'csv')\n"


def test_without_the_library_a_line_says_what_to_install(
    run: Path, capsys: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert main(["metrics", str(run), "--to", "tensorboard"]) == 78
    assert "pip install 'mpiml[tensorboard]'" in capsys.readouterr().err
    assert not (run / "tensorboard").exists()
