"""The timeline's parts: what is remembered, how it becomes spans, and what happens when it is too much."""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from mpi4py import MPI

from mpiml.clock import Clock
from mpiml.errors import ConfigError, NotFiniteError
from mpiml.parallel import grid as grids
from mpiml.run import trace
from mpiml.run.trace import Event, Recorder, Span, spans
from mpiml.team import Team

WORLD = MPI.COMM_WORLD


def named(recorder: Recorder) -> list[tuple[str, int]]:
    """Names and micro-batches of what takes any time."""
    found = [Event(*event) for event in recorder.events]
    return [
        (event.name, event.microbatch)
        for event, end in zip(found, [*found[1:], None], strict=True)
        if not end or end[0] > event[0]
    ]


def test_only_a_job_that_is_traced_has_a_clock_that_remembers() -> None:
    assert type(trace.clock_for(None, 4)) is Clock
    assert isinstance(trace.clock_for("t.json", 4), Recorder)


@pytest.mark.parametrize("name", ["config.toml", "result.json", "metrics.jsonl", "environment.json", "."])
def test_files_of_the_run_are_not_for_timelines(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    for path in (run / name, Path("run") / name, run / "checkpoints" / "x.json", run / "checkpoints"):
        with pytest.raises(ConfigError, match="the run itself writes there"):
            trace.check(str(path), "run")
    for path, out in ((run / "t.json", "run"), (tmp_path / name / "t.json", None), (tmp_path / "x.toml", "run")):
        trace.check(str(path), out)
    assert not list(tmp_path.iterdir())


def test_part_of_computing_begins_where_computing_does() -> None:
    recorder = Recorder(1)
    recorder("compute")
    began = recorder.events[-1][0]
    recorder.mark("forward", 3)
    assert list(map(tuple, recorder.events))[1:] == [(began, 0, None, "forward", 3)]
    recorder.mark("send", 3)
    assert recorder.events[-1][0] > began
    assert named(recorder) == [("start", -1), ("forward", 3), ("send", 3)]


def test_part_that_is_interrupted_goes_on() -> None:
    recorder = Recorder(1)
    recorder("compute")
    recorder.mark("backward", 2)
    with recorder.booked("communication"):
        recorder("update")
    assert recorder.activity == "compute"
    assert named(recorder)[1:] == [("backward", 2), ("communication", -1), ("update", -1), ("backward", 2)]
    assert recorder.events[-1][2] is None


def test_times_are_those_of_a_plain_clock() -> None:
    recorder = Recorder(1)
    recorder("compute")
    recorder.mark("forward", 0)
    recorder("update")
    times = {event[3]: event[0] for event in recorder.events}
    assert recorder.seconds["compute"] == pytest.approx(times["update"] - times["forward"], abs=1e-9)


def test_spans_nest() -> None:
    events = [
        Event(0, 0, None, "start", -1),
        Event(1, 1, None, "data", -1),
        Event(2, 1, None, "forward", 4),
        Event(3, 1, None, "evaluation", -1),
        Event(3.5, 1, "evaluation", "forward", 0),
        Event(4, 1, "evaluation", "evaluation", -1),
        Event(5, 1, None, "compute", -1),
        Event(5, 2, None, "data", -1),
    ]
    assert list(spans(events, 6)) == [
        Span(0, 1, "start", {}),
        Span(0, 1, "start", {}),
        Span(1, 5, "step 1", {}),
        Span(1, 2, "data", {}),
        Span(2, 3, "forward 4", {"step": 1, "micro-batch": 4}),
        Span(3, 5, "evaluation", {}),
        Span(3.5, 4, "forward 0", {"step": 1, "micro-batch": 0}),
        Span(5, 6, "step 2", {}),
        Span(5, 6, "data", {}),
    ]


def traced(path: Path, steps: int, error: Exception | None = None, begin: int = 1) -> list[str]:
    """What a job says that does as many things in a step as its rank's number and two more."""
    clock, said = Recorder(WORLD.size), []
    grid = grids.build(Team(WORLD, clock), 1)
    with trace.written(str(path), grid, said.append):
        for clock.step in range(begin, steps + 1):
            for _ in range(WORLD.rank + 2):
                clock("data")
        if error:
            raise error
    grid.free()
    return said


def shown(path: Path) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for event in json.loads(path.read_text())["traceEvents"]:
        if event["name"].startswith("step "):
            found.setdefault(event["tid"], set()).add(event["name"])
    return found


@pytest.mark.mpi
def test_what_does_not_fit_is_forgotten_alike_on_all_ranks(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(trace, "LEAST", 10 * (WORLD.size + 1))  # ten of the last rank's steps, the log's event one
    monkeypatch.setattr(trace, "EVENTS", 0)
    path = Path(WORLD.bcast(str(tmp_path))) / "t.json"
    (text,) = traced(path, 30)
    assert text.endswith("(from step 22 on; earlier steps did not fit)")
    steps = {f"step {step}" for step in range(22, 31)}
    assert shown(path) == dict.fromkeys(range(1, WORLD.size + 1), steps)
    assert json.loads(path.read_text())["otherData"] == {"steps": "22 to 30"}


@pytest.mark.mpi
def test_steps_of_a_run_that_goes_on_are_those_of_this_job(tmp_path: Path) -> None:
    path = Path(WORLD.bcast(str(tmp_path))) / "t.json"
    (text,) = traced(path, 8, begin=5)
    assert text == f"timeline: {path}"
    assert json.loads(path.read_text())["otherData"] == {"steps": "5 to 8"}


def test_of_many_ranks_some_are_drawn() -> None:
    for ranks in (1, 250, 251, 1000, 102_400):
        drawn = list(trace.drawn_ranks(ranks))
        assert (drawn[0], drawn[-1], len(set(drawn))) == (0, ranks - 1, min(ranks, 250))


@pytest.mark.mpi
def test_a_file_has_the_tracks_of_the_ranks_that_are_drawn(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(trace, "TRACKS", 2)
    path = Path(WORLD.bcast(str(tmp_path))) / "t.json"
    traced(path, 3)
    assert set(shown(path)) == {1, WORLD.size}
    assert {event["tid"] for event in json.loads(path.read_text())["traceEvents"] if "tid" in event} == {1, WORLD.size}


@pytest.mark.mpi
def test_last_step_is_shown_even_if_it_does_not_fit(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(trace, "LEAST", 2)
    monkeypatch.setattr(trace, "EVENTS", 0)
    path = Path(WORLD.bcast(str(tmp_path))) / "t.json"
    traced(path, 5)
    assert shown(path) == {track: {"step 5"} for track in range(1, WORLD.size + 1)}


@pytest.mark.mpi
def test_lost_timeline_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(WORLD.bcast(str(tmp_path))) / "t.json"
    if WORLD.rank == 0:
        path.mkdir()
    assert traced(path, 3) == []
    assert ("the timeline is lost: cannot write" in capsys.readouterr().err) == (WORLD.rank == 0)


@pytest.mark.mpi
def test_error_of_all_ranks_passes_and_is_drawn(tmp_path: Path) -> None:
    path = Path(WORLD.bcast(str(tmp_path))) / "t.json"
    error = NotFiniteError("not finite")
    error.everywhere = True
    with pytest.raises(NotFiniteError, match="not finite"):
        traced(path, 3, error)
    WORLD.Barrier()
    assert len(shown(path)) == WORLD.size
    began = perf_counter()
    with pytest.raises(KeyError):  # of one rank: nobody waits for the others
        traced(path.with_name("u.json"), 3, KeyError())
    assert perf_counter() - began < 5
    assert not path.with_name("u.json").exists()
