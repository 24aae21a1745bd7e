"""Saving by all ranks, in the background or not: whatever happens to one of them, what is saved is whole and stays."""

from __future__ import annotations

import errno
import json
import os
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mpiml.config import Config
from mpiml.errors import OutputError
from mpiml.run import checkpoint, step_files
from mpiml.run.background import Work
from mpiml.run.process import StopRequest
from mpiml.train import train
from mpiml.training.run import Run
from tests.conftest import Job, launch, launch_all

pytestmark = pytest.mark.contract

ROOT = str(Path(__file__).parents[2])
STEPS, MODEL = 12, "tests.contract.disk:model"
SETTINGS: dict[str, Any] = {
    "model": MODEL,
    "steps": STEPS,
    "microbatches": 4,
    "log_every": 1,
    "keep": 99,
    "quiet": True,
}
RUN = f"--model {MODEL} --steps {STEPS} --microbatches 4 --log-every 1 --keep 99 --save-every 2 --eval-every 5"
TIMES = ("seconds", "samples_per_second", "time")
NODES = "MPIML_NODES=2,1"


def files(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "checkpoints").iterdir())}


def steps_saved(run: Path) -> list[int]:
    """The steps of the checkpoints of a run, all of which are whole."""
    return [checkpoint.load(path).step for path in sorted((run / "checkpoints").glob("step-*"))]


def metrics(run: Path) -> list[Any]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[Job]:
    """Runs on three ranks, in one job."""
    path = tmp_path_factory.mktemp("saving")
    full, asked = path / "full", path / "asked"
    return launch_all(
        3,
        [
            (path / "whole", f"{RUN} --save async"),
            (path / "sync", f"{RUN} --save sync"),
            (path / "slow", f"DISK=slow {RUN} --save async"),
            (path / "unseen", f"{NODES} DISK=unseen:2 {RUN} --save async"),
            (path / "unseen", f"{NODES} DISK=unseen:2 --resume --steps {STEPS + 2}"),
            (full, f"DISK=full:1:8 {RUN} --save async"),
            (full, f"--resume --steps {STEPS}"),
            (asked, f"DISK=term:1:8 {RUN} --save async"),
            (asked, f"--resume --steps {STEPS}"),
            (path / "closed", f"DISK=unseen:1 {RUN} --save async"),
            (path / "nodes", f"{NODES} DISK=slow {RUN} --save async"),
        ],
        PYTHONPATH=ROOT,
    )


def test_file_is_the_same_whoever_writes_it_and_when(jobs: Sequence[Job]) -> None:
    whole, sync, slow, unseen, *_, nodes = jobs
    for job in (whole, sync, slow, unseen, nodes):
        assert job.code == 0, job.err
    of_steps = files(whole.run)
    assert len(of_steps) == STEPS // 2
    assert files(slow.run) == files(nodes.run) == of_steps
    assert of_steps.items() <= files(unseen.run).items()  # which has gone on
    for name in of_steps:  # the setting is in the header
        waited, other = (checkpoint.load(run / "checkpoints" / name) for run in (sync.run, whole.run))
        assert waited.contents.digests == other.contents.digests


def test_rank_that_does_not_see_the_directory_goes_on_from_what_others_read(jobs: Sequence[Job]) -> None:
    again = jobs[4]
    assert (again.code, again.result["step"]) == (0, STEPS + 2), again.err
    assert f"going on after step {STEPS}" in again.out
    assert "warning" not in again.out


def test_disk_that_is_full_for_one_rank_ends_the_run_in_one_line_and_takes_nothing(jobs: Sequence[Job]) -> None:
    whole, full, again = jobs[0], jobs[5], jobs[6]
    assert full.code == 74
    path = full.run / "checkpoints" / "step-000000006.safetensors"
    assert full.err == f"mpiml.train: cannot write the checkpoint {path}: No space left on device\n"
    assert again.code == 0, again.err
    assert "going on after step 4" in again.out
    assert again.result["weights_sha256"] == whole.result["weights_sha256"]
    assert metrics(again.run) == metrics(whole.run)
    assert steps_saved(again.run) == list(range(2, STEPS + 1, 2))


def test_rank_that_cannot_open_the_file_on_a_node_where_it_is_to_write_ends_the_run(jobs: Sequence[Job]) -> None:
    closed = jobs[9]
    path = closed.run / "checkpoints" / "step-000000002.safetensors"
    assert closed.err == f"mpiml.train: cannot write the checkpoint {path}: No such file or directory\n"
    assert (closed.code, list(path.parent.iterdir())) == (74, [])


def test_stop_that_comes_while_a_save_is_in_flight_waits_for_it_and_saves(jobs: Sequence[Job]) -> None:
    whole, asked, again = jobs[0], jobs[7], jobs[8]
    assert (asked.code, again.code) == (75, 0), asked.err
    stopped, on = (
        re.search(r"(?:go on with --resume: step|going on after step) (\d+)", job.out) for job in (asked, again)
    )
    assert stopped, asked.out
    assert on, again.out
    assert 6 <= int(stopped[1]) == int(on[1]) < STEPS
    assert {6, int(on[1])} <= set(steps_saved(again.run))
    assert again.result["weights_sha256"] == whole.result["weights_sha256"]
    assert metrics(again.run) == metrics(whole.run)


def test_rank_killed_while_a_save_is_in_flight_takes_no_other(jobs: Sequence[Job], tmp_path: Path) -> None:
    """The run goes on with other ranks, and ends as if it had never stopped."""
    whole, run = jobs[0], tmp_path / "run"
    newest = 0
    for ranks, disk in ((3, "kill:1:7"), (2, "kill:0:19")):
        flags = [*RUN.replace("--save-every 2", "--save-every 1").split(), "--save", "async", "--resume"]
        done = launch(ranks, "-m", "mpiml.train", "--out", str(run), *flags, DISK=disk, PYTHONPATH=ROOT)
        assert done.returncode != 0
        assert newest < (newest := max(steps_saved(run))) < STEPS
    train(Config(**SETTINGS, save_every=2, eval_every=5, out=str(run), resume=True))
    assert json.loads((run / "result.json").read_text())["weights_sha256"] == whole.result["weights_sha256"]
    assert metrics(run) == metrics(whole.run)


# What only one rank is needed for.


@pytest.fixture
def run(tmp_path: Path, monkeypatch: Any) -> Path:
    monkeypatch.delenv("DISK", raising=False)
    return tmp_path / "run"


def test_save_that_is_interrupted_as_it_begins_is_not_finished(run: Path, monkeypatch: Any) -> None:
    """Its threads have not begun: what is in the file by then is not what is to be in it."""
    start, begun = Work.start, list[Work]()

    def failing(work: Work) -> None:
        begun.append(work)
        if len(begun) == 4:  # of the second save
            raise RuntimeError("can't start new thread")
        start(work)

    monkeypatch.setattr(Work, "start", failing)
    with pytest.raises(RuntimeError):
        train(Config(**SETTINGS, save_every=2, eval_every=0, out=str(run)))
    assert steps_saved(run) == [2]


def test_vectors_that_an_older_checkpoint_has_not_are_as_at_their_beginning(run: Path) -> None:
    """If the newest is damaged, what has been read of it does not stay: the velocity of the outer step, say."""
    workers = {"workers": 4, "average_every": 3, "average_from": 7, "outer_lr": 0.7, "outer_momentum": 0.9}
    config = Config(**SETTINGS | {"steps": 12}, **workers, save_every=3, eval_every=0, out=str(run))
    whole = train(config)["weights_sha256"]
    *_, damaged, last = sorted((run / "checkpoints").iterdir())
    last.unlink()
    content = bytearray(damaged.read_bytes())
    content[-2] ^= 0xFF
    damaged.write_bytes(content)
    (run / "result.json").unlink()
    assert train(config.replace(resume=True))["weights_sha256"] == whole


def test_best_checkpoint_stays_until_a_better_one_is_on_disk(run: Path, monkeypatch: Any) -> None:
    """The evaluation after step 6 is better than the one after step 3, and is made while step 4 is being saved."""
    pruned, prune = list[tuple[int, list[int]]](), step_files.prune

    def noted(directory: Path, step: int, keep: int, best: Any) -> None:
        prune(directory, step, keep, best)
        pruned.append((step, steps_saved(directory.parent)))

    monkeypatch.setattr(step_files, "prune", noted)
    monkeypatch.setenv("DISK", "slow")
    settings = SETTINGS | {"steps": 7, "keep": 1, "keep_best": 1, "save_every": 4, "eval_every": 3}
    train(Config(**settings, out=str(run)))
    assert (4, [3, 4]) in pruned
    assert (6, [6]) in pruned


def test_first_evaluation_begins_when_the_save_before_it_is_on_disk(run: Path, monkeypatch: Any) -> None:
    """If it fails, the run goes on after those steps. Later ones are not waited for."""
    evaluate, saved = Run.evaluate, list[list[int]]()

    def noted(*arguments: Any) -> Any:
        saved.append(steps_saved(run))
        return evaluate(*arguments)

    monkeypatch.setattr(Run, "evaluate", noted)
    monkeypatch.setenv("DISK", "slow")
    train(Config(**SETTINGS | {"steps": 4}, save_every=2, eval_every=2, save="async", out=str(run)))
    assert saved == [[2], [2, 4]]  # the last one waits
    train(Config(**SETTINGS | {"steps": 10}, save_every=2, eval_every=2, resume=True, out=str(run)))
    assert [steps[-1] for steps in saved[2:]] == [6, 6, 10]


def test_save_that_fails_asks_nobody_else_to_stop(run: Path, monkeypatch: Any) -> None:
    """Neither a program that trains within a block of its own."""
    monkeypatch.setenv("DISK", "full:0:3")
    with StopRequest() as stop:
        with pytest.raises(OutputError, match="No space left on device"):
            train(Config(**SETTINGS | {"steps": 300}, save_every=100, eval_every=0, save="async", out=str(run)))
        assert not stop.asked


def test_file_that_has_been_read_may_be_closed_with_an_error(run: Path, monkeypatch: Any) -> None:
    train(Config(**SETTINGS | {"steps": 4}, save_every=2, eval_every=0, out=str(run)))
    close, failed = os.close, list[str]()

    def failing(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        close(descriptor)
        if path.endswith(".safetensors") and "_read" in {frame.name for frame in traceback.extract_stack()[-2:]}:
            failed.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "close", failing)
    train(Config(**SETTINGS | {"steps": 6}, save_every=2, eval_every=0, resume=True, out=str(run)))
    assert len(failed) == 1
