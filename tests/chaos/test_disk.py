"""The model of a disk: what a crash may leave, of calls as tests.chaos.shim records them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.disk import Disk, Tree, build, recorded
from tests.chaos.jobs import ROOT
from tests.chaos.power import crashes

SCRIPT = """
import io, os, sys
from pathlib import Path
from tests.chaos import shim
directory, record = sys.argv[1:3]
shim.SHIM = shim.Shim(directory, record, sys.argv[3] if len(sys.argv) > 3 else "")
shim.SHIM.install()
run = Path(directory)
run.mkdir()
(run / "part").mkdir()
(run / "part" / "text").write_text("one\\ntwo\\n")
with open(run / "part" / "text", "a") as file:
    file.write("three\\n")
    file.flush()
    os.fsync(file.fileno())
with open(run / "part" / "bytes", "w+b") as file:
    file.write(b"0123456789")
    file.seek(2)
    file.write(b"xy")
    file.truncate(6)
os.replace(run / "part" / "bytes", run / "whole")
(run / "part" / "gone").write_bytes(b"x")
(run / "part" / "gone").unlink()
"""


def call(kind: str, path: str, **more: Any) -> dict[str, Any]:
    if kind == "write":
        more = {"at": 0, **more, "data": more["data"].hex()}
    return {"call": 1, "rank": 0, "kind": kind, "path": path, "truncates": True, **more}


def disk(*calls: dict[str, Any]) -> Disk:
    model = Disk()
    for each in calls:
        model.follow(each)
    return model


def states(*calls: dict[str, Any], journal: bool) -> list[Tree]:
    model = disk(call("mkdir", "."), *calls)
    return [state for state in model.after_power_failure(journal) if "." in state]


UNSYNCED = (call("create", "new"), call("write", "new", data=b"abcd"), call("rename", "new", to="name"))
SYNCED = (*UNSYNCED[:2], call("sync", "new"), UNSYNCED[2])


def test_file_that_was_renamed_without_a_sync_may_be_empty_torn_or_zeros() -> None:
    contents = {state["name"] for state in states(*UNSYNCED, journal=True) if "name" in state}
    assert contents == {b"", b"ab", b"abcd", b"ab\0\0", b"\0\0\0\0"}


def test_file_that_was_synced_before_it_was_renamed_is_whole_under_either_name() -> None:
    assert {state.get("name", state.get("new")) for state in states(*SYNCED, journal=True)} == {b"abcd"}


def test_name_is_safe_when_its_directory_is_synced() -> None:
    assert any("name" not in state for state in states(*SYNCED, journal=False))
    assert all(state["name"] == b"abcd" for state in states(*SYNCED, call("sync", "."), journal=False))


def test_sync_brings_to_the_disk_what_the_same_rank_has_written() -> None:
    model = disk(call("create", "new"), call("truncate", "new", size=9), call("write", "new", data=b"abcd"))
    model.follow(call("write", "new", at=4, data=b"efgh") | {"rank": 1})
    model.follow(call("sync", "new") | {"rank": 1})
    assert model.files[0].safe == bytes(4) + b"efgh"
    model.follow(call("sync", "new"))
    assert model.files[0].safe == model.files[0].content == b"abcdefgh\0"


def test_journal_keeps_the_order_of_names() -> None:
    calls = [call("create", "first"), call("create", "second")]
    assert {"second"} in [set(state) - {"."} for state in states(*calls, journal=False)]
    assert {"second"} not in [set(state) - {"."} for state in states(*calls, journal=True)]


def test_kill_leaves_all_that_was_written_and_a_part_of_the_last_write() -> None:
    model = disk(call("mkdir", "."), *UNSYNCED[:2])
    assert model.now() == {".": None, "new": b"abcd"}
    assert [tree["new"] for tree in model.within(call("write", "new", at=4, data=b"efgh"))] == [
        *(b"abcde", b"abcdef", b"abcdefg")
    ]


def test_states_of_a_crash_are_those_after_each_call_and_within_it() -> None:
    path = "checkpoints/step-000000002.safetensors"
    calls = [call("mkdir", "."), call("mkdir", "checkpoints"), call("create", path), call("write", path, data=b"abcd")]
    killed = [state for state in crashes(calls) if state.kind.startswith("killed")]
    assert [state.tree.get(path) for state in killed] == [None, None, None, b"", b"a", b"ab", b"abc", b"abcd"]
    assert [state.checkpoint for state in killed] == [0, 0, 0, 0, 0, 0, 0, 2]


def test_record_of_calls_gives_the_directory_that_they_made(tmp_path: Path) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    subprocess.run([sys.executable, "-c", SCRIPT, run, tmp_path / "record"], cwd=ROOT, check=True)
    tree = disk(*recorded(tmp_path / "record")).now()
    build(tree, again)
    assert tree == {".": None, "part": None, "part/text": b"one\ntwo\nthree\n", "whole": b"01xy45"}
    assert {path.relative_to(run) for path in run.rglob("*")} == {p.relative_to(again) for p in again.rglob("*")}
    assert (run / "whole").read_bytes() == b"01xy45"


@pytest.mark.parametrize(("number", "kind"), [(1, "mkdir"), (4, "write"), (8, "sync"), (15, "rename")])
def test_call_fails_that_is_to_fail(tmp_path: Path, number: int, kind: str) -> None:
    command = [sys.executable, "-c", SCRIPT, tmp_path / "run", tmp_path / "record", f"{number}:28"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert os.strerror(28) in done.stderr
    assert [(each["call"], each["kind"]) for each in recorded(tmp_path / "record") if "fails" in each] == [
        (number, kind)
    ]
