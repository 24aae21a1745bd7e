"""What a run leaves in its directory, and when."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from mpiml.config import Config
from mpiml.errors import ConfigError, DirectoryError
from mpiml.run import lock, step_files
from mpiml.run.saving import Saver
from mpiml.run.segments import Copies
from mpiml.train import train
from mpiml.training import storage
from mpiml.training.storage import Store

SHORT: dict[str, Any] = {"steps": 6, "hidden": (4,), "log_every": 1, "eval_every": 2, "save_every": 2, "quiet": True}


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
            steps = [json.loads(line)["step"] for line in metrics.read_bytes()[: synced[-1]].splitlines()]
            assert synced[-1] == metrics.stat().st_size if what == "done" else step_files.step_of(target) in steps
            renamed.append(what)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", checked)
    train(Config(**SHORT, out=str(tmp_path)))
    assert renamed == [".safetensors"] * 3 + ["done"]


def test_a_job_whose_directory_is_taken_saves_nothing_more(tmp_path: Path, monkeypatch: Any) -> None:
    """And says nothing in result.json, which is the other job's."""
    segments = Store._segments
    other = lock.Owner("t", "node7", "k2", "17", "18")

    def taken(*arguments: Any) -> Any:
        if (tmp_path / "checkpoints" / "step-000000002.safetensors").exists():
            (tmp_path / ".lock").write_bytes(other.line())
        return segments(*arguments)

    monkeypatch.setattr(Store, "_segments", taken)
    with pytest.raises(DirectoryError, match=r"taken over by another job \(process 17 on node7\)"):
        train(Config(**SHORT, out=str(tmp_path)))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000002.safetensors"]
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "running"
    assert (tmp_path / ".lock").read_bytes() == other.line()


def test_a_job_whose_directory_is_taken_does_not_say_that_it_is_done(tmp_path: Path, monkeypatch: Any) -> None:
    """Though it saves nothing, and so has no save at which to notice."""
    other = lock.Owner("t", "node7", "k2", "17", "18")

    def taken(*arguments: Any) -> Any:
        (tmp_path / ".lock").write_bytes(other.line())
        (tmp_path / "result.json").write_text('{"status": "running", "of": "the other"}')
        return digest(*arguments)

    digest = Store.digest
    monkeypatch.setattr(Store, "digest", taken)
    with pytest.raises(DirectoryError, match="taken over by another job"):
        train(Config(**SHORT | {"save_every": 0}, out=str(tmp_path)))
    assert json.loads((tmp_path / "result.json").read_text()) == {"status": "running", "of": "the other"}


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_result_tells_of_the_last_save_while_the_run_goes_on(tmp_path: Path, monkeypatch: Any, way: str) -> None:
    """Of one that is written meanwhile, when it is on disk."""
    results: list[tuple[int, int]] = []
    save = Store.save

    def saved(*arguments: Any) -> None:
        save(*arguments)
        result = json.loads((tmp_path / "result.json").read_text())
        results.append((result["step"], result["saved"]))

    monkeypatch.setattr(Store, "save", saved)
    assert train(Config(**SHORT, out=str(tmp_path), save=way))["saved"] == 6
    assert [one == two for one, two in results] == [True] * 3
    assert [step for step, _ in results] == [2, 4, 6] if way == "sync" else results[2][0] == 6
    assert all(saved in (step - 2, step) for step, (saved, _) in zip((2, 4, 6), results, strict=True))


@pytest.mark.parametrize(
    ("left", "save", "said"),
    [
        (2.0, "auto", None),
        (1.9, "auto", r"copies take 0\.0014 GB a node, and 0\.0027 GB are available; see --save"),
        (0.0, "auto", "copies take .* GB a node, and how much is available is not known; see --save"),
        (0.0, "async", None),
    ],
)
def test_copies_take_half_of_the_memory_that_is_left_or_training_waits(
    tmp_path: Path, monkeypatch: Any, capsys: Any, left: float, save: str, said: str | None
) -> None:
    """There is `left` times the memory that copies take: weights, biases and Adam's moments of them, on 64 bytes."""
    begun, begin = list[bool](), Saver.begin
    copies = 3 * (4 * (64 * 1600 + 1600 + 1600 * 10) + 64)

    def noted(self: Saver, prepare: Any, own: Any, background: bool = False) -> None:
        begun.append(background)
        begin(self, prepare, own, background)

    monkeypatch.setattr(Saver, "begin", noted)
    monkeypatch.setattr(storage, "memory_available", lambda: int(left * copies))
    train(Config(**SHORT | {"hidden": (1600,), "save": save, "quiet": False}, out=str(tmp_path)))
    waits = re.search("training waits for saves: (.*)", capsys.readouterr().out)
    assert re.fullmatch(said, waits[1]) if waits and said else waits is said
    assert begun[:-1] == [not said] * (len(begun) - 1)


def test_a_rank_that_has_no_memory_for_its_copy_is_one_line(tmp_path: Path, monkeypatch: Any) -> None:
    def claim(self: Copies, size: int) -> None:
        raise MemoryError

    monkeypatch.setattr(Copies, "claim", claim)
    with pytest.raises(ConfigError, match=r"^--save async: a rank has no .* GB for its copy; --save sync needs none$"):
        train(Config(**SHORT, save="async", out=str(tmp_path)))
    train(Config(**SHORT, save="sync", out=str(tmp_path), resume=True))
