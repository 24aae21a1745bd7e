"""The training loop: what its steps carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.parallel.record import Agreement, Sums
from mpiml.train import train


@pytest.mark.parametrize("memory", ["shared", "private"])
def test_only_steps_that_are_logged_carry_the_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    """R2 has three sums for each output: of 40 outputs, 121 columns."""
    shapes = []

    def noting(kind: type, method: str) -> None:
        original = getattr(kind, method)

        def noted(self: Any, rows: NDArray[np.float64], *arguments: Any) -> Any:
            shapes.append(rows.shape)
            return original(self, rows, *arguments)

        monkeypatch.setattr(kind, method, noted)

    noting(Agreement, "__call__")
    noting(Sums, "add")
    x, y = np.random.default_rng(0).random((2, 64, 40), dtype=np.float32)
    settings = {"hidden": (8,), "batch": 16, "microbatches": 4, "steps": 4, "log_every": 2, "eval_every": 0}
    config = Config(**settings, loss="mse", metric="r2", memory=memory, quiet=True, out=str(tmp_path / "run"))
    result = train(config, data=Dataset.from_arrays(x, y, x, y))
    assert result["status"] == "done"
    assert [columns for entries, columns in shapes if entries == 4] == [2, 2 + 121, 2, 2 + 121]
    assert {columns for entries, columns in shapes if entries == 0} == {2}  # records that carry no losses


def test_the_last_line_is_the_command_for_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a run"
    x, y = np.random.default_rng(0).random((2, 64, 3), dtype=np.float32)
    train(Config(steps=2, batch=16, out=str(out)), data=Dataset.from_arrays(x, y, x, y))
    *_, files, report = capsys.readouterr().out.splitlines()
    assert files == f"files: {out}/ (metrics.jsonl, result.json, checkpoints)"
    assert report == f"report: python -m mpiml.report '{out}'"
