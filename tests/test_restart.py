"""A run goes on from what is sure: checkpoints that are there, metrics that are on disk, a directory of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mpiml.config import Config
from mpiml.errors import DirectoryError, OutputError
from mpiml.parallel.state import State
from mpiml.restart import _check_nothing_vanished
from mpiml.run import lock
from mpiml.train import train

SHORT: dict[str, Any] = {"steps": 6, "hidden": (4,), "log_every": 1, "eval_every": 2, "save_every": 2, "quiet": True}


@pytest.mark.parametrize(
    ("save_every", "metrics", "result", "gone"),
    [
        (5, 6, {"status": "running", "step": 0}, True),
        (5, 5, {"status": "running", "step": 0}, False),  # killed in its first save
        (5, 0, {}, False),
        (0, 99, {"status": "running", "step": 0}, False),  # it saves only when it is stopped
        (0, 99, {"status": "failed", "step": 99}, False),
        (0, 99, {"status": "stopped", "step": 99}, True),
        (500, 99, {"status": "stopped", "step": 99}, True),
        (5, 0, {"status": "stopped", "step": 0}, False),  # before its first step
    ],
)
def test_a_run_whose_checkpoints_are_gone_does_not_start_anew(
    tmp_path: Path, save_every: int, metrics: int, result: Any, gone: bool
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.toml").write_text(Config(save_every=save_every).to_toml())
    lines = [{"step": step, "loss": 1.0} for step in range(1, metrics + 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = Config(save_every=1)  # of the job that goes on, which may differ
    if gone:
        with pytest.raises(OutputError, match=rf"are gone, for the run had come to step {metrics}: put them back"):
            _check_nothing_vanished(asked, tmp_path, result)
        (tmp_path / "checkpoints" / "step-000000005.safetensors").write_text("")
    _check_nothing_vanished(asked, tmp_path, result)


def test_metrics_are_left_alone_when_checkpoints_are_gone(tmp_path: Path) -> None:
    config = Config(**SHORT, out=str(tmp_path))
    train(config)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for path in (tmp_path / "checkpoints").iterdir():
        path.unlink()
    for _ in range(2):
        with pytest.raises(OutputError, match="are gone, for the run had come to step 6"):
            train(config.replace(steps=8, resume=True))
        assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_metrics_are_on_disk_before_what_goes_with_them(tmp_path: Path, monkeypatch: Any) -> None:
    metrics, synced, renamed = tmp_path / "metrics.jsonl", [0], list[str]()
    fsync, replace = os.fsync, os.replace

    def noted(descriptor: int) -> None:
        if os.path.realpath(f"/proc/self/fd/{descriptor}") == str(metrics):
            synced.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    def checked(source: Path, target: Path) -> None:
        what = "done" if '"done"' in source.read_text(errors="replace") else target.suffix
        if what in (".safetensors", "done"):
            assert synced[-1] == metrics.stat().st_size > 0, target
            renamed.append(what)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", checked)
    train(Config(**SHORT, out=str(tmp_path)))
    assert renamed == [".safetensors"] * 3 + ["done"]


def test_lines_that_a_power_failure_took_are_named(tmp_path: Path, capsys: Any) -> None:
    config = Config(**SHORT, out=str(tmp_path))
    train(config)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:3]))  # steps 1, 2, evaluation 2
    train(config.replace(steps=8, resume=True, quiet=False))
    assert "metrics.jsonl has lost its lines of steps 3 to 6" in capsys.readouterr().out


def test_a_job_whose_directory_is_taken_saves_nothing_more(tmp_path: Path, monkeypatch: Any) -> None:
    """And says nothing in result.json, which is the other job's."""
    collect = State.collect
    other = lock.Owner("t", "node7", "k2", "17", "18")

    def taken(*arguments: Any) -> Any:
        if (tmp_path / "checkpoints" / "step-000000002.safetensors").exists():
            (tmp_path / ".lock").write_bytes(other.line())
        return collect(*arguments)

    monkeypatch.setattr(State, "collect", taken)
    with pytest.raises(DirectoryError, match=r"taken over by another job \(process 17 on node7\)"):
        train(Config(**SHORT, out=str(tmp_path)))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000002.safetensors"]
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "running"
    assert (tmp_path / ".lock").read_bytes() == other.line()
