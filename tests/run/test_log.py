"""What a run says: the lines of metrics.jsonl, those on a terminal, the summary, and what stays when a run goes on."""

from __future__ import annotations

import json
import math
import os
import pty
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.clock import SHARES, Clock
from mpiml.errors import OutputError
from mpiml.run import console as module
from mpiml.run import environment
from mpiml.run.console import Console, Shown
from mpiml.run.log import Evaluation, Log, Step
from mpiml.run.metrics import cut_after, last_known
from mpiml.run.step_times import KEPT
from mpiml.run.stragglers import Pace
from mpiml.team import Team

ROWS = 100.0  # of a step
HEAD = {"step": 2, "epoch": 1, "loss": 0.75, "accuracy": 0.5, "learning_rate": 0.001, "gradient_norm": 1.25}


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Log:
    """The log of a run of one rank, where nobody sits at a terminal; it says nothing yet."""
    monkeypatch.setattr(module, "width", lambda: None)
    team = Team(MPI.COMM_SELF, Clock())
    team.clock.seconds["data"] = 7.0  # before the first step
    return Log(team, tmp_path / "metrics.jsonl", ROWS, "accuracy", Pace(1, [1], [0], crowded=False))


def spend(log: Log, **seconds: float) -> None:
    """Book time under activities."""
    for activity, more in seconds.items():
        log.team.clock.seconds[activity] = log.team.clock.seconds.get(activity, 0.0) + more


DONE = Step(2, 1, 0.75, 0.5, 0.001, 1.25, 0.5, False)
SCORED = Evaluation(3, 2, 0.5, 0.25, 360)


def step_of(seconds: float, step: int = 2) -> Step:
    """A step that took so long."""
    return DONE._replace(seconds=seconds, step=step)


def written(log: Log) -> list[dict[str, Any]]:
    """The lines, without the time at which each was written."""
    entries = [json.loads(text, parse_constant=pytest.fail) for text in log.metrics.read_text().splitlines()]
    assert all(abs(time.time() - entry.pop("time")) < 60 for entry in entries)
    return entries


def test_the_line_of_a_step(log: Log) -> None:
    log.timed(step_of(0.3, 1))
    log.timed(step_of(0.5, 2))
    spend(log, compute=0.6, update=0.1, evaluation=9.0)
    log.step(DONE)
    (entry,) = written(log)
    times = entry.pop("seconds")
    assert entry == HEAD | {"samples_per_second": 2 * ROWS / 0.8}
    assert list(times) == [*SHARES, "bytes_sent"]
    each = dict.fromkeys(SHARES, 0.0) | {"compute": 0.6, "update": 0.1}
    assert times == {name: {"min": value, "max": value} for name, value in (each | {"bytes_sent": 0}).items()}


def test_times_of_a_line_are_since_the_line_before(log: Log) -> None:
    spend(log, compute=5.0)
    log.timed(step_of(1.0, 1))
    log.step(DONE._replace(step=1))
    spend(log, compute=0.25)
    log.timed(step_of(0.25, 2))
    log.step(DONE._replace(step=2))
    last = written(log)[-1]
    assert (last["seconds"]["compute"]["max"], last["samples_per_second"]) == (0.25, ROWS / 0.25)


def test_a_line_without_steps_has_no_rate(log: Log) -> None:
    log.step(DONE)
    assert written(log)[0]["samples_per_second"] == 0.0


def test_numbers_that_are_not_finite_are_null(log: Log) -> None:
    log.step(DONE._replace(loss=math.inf, score=math.nan, norm=None))
    (entry,) = written(log)
    assert [entry[name] for name in ("loss", "accuracy", "gradient_norm")] == [None, None, None]


def test_the_line_of_an_evaluation(log: Log, capsys: pytest.CaptureFixture[str]) -> None:
    log.open_console(1, 9, quiet=False)
    log.evaluation(SCORED._replace(loss=0.12345))
    assert written(log) == [{"step": 3, "epoch": 2, "evaluation": {"loss": 0.12345, "accuracy": 0.25, "rows": 360}}]
    assert capsys.readouterr().out == "step 3  epoch 2  test loss 0.1235  test accuracy 0.2500\n"


def test_the_last_results_are_known_under_the_names_of_a_result(log: Log) -> None:
    log.known = {"loss": 9.0, "accuracy": 0.1, "step": 1}
    log.timed(DONE)
    assert log.known == {"loss": 0.75, "accuracy": 0.1, "step": 2}
    log.evaluation(SCORED)
    assert log.known == {"loss": 0.75, "accuracy": 0.25, "test_loss": 0.5, "step": 2}


def test_metrics_that_cannot_be_written_are_an_error_that_names_the_file(log: Log) -> None:
    log.metrics.mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*/metrics.jsonl: Is a directory"):
        log.evaluation(SCORED)


def several(log: Log, crowded: bool = False) -> Callable[[list[list[float]]], tuple[float, dict[str, Any]]]:
    """What rank 0 makes of a line to which four ranks give their seconds of computing and in 10 steps.

    The launcher numbered them the other way round.
    """
    log.pace = Pace(1, [1] * 4, [3, 2, 1, 0], crowded=False)
    hosts = [{"host": f"node{rank}"} for rank in range(4)]
    (log.metrics.parent / "environment.json").write_text(json.dumps({"ranks": hosts}))

    def times(ranks: list[list[float]]) -> tuple[float, dict[str, Any]]:
        everyones = np.zeros((4, len(SHARES) + 3))
        everyones[:, SHARES.index("compute")], everyones[:, -3] = np.transpose(ranks)
        everyones[1, -2], everyones[:, -1] = crowded, [7, 0, 9, 8]
        return log._times(everyones, 10)

    return times


SLOW = [[1.0, 4.0], [2.5, 4.0], [1.1, 4.1], [1.0, 4.0]]  # seconds of computing, and in all


def test_a_line_has_the_least_and_the_most_of_any_rank_and_the_slowest_ranks_rate(log: Log) -> None:
    speed, times = several(log)(SLOW)
    assert times["compute"] == {"min": 1.0, "max": 2.5}
    assert times["bytes_sent"] == {"min": 0, "max": 9}
    assert speed == pytest.approx(10 * ROWS / 4.1)


def test_a_rank_that_the_others_wait_for_is_named_in_the_line_and_once_on_the_terminal(
    log: Log, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, read = [], environment.read
    monkeypatch.setattr(environment, "read", lambda run: reads.append(run) or read(run))
    log.open_console(1, 99, quiet=False)
    times = several(log)
    lines = [times(SLOW)[1].get("slowest") for _ in range(6)]
    named = {"rank": 2, "host": "node1", "activity": "compute", "times_median": 2.5}
    assert lines == [None, None, *[named] * 4]
    assert len(reads) == 1  # environment.json has an entry for each rank
    assert capsys.readouterr().out == (
        "warning: the others wait for rank 2 (on node1): its time in compute is 2.5 times that of the other replicas\n"
    )


def test_where_a_node_is_crowded_nobody_is_named(log: Log) -> None:
    times = several(log, crowded=True)
    assert not [line for line in (times(SLOW)[1] for _ in range(6)) if "slowest" in line]


def test_a_quiet_run_says_nothing(log: Log, capsys: pytest.CaptureFixture[str]) -> None:
    with log:
        log.open_console(1, 9, quiet=True)
        log.say("a line")
        log.timed(step_of(0.5, 1))
        log.step(DONE._replace(step=1))
        log.evaluation(SCORED)
    assert capsys.readouterr() == ("", "")
    assert len(written(log)) == 2


def test_where_nobody_watches_a_step_is_a_line_now_and_then(
    log: Log, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log.open_console(1, 9, quiet=False)
    for pause, said in (
        (1e9, ""),
        (-1.0, "step 2  epoch 1  loss 0.7500  accuracy 0.5000  2,000 samples/s  0:00:00 left\n"),
    ):
        monkeypatch.setattr(module, "CONSOLE_PAUSE", pause)
        log.timed(step_of(0.05, 2))
        log.step(DONE._replace(step=2))
        assert capsys.readouterr() == (said, "")
        log.step(DONE._replace(step=2), newest=False)
        assert capsys.readouterr() == ("", "")


def test_where_somebody_watches_there_is_a_bar_and_lines_go_where_it_is(
    log: Log, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "width", lambda: 80)
    monkeypatch.setattr(module, "CONSOLE_PAUSE", -1.0)
    with log:
        log.open_console(11, 20, quiet=False)
        assert log._console
        bar = log._console._bar
        assert bar is not None
        assert (bar.n, bar.total) == (10, 20)  # as a run that goes on after step 10
        log.timed(step_of(0.05, 13))
        shown = " epoch 1 loss 0.75 accuracy 0.500 2.0k samples/s {remaining} left"
        assert (bar.n, bar.bar_format) == (13, "step {n_fmt}/{total_fmt} [{bar}]" + shown)
        log.step(DONE._replace(step=13))  # the bar says it
        log.say("a line")
    out, err = capsys.readouterr()
    assert out == ""
    assert "a line\n" in err
    assert "epoch 1  loss" not in err
    assert max(map(len, err.replace("\r", "\n").splitlines())) < 80


def test_a_run_that_has_no_step_left_has_no_bar(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "width", lambda: 80)
    assert Console(10, 9)._bar is None


def test_samples_per_second_are_by_the_median_step_and_without_the_first_steps(log: Log) -> None:
    assert log.samples_per_second() is None
    for step, seconds in enumerate([9.0] * 10 + [0.5] * 6 + [7.0] * 5, 1):
        log.timed(step_of(seconds, step))
    assert log.samples_per_second() == ROWS / 0.5


def test_where_the_time_went_is_in_parts_of_all_steps(log: Log) -> None:
    assert log.where_the_time_went() == dict.fromkeys(SHARES, 0.0)
    spend(log, compute=3.0, data=1.0, evaluation=100.0)
    log.step(DONE._replace(step=1))  # not since the last line
    assert log.where_the_time_went() == dict.fromkeys(SHARES, 0.0) | {"compute": 0.75, "data": 0.25}


def held_for_the_log() -> int:
    """Bytes that its modules have allocated and not freed."""
    taken = tracemalloc.take_snapshot()
    return sum(trace.size for trace in taken.filter_traces([tracemalloc.Filter(True, "*/mpiml/run/*")]).traces)


def test_a_log_does_not_grow_with_the_steps(log: Log) -> None:
    tracemalloc.start()
    for step in range(2000):
        log.timed(step_of(0.5 + step % 2, step))
    after_some = held_for_the_log()
    for step in range(KEPT):
        log.timed(step_of(0.5 + step % 2, step))
    assert held_for_the_log() - after_some < 10_000
    tracemalloc.stop()
    assert log.samples_per_second() in (ROWS / 0.5, ROWS / 1.0, round(ROWS / 1.5, 1))


def test_terminal_that_is_closed_ends_the_bar_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, ours = pty.openpty()
    with open(ours, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(os, "get_terminal_size", lambda descriptor: os.terminal_size((80, 24)))
        console = Console(1, 100)
        assert console._bar is not None
        os.close(terminal)
        for step in range(2, 40):
            console.progress(step, Shown(1, 0.5, "r2", None, 9.0))
            console._last_line = 0.0
            console.line("an evaluation")
            console.now_and_then(step, "a step")
        console.close()
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), ours)  # for what the stream still holds


def test_bar_moves_within_a_round_and_not_back(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "width", lambda: 80)
    log.open_console(1, 100, quiet=False)
    assert log._console is not None
    bar = log._console._bar
    assert bar is not None
    with log:
        for step in range(1, 9):
            log.moved(step)
        assert bar.n == 8
        log.timed(step_of(0.5, 4))
        assert bar.n == 8


def test_a_line_that_nobody_can_read_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    console = Console(1, 10)
    monkeypatch.setattr(sys, "stdout", None)
    console.line("nobody reads it")


LINES = [
    b'{"step": 1, "loss": 2.0}\n',
    b'{"step": 2, "loss": 1.0}\n',
    b'{"step": 2, "evaluation": {"loss": 1.5, "score": null, "rows": 7}}\n',
    b'{"step": 3, "loss": 0.5}\n',
]


def cut_at_2(path: Path, content: bytes) -> tuple[list[int], list[str]]:
    path.write_bytes(content)
    _, entries, notes = cut_after(path, 2, logged=True, scored=True)
    return [entry["step"] for entry in entries], notes


def test_whole_file_and_torn_end_are_cut_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for torn in (b"", b'{"step": 4, "lo', b"\0" * 4096, b'{"step": 3, "loss": 1.0}'):
        assert cut_at_2(path, b"".join(LINES) + torn) == ([1, 2, 2], [])
        assert path.read_bytes() == b"".join(LINES[:3])
    assert cut_at_2(path, LINES[0] + LINES[1].strip()) == ([1, 2], [])
    assert path.read_bytes() == LINES[0] + LINES[1]  # so that the next line begins a line


@pytest.mark.parametrize(
    "damaged",
    [b"garbage\xff\n", b"\n", b"[" * 100_000 + b"\n", b'{"step": true}\n', b'{"loss": 1}\n', b"\0" * 64 + b"\n",
     b'{"step": 2, "evaluation": null}\n', b'{"step": 2, "evaluation": {"loss": "x"}}\n', b'{"step": 2, "loss": []}\n'],
)  # fmt: skip
def test_a_damaged_line_within_is_reported_and_left_out(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    steps, (note,) = cut_at_2(path, LINES[0] + damaged + b"".join(LINES[1:]))
    assert steps == [1, 2, 2]
    assert note.startswith(f"warning: {path}, line 2, is damaged: ")
    assert note.endswith("; the rest is kept")
    assert "\n" not in note
    assert path.read_bytes() == b"".join(LINES[:3])
    _, (note,) = cut_at_2(path, damaged * 3 + b"".join(LINES))
    assert "line 1, is damaged" in note
    assert "and so are 2 more lines" in note


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["pipe", "directory"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, make: object) -> None:
    make(tmp_path / "metrics.jsonl")  # type: ignore[operator]
    with pytest.raises(OutputError, match=r"metrics.jsonl: is not a regular file"):
        cut_after(tmp_path / "metrics.jsonl", 2, logged=True, scored=True)


def test_what_is_cut_and_what_stays(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert cut_after(metrics, 0, logged=True, scored=True) == ([], [], [])
    assert not metrics.exists()
    entries = [
        {"step": step, **({"evaluation": {}} if scored else {})}
        for step, scored in ((2, False), (4, False), (4, True), (6, False), (8, True))
    ]
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    metrics.write_text(text + '{"step": 9, "lo')
    assert cut_after(metrics, 4, logged=True, scored=True) == (entries, entries[:3], [])
    assert [json.loads(row) for row in metrics.read_text().splitlines()] == entries[:3]
    before = metrics.stat().st_ino
    cut_after(metrics, 4, logged=True, scored=True)
    assert metrics.stat().st_ino == before
    assert cut_after(metrics, 4, logged=True, scored=False) == (entries[:3], entries[:2], [])
    assert cut_after(metrics, 4, logged=False, scored=False) == (entries[:2], entries[:1], [])


def test_times_stay_in_the_file_and_not_in_memory(tmp_path: Path) -> None:
    metrics, times = tmp_path / "metrics.jsonl", {name: {"min": 0.5, "max": 1.5} for name in SHARES}
    entries = [{"step": step, "loss": 1.5, "seconds": times, "workers": {"loss": [1.0, 2.0]}} for step in (1, 2, 3)]
    metrics.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    every, kept, _ = cut_after(metrics, 2, logged=True, scored=True)
    assert every == [{"step": step, "loss": 1.5} for step in (1, 2, 3)]
    assert kept == every[:2]
    assert [json.loads(row) for row in metrics.read_text().splitlines()] == entries[:2]


def test_the_last_known_values_may_be_missing(tmp_path: Path) -> None:
    _, entries, _ = cut_after(tmp_path / "none", 2, logged=True, scored=True)
    assert (entries, last_known(entries, "score")) == ([], {})
    (tmp_path / "m").write_bytes(b"".join(LINES))
    _, entries, _ = cut_after(tmp_path / "m", 9, logged=True, scored=True)
    assert last_known(entries, "score") == {"loss": 0.5, "score": None, "test_loss": 1.5}
    assert last_known([{"step": 1}], "score") == {"loss": None}
