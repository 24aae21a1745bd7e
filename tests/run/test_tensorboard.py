"""Event files, read by TensorBoard itself: what they show, while a run goes on and when it is resumed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpiml.errors import ConfigError, OutputError
from mpiml.run import tensorboard
from mpiml.run.tensorboard import Events, of_run, scalars
from tests.conftest import Job

STEP = {
    "step": 2,
    "epoch": 1,
    "loss": 0.75,
    "bits": 0.5,
    "learning_rate": 0.125,
    "gradient_norm": None,
    "noise_scale": 40.0,
    "gradient_square": 0.25,
    "samples_per_second": 100.5,
    "seconds": {
        "compute": {"min": 0.25, "max": 0.5},
        "bytes_sent": {"min": 0, "max": 9},
        "slowest": {"rank": 1, "host": "a", "activity": "compute", "times_median": 2.0},
    },
    "workers": {"loss": {"min": 0.5, "max": 1.0}},
    "time": 1000.5,
}
SCORED = {"step": 2, "epoch": 1, "evaluation": {"loss": 1.5, "bits": 0.25, "rows": 7}, "time": 1001.5}
SHOWN = {
    "train/loss": 0.75,
    "train/bits": 0.5,
    "learning_rate": 0.125,
    "noise_scale": 40.0,
    "samples_per_second": 100.5,
    "seconds/compute/max": 0.5,
}


def shown(directory: Path) -> dict[str, list[tuple[int, float, float]]]:
    """What TensorBoard shows of a directory: (step, value, time) by tag."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(directory))
    events.Reload()
    return {tag: [(e.step, e.value, e.wall_time) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which tensorboardX finds no PyTorch, which it would load, for seconds."""
    (tmp_path / "lacks").mkdir(exist_ok=True)
    (tmp_path / "lacks" / "torch.py").write_text("raise ImportError('hidden')")
    return {"PYTHONPATH": str(tmp_path / "lacks")}


def steps_shown(directory: Path, tag: str) -> list[int]:
    return [step for step, _, _ in shown(directory)[tag]]


def test_a_step_and_an_evaluation_have_these_tags() -> None:
    assert scalars(STEP, "test") == SHOWN
    assert scalars(SCORED, "validation") == {"validation/loss": 1.5, "validation/bits": 0.25}
    assert scalars({"step": 3}, "test") == {}


def test_tensorboard_reads_what_is_written_as_soon_as_it_is_added(tmp_path: Path) -> None:
    events = Events(tmp_path / "a" / "b", "test", [STEP])
    events.add(SCORED)
    of_step = {tag: [(2, value, 1000.5)] for tag, value in SHOWN.items()}
    assert shown(tmp_path / "a" / "b") == of_step | {"test/loss": [(2, 1.5, 1001.5)], "test/bits": [(2, 0.25, 1001.5)]}


def test_an_older_run_has_the_time_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\nbad\n{"step": 2, "lo')
    _, problems = of_run(tmp_path / "metrics.jsonl", tmp_path / "events", "test")
    assert shown(tmp_path / "events") == {"train/loss": [(1, 0.5, (tmp_path / "metrics.jsonl").stat().st_mtime)]}
    (problem,) = problems
    assert "line 2, is damaged" in problem


def test_one_that_looks_on_forgets_the_files_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads files in the order of their names, and never again one that it has left."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr(tensorboard.time, "time", lambda: 1e9)
    Events(tmp_path, "test", [{"step": step, "loss": 0.5} for step in (1, 2, 3, 4)])
    watched = reader.EventAccumulator(str(tmp_path))
    watched.Reload()
    assert [event.step for event in watched.Scalars("train/loss")] == [1, 2, 3, 4]
    monkeypatch.setattr(tensorboard.time, "time", lambda: 1e9 + 60)
    Events(tmp_path, "test", [{"step": step, "loss": 0.5} for step in (1, 2)]).add({"step": 3, "loss": 0.25})
    watched.Reload()
    assert [(event.step, event.value) for event in watched.Scalars("train/loss")] == [(1, 0.5), (2, 0.5), (3, 0.25)]


def test_the_newest_file_of_before_and_those_of_others_stay(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    others, before = tmp_path / "events.out.tfevents.1.host", tmp_path / "events.out.tfevents.2.host.mpiml"
    for name in (others.name, f"{others.name}.mpiml", f".{others.name}.mpiml.0123.partial", before.name):
        (tmp_path / name).touch()
    events = Events(tmp_path, "test")
    assert set(tmp_path.iterdir()) == {others, before, events.path}


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot create .*/file"):
        Events(tmp_path / "file", "test")
    events = Events(tmp_path / "events", "test")
    events.path.unlink()
    events.path.mkdir()
    with pytest.raises(OutputError, match=rf"cannot write {events.path}: Is a directory"):
        events.add(STEP)


def test_without_the_library_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"tensorboardX .*: pip install 'mpiml\[tensorboard\]'"):
        tensorboard.check()


@pytest.mark.contract
def test_a_run_writes_them_and_one_that_goes_on_writes_them_anew(train: Callable[..., Job], tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    flags = "--log tensorboard --log-every 2 --save-every 4"
    done = train(2, f"{flags} --steps 7", **without_torch(tmp_path))
    assert done.code == 0, done.err
    assert steps_shown(done.run / "tensorboard", "train/loss") == [2, 4, 6, 7]
    assert steps_shown(done.run / "tensorboard", "test/accuracy") == [7]
    with open(done.run / "metrics.jsonl", "a") as file:  # of a job that was killed after its last checkpoint
        file.write(json.dumps({"step": 8, "loss": 9.0}) + "\n")
    longer = train(1, "--steps 10 --resume", **without_torch(tmp_path))
    assert longer.code == 0, longer.err
    lines: list[dict[str, Any]] = longer.metrics
    of_steps = [(line["step"], pytest.approx(line["loss"]), line["time"]) for line in lines if "evaluation" not in line]
    assert [step for step, _, _ in of_steps] == [2, 4, 6, 8, 10]
    assert shown(done.run / "tensorboard")["train/loss"] == of_steps


@pytest.mark.contract
def test_what_hinders_them_ends_the_run_in_one_line(train: Callable[..., Job], tmp_path: Path) -> None:
    """The library is hidden, and then a file lies where they should."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "tensorboardX.py").write_text("raise ImportError('hidden')")
    missing = train(2, "--log tensorboard --steps 4", PYTHONPATH=str(tmp_path / "hidden"))
    assert (missing.code, missing.run.exists()) == (78, False)
    assert missing.err == (
        "mpiml.train: event files for TensorBoard need the package tensorboardX (hidden): "
        "pip install 'mpiml[tensorboard]'\n"
    )
    pytest.importorskip("tensorboardX")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "tensorboard").touch()
    full = train(2, "--log tensorboard --steps 4", out="full", **without_torch(tmp_path))
    assert full.code == 74
    assert full.err == f"mpiml.train: cannot create {tmp_path / 'full' / 'tensorboard'}: File exists\n"
