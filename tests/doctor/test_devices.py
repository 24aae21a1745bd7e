"""The doctor on devices: what it makes of facts, and that it finds them on real ranks, with pretended devices."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from mpiml.doctor.devices import Devices, RankDevice, _Examination
from mpiml.doctor.judge_devices import judge_devices
from tests.conftest import launch
from tests.doctor.test_judge import facts, not_ok

GOOD = RankDevice(0, "H100", free=79 << 30, total=80 << 30, locked=True, put=25e9, fetch=26e9)


def judged(*changes: dict[str, Any], nodes: int = 1, kind: str = "cuda", refused: str = "") -> Any:
    """The findings on a job of which each rank has a good device, but for its changes."""
    of_ranks = [dataclasses.replace(GOOD, **({"number": rank} | change)) for rank, change in enumerate(changes)]
    return judge_devices(facts(len(changes), nodes, devices=Devices(kind, of_ranks, refused)))


def test_nobody_has_asked() -> None:
    assert judge_devices(facts(4)) == []


def test_nothing_wrong() -> None:
    findings = judged({}, {}, {"number": 0}, {"number": 1}, nodes=2)
    assert [(f.verdict, f.name) for f in findings] == [("ok", n) for n in ("devices n0", "devices n1", "transfers")]
    assert findings[0].value == "rank 0 has device 0, 1 has 1 (H100, one each), 79.0 GiB of 80.0 GiB free"
    assert findings[1].value.startswith("rank 2 has device 0, 3 has 1 ")
    assert findings[2].value == "25.0 GB/s to a device, 26.0 back, for each rank when all transfer"


def test_many_ranks_and_nodes_are_a_few_short_lines() -> None:
    assert all(len(f.value) < 160 for f in judged(*[{"ranks": 64, "number": 0}] * 64))
    assert len(judged(*[{}] * 64, nodes=32)) == 8 + 1 + 1


def test_ranks_that_share_a_device() -> None:
    shared = {"ranks": 2, "put": 3e9, "fetch": 3e9, "free": 78 << 30}  # two contexts; together 6 GB/s
    findings = judged(*[{"number": rank % 2, **shared} for rank in range(4)])
    assert not_ok(findings) == {}
    assert "rank 0 has device 0, 1 has 1, 2 has 0, 3 has 1 (H100, 2 ranks share one)" in findings[0].value
    finding, *_ = judged(*[{"number": rank % 2, **shared} for rank in range(4)], refused="4 ranks for 2 devices")
    assert (finding.verdict, finding.value, finding.advice) == (
        "problem",
        "4 ranks, 2 devices",
        "4 ranks for 2 devices",
    )


def test_no_devices_and_devices_of_some() -> None:
    (finding,) = judged(*[{"problem": "no driver"}] * 4, refused="--device cuda: no driver")
    assert (finding.verdict, finding.value, finding.advice) == ("problem", "none", "--device cuda: no driver")
    (finding,) = judged({}, {}, {}, {"problem": "it is in use"})
    assert (finding.verdict, finding.value) == ("problem", "on 3 of 4 ranks only")
    assert finding.advice == "rank 3 (n0): it is in use"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"locked": False, "put": 3e9}, "cannot be locked for rank 1 (n0), which makes transfers slow: ulimit -l"),
        ({"put": 12e9}, "slower than the others, which wait: rank 1 (n0)"),
        ({"fetch": 12e9}, "slower than the others, which wait: rank 1 (n0)"),
        ({"fetch": 4e9}, "less than 5 GB/s: rank 1 (n0): bind ranks to the cores next to their GPUs"),
    ],
)
def test_slow_transfers(change: dict[str, Any], named: str) -> None:
    verdict, advice = not_ok(judged({}, change, {}, {}))["transfers"]
    assert (verdict, named in advice) == ("note", True), advice


def test_a_pretended_device_may_be_slow() -> None:
    assert not_ok(judged(*[{"put": 1e9, "fetch": 1e9}] * 2, kind="fake")) == {}


def test_somebody_else_uses_a_device() -> None:
    verdict, advice = not_ok(judged({}, {"free": 50 << 30}))["devices n0"]
    assert (verdict, "30.0 GiB of device 1: nvidia-smi" in advice) == ("note", True)


def test_what_is_timed_is_a_vector_there_and_back_that_leaves_others_their_memory() -> None:
    pytest.importorskip("torch")
    from mpiml.devices.fake import Fake

    moved = set[tuple[str, int]]()

    class Watched(Fake):
        def put(self, source: Any, target: Any) -> None:
            moved.add(("put", source.nbytes))
            super().put(source, target)

        def fetch(self, source: Any, target: Any) -> None:
            moved.add(("fetch", target.nbytes))
            super().fetch(source, target)

    own = RankDevice(0, "a:64", ranks=2)
    examination = _Examination(own, lambda: Watched(0, "a:64", alone=False))
    examination.open()
    examination.look()
    examination.prepare()
    examination.put()
    assert moved == {("put", 8_000_000)}  # of 64 MB a quarter for both
    examination.fetch()
    assert moved == {("put", 8_000_000), ("fetch", 8_000_000)}
    examination.close()


@pytest.mark.contract
def test_on_real_ranks() -> None:
    """What is refused is measured all the same."""
    pytest.importorskip("torch")
    unlike_others = {"MPIML_FAKE_DEVICES": "a:64", "MPIML_FAKE_UNLOCKED": "1"}
    done = launch(2, "-m", "mpiml.doctor", "--device", "fake", "--json", **unlike_others)
    assert done.returncode == 1, done.stderr
    content = json.loads(done.stdout)
    devices = content["facts"]["devices"]
    assert "2 ranks for 1 device, so ranks 0 and 1 would use the same" in devices["refused"]
    of_ranks = devices["of_ranks"]
    assert [(one["number"], one["name"], one["ranks"]) for one in of_ranks] == [(0, "a:64", 2)] * 2
    assert all(one["put"] > 1e7 and one["fetch"] > 1e7 for one in of_ranks)
    assert all(one["free"] == one["total"] == 64e6 for one in of_ranks)
    verdicts = {line["name"].split()[0]: line["verdict"] for line in content["findings"] if "device" in line["value"]}
    assert verdicts == {"devices": "ok", "transfers": "note"}  # of the node; it cannot lock memory
    assert not any(one["locked"] for one in of_ranks)


# Rank 0 has a device with memory, rank 1 one of the kind in the command line.
APART = """
import os, runpy, sys
rank = os.environ.get("PMI_RANK") or os.environ["OMPI_COMM_WORLD_RANK"]
os.environ["MPIML_FAKE_DEVICES"] = "a" if rank == "0" else sys.argv[1]
sys.argv = ["doctor", "--device", "fake"]
runpy.run_module("mpiml.doctor", run_name="__main__")
"""


@pytest.mark.contract
@pytest.mark.parametrize(("other", "named"), [("", "are none (rank 1 on "), ("a:0", "a (rank 0), a:0 (rank 1)")])
def test_a_rank_that_fails_alone_is_named_and_nobody_waits(other: str, named: str) -> None:
    pytest.importorskip("torch")
    done = launch(2, "-c", APART, other)
    assert done.returncode == 1, done.stderr
    assert "devices     on 1 of 2 ranks only" in done.stdout
    assert named in done.stdout


@pytest.mark.contract
@pytest.mark.parametrize(("flags", "named"), [(["--device", "gpu"], "'cuda'"), (["--share-devices"], "--device cuda")])
def test_bad_flags_are_refused_once(flags: list[str], named: str) -> None:
    done = launch(1, "-m", "mpiml.doctor", *flags)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (78, "", 1), done.stderr
    assert named in done.stderr
