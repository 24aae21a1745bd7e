"""The timeline of a real job: every rank's, in order, whole, and of no effect on what is computed."""

from __future__ import annotations

import gzip
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Job, launch

pytestmark = pytest.mark.contract

STEPS, MICROBATCHES = 6, 6
FLAGS = f"--steps {STEPS} --microbatches {MICROBATCHES} --hidden 64,64 --log-every 2 --eval-every 3 --save-every 4"
TICK = 0.002  # microseconds: what rounding does to a time of some seconds
NAMES = {"start", "joining", "data", "model", "forward", "loss", "backward", "send", "accumulate", "waiting", "compute"}
NAMES |= {"communication", "update", "evaluation", "checkpoint", "log", "step"}


def read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The spans of each track by its name, in the order of the file."""
    content = json.loads(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_text())
    names, order = {}, {}
    for event in content["traceEvents"]:
        if event["name"] == "thread_name":
            names[event["tid"]] = event["args"]["name"]
        if event["name"] == "thread_sort_index":
            order[event["tid"]] = event["args"]["sort_index"]
    tracks: dict[str, list[dict[str, Any]]] = {names[tid]: [] for tid in sorted(order, key=order.__getitem__)}
    for event in content["traceEvents"]:
        if event["ph"] == "X":
            tracks[names[event["tid"]]].append(event)
    return tracks


def kind(span: dict[str, Any]) -> str:
    return re.sub(r" \d+$", "", span["name"])


def of_training(spans: list[dict[str, Any]], name: str) -> dict[tuple[int, int], dict[str, Any]]:
    """The spans of a part of computing by step and micro-batch, those of evaluations left out."""
    tests = [(span["ts"], span["ts"] + span["dur"]) for span in spans if span["name"] == "evaluation"]
    found = [s for s in spans if kind(s) == name and not any(begin <= s["ts"] < end for begin, end in tests)]
    by_place = {(span["args"]["step"], span["args"]["micro-batch"]): span for span in found}
    assert len(by_place) == len(found)
    return by_place


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Two nodes, as far as the clocks are concerned."""
    run = tmp_path_factory.mktemp("traced") / "run"
    flags = ["--out", str(run), "--pipe", "2", *FLAGS.split(), "--trace", str(run / "trace.json")]
    done = launch(4, "-m", "mpiml.train", *flags, MPIML_NODES="2,2")
    assert done.returncode == 0, done.stderr
    return Job(done.returncode, done.stdout, done.stderr, run)


@pytest.fixture(scope="module")
def tracks(traced: Job) -> dict[str, list[dict[str, Any]]]:
    return read(traced.run / "trace.json")


def test_every_rank_has_a_track(traced: Job, tracks: dict[str, list[dict[str, Any]]]) -> None:
    assert list(tracks) == [f"rank {rank}: stage {rank // 2}, replica {rank % 2}" for rank in range(4)]
    assert all(tracks.values())
    assert {kind(span) for spans in tracks.values() for span in spans} == NAMES
    assert f"timeline: {traced.run / 'trace.json'}\n" in traced.out


def test_spans_nest_and_leave_no_gap(tracks: dict[str, list[dict[str, Any]]]) -> None:
    for spans in tracks.values():
        ends: list[float] = []
        filled = 0.0
        for span in spans:  # outer ones come first
            while ends and span["ts"] >= ends[-1] - TICK:
                ends.pop()
            end = span["ts"] + span["dur"]
            assert span["dur"] > 0
            assert all(end <= outer + TICK for outer in ends), span
            filled += span["dur"] if len(ends) == 1 else 0.0
            ends.append(end)
        last = spans[-1]["ts"] + spans[-1]["dur"]
        assert filled == pytest.approx(last - spans[0]["ts"], abs=1)
        outer = [span for span in spans if kind(span) == "step"]
        assert [span["name"] for span in outer] == [f"step {step}" for step in range(1, STEPS + 1)]
        for before, after in itertools.pairwise(outer):
            assert after["ts"] == pytest.approx(before["ts"] + before["dur"], abs=TICK)


def test_all_passes_are_there_once(tracks: dict[str, list[dict[str, Any]]]) -> None:
    for name, spans in tracks.items():
        replica, last = int(name[-1]), "stage 1" in name
        places = set(itertools.product(range(1, STEPS + 1), range(3 * replica, 3 * replica + 3)))
        for part in ("forward", "backward", "accumulate", "send", *(["loss"] if last else [])):
            assert set(of_training(spans, part)) == places, (name, part)
        assert Counter(map(kind, spans))["evaluation"] == 2


def test_messages_go_forward_in_time(tracks: dict[str, list[dict[str, Any]]]) -> None:
    """Which they do only if the clocks are aligned. They go one way, then the other, in each of many steps."""
    slack = 200.0  # microseconds
    for replica in range(2):
        first, second = (tracks[f"rank {2 * stage + replica}: stage {stage}, replica {replica}"] for stage in (0, 1))
        for place, span in of_training(second, "forward").items():
            before = of_training(first, "forward")[place]
            assert before["ts"] + before["dur"] <= span["ts"] + slack
        for place, span in of_training(first, "backward").items():
            before = of_training(second, "backward")[place]
            assert before["ts"] + before["dur"] <= span["ts"] + slack


def test_bits_do_not_depend_on_it_and_no_file_comes_unasked(traced: Job, train: Any, tmp_path: Path) -> None:
    plain = train(0, FLAGS)
    assert plain.result["weights_sha256"] == traced.result["weights_sha256"]
    assert "timeline" not in plain.out
    assert not list(tmp_path.rglob("*trace*"))
    assert "trace" not in (traced.run / "config.toml").read_text()


def test_file_that_cannot_be_written_is_refused_at_once(train_all: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    paths = [tmp_path / place for place in ("", "file/trace.json", "/proc/none/trace.json")]
    jobs = train_all(2, *(f"--steps 3 --data none.npz --trace {path}" for path in paths))
    for job, path in zip(jobs, paths, strict=True):
        assert job.code == 74
        assert f"cannot write {path}" in job.err
        assert len(job.err.strip().splitlines()) == 1
        assert not job.run.exists()


def test_file_of_the_run_is_refused_at_once(train: Any, tmp_path: Path) -> None:
    job = train(0, f"--steps 3 --trace {tmp_path / 'run' / 'config.toml'}")
    assert (job.code, job.err.count("\n")) == (78, 1)
    assert not list(tmp_path.iterdir())


def test_run_that_is_stopped_or_fails_on_all_ranks_has_one_too(train: Any, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "trace.json.gz"
    job = train(2, f"--optimizer sgd --lr 1e30 --steps 50 --trace {path}")
    assert job.code == 70
    assert read(path)["rank 1: stage 0, replica 1"][-1]["ts"] > 0
    script = str(Path(__file__).with_name("trouble.py"))
    done = launch(2, script, "1", "data", "term", "--out", str(tmp_path / "r"), "--steps", "50", "--trace", str(path))
    assert done.returncode == 75, done.stderr
    steps = [kind(span) for span in read(path)["rank 0: stage 0, replica 0"]].count("step")
    assert steps == json.loads((tmp_path / "r" / "result.json").read_text())["step"] < 50
