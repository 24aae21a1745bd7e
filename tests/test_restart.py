"""A run that goes on where its files lie elsewhere than they did when it began."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.config import Config
from mpiml.errors import DataError, OutputError
from mpiml.train import train
from tests.data import samples

FLAGS: dict[str, Any] = {"hidden": (8,), "batch": 20, "microbatches": 2, "quiet": True}
FIRST = "first/checkpoints/step-000000002.safetensors"


def job(**settings: Any) -> dict[str, Any]:
    """What becomes of a job of one rank."""
    return train(Config(**FLAGS | settings), MPI.COMM_SELF)


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory in which a run began, all of whose paths were given as they are from there."""
    samples.npz(tmp_path)
    monkeypatch.chdir(tmp_path)
    job(data="d.npz", steps=2, out="first")
    job(data="d.npz", steps=4, out="run", init=FIRST)
    return tmp_path


def test_another_directory_and_a_place_of_its_own_for_each_jobs_data(
    begun: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = job(data="d.npz", steps=8, out="whole", init=FIRST)
    shutil.rmtree("first")
    monkeypatch.chdir(tmp_path_factory.mktemp("other"))
    run = str(begun / "run")
    assert job(out=run, resume=True, steps=6)["step"] == 6
    shutil.move(begun / "d.npz", "d.npz")
    with pytest.raises(
        DataError, match=r"cannot read .*d.npz: No such file.*; if the run's data lie elsewhere .* by --data$"
    ):
        job(out=run, resume=True, steps=8)
    goes_on = job(out=run, resume=True, steps=8, data="d.npz", init="no.safetensors")
    assert goes_on["weights_sha256"] == whole["weights_sha256"]


def test_other_data_are_refused_wherever_they_lie(begun: Path) -> None:
    Path("job2").mkdir()
    arrays = dict(np.load("d.npz"))
    np.savez("job2/d.npz", **arrays | {"x_train": arrays["x_train"] + 1})
    with pytest.raises(DataError, match=r"job2/d.npz holds other data than the run in run was trained on: d.npz has "):
        job(out="run", resume=True, steps=6, data="job2/d.npz")
    shutil.copy("d.npz", "job2/d.npz")
    Path("run/environment.json").unlink()
    with pytest.raises(DataError, match=r"^--data job2/d.npz: the run in run has .*d.npz, and without its environment"):
        job(out="run", resume=True, steps=6, data="job2/d.npz")


def test_first_weights_are_needed_until_there_is_a_checkpoint(begun: Path) -> None:
    shutil.rmtree("first")
    shutil.rmtree("run/checkpoints")
    Path("run/metrics.jsonl").unlink()
    with pytest.raises(OutputError, match=f"cannot read .*/{FIRST}"):
        job(out="run", resume=True, steps=6)


def test_another_numpy_than_the_last_jobs_is_told_and_kept(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path("run/environment.json")
    file.write_text(file.read_text().replace(np.__version__, "1.0.0"))
    job(out="run", resume=True, steps=5, quiet=False)
    assert f"warning: since the last job NumPy is {np.__version__} (was 1.0.0): bits may" in capsys.readouterr().out
    assert json.loads(file.read_text())["earlier"] == [{"until": 4, "NumPy": "1.0.0"}]
    job(out="run", resume=True, steps=6, quiet=False)
    assert "since the last job" not in capsys.readouterr().out
    assert json.loads(file.read_text())["earlier"] == [{"until": 4, "NumPy": "1.0.0"}]
