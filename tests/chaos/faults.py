"""Calls on the run directory that fail, one by one: the run ends clearly, and nothing that was saved is lost."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.chaos.campaign import Case, Verdict
from tests.chaos.disk import recorded
from tests.chaos.jobs import Ended, Job
from tests.chaos.runs import (
    COMMON,
    LIMIT,
    Lab,
    Reference,
    damaged,
    newest,
    records_differ,
    result,
    resumed,
    strange,
    weights_differ,
)

SETTINGS = f"{COMMON} --hidden 4 --dropout 0.1 --eval-every 3 --keep 2 --steps"
HALF, STEPS = 5, 8
LOCK = ".lock"
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)
READS = ("open", "list", "read")  # these fail with EIO alone
PLACES = ((0, 0), (2, 0), (2, 1))  # ranks of a job, 0 without a launcher, and the one whose call fails
SAVES = ("sync", "async")
CODES = (65, 73, 74, 78)


@dataclass(frozen=True)
class Fault:
    """Which call fails, of which of all ranks, and how, in a directory that is new or holds half a run."""

    place: tuple[int, int]
    save: str
    resumes: bool
    call: dict[str, Any]
    error: int

    def __str__(self) -> str:
        when, (ranks, rank) = "resumed run" if self.resumes else "first start", self.place
        what = f"call {self.call['call']}, {self.call['kind']} {self.call['path']}"
        return f"{when}, --save {self.save}, {errno.errorcode[self.error]} on rank {rank} of {ranks or 1} at {what}"


def cases(lab: Lab, rng: Random) -> Iterator[Case]:
    """Every call of a run of its own and of one that is resumed, with every error, on one rank and on each of two."""
    half, reference = lab.reference(f"{SETTINGS} {HALF}"), lab.reference(f"{SETTINGS} {STEPS}")
    faults = []
    for resumes in (False, True):
        before = half if resumes else None
        of_rank = [
            recording(lab.path / f"faults-{resumes}-{place[1]}", before, reference, place)
            for place in (PLACES[0], PLACES[2])
        ]
        faults += [
            Fault(place, save, resumes, call, error)
            for place, save in itertools.product(PLACES, SAVES)
            for call in of_rank[place[1]]
            for error in ERRORS
            if error == errno.EIO or call["kind"] not in READS
        ]
    rng.shuffle(faults)
    for fault in faults:
        yield Case(str(fault), lambda path, fault=fault: trial(path, half, reference, fault))


def recording(path: Path, half: Reference | None, reference: Reference, place: tuple[int, int]) -> list[dict[str, Any]]:
    """The calls of a rank of a run without faults."""
    path.mkdir()
    ended, calls = shimmed(path, half, reference, place, SAVES[0], "")
    assert ended.code == 0, f"a run without faults fails: {ended.text}"
    return calls


def shimmed(
    path: Path, half: Reference | None, reference: Reference, place: tuple[int, int], save: str, fail: str
) -> tuple[Ended, list[dict[str, Any]]]:
    """A run of one of whose ranks the calls are recorded, one of which fails."""
    run, record, (ranks, rank) = path / "run", path / "calls", place
    if half:
        shutil.copytree(half.path, run)
    more = {"CHAOS_DIRECTORY": str(run), "CHAOS_RECORD": str(record), "CHAOS_FAIL": fail, "CHAOS_RANK": str(rank)}
    flags = ["--save", save, "--pipe", ranks or 1, "--resume", "--out", run]  # each rank has a part to save
    with Job(ranks, *reference.arguments, *flags, module="tests.chaos.shim", **more) as job:
        return job.wait(LIMIT), recorded(record)


def trial(path: Path, half: Reference, reference: Reference, fault: Fault) -> Iterator[Verdict]:
    """Let a call fail, look at what is left, and go on."""
    run, fail = path / "run", f"{fault.call['call']}:{fault.error}"
    ended, calls = shimmed(path, half if fault.resumes else None, reference, fault.place, fault.save, fail)
    if not any("fails" in call for call in calls):  # with more ranks there may be fewer calls
        return
    yield "a call fails: the run ends clearly", unclear(run, ended, calls, reference)
    before, now = HALF if fault.resumes else 0, newest(run)
    broken = damaged(run)
    lost = f"the newest whole checkpoint is of step {now}" if now < before else ""
    yield "a call fails: checkpoints stay whole", lost or (f"damaged: {', '.join(broken)}" if broken else "")
    if fault.save == SAVES[0]:  # else there may be that of a save that was in flight when one rank failed alone
        yield "a call fails: no half file is left", strange(run, reference)
    again = resumed(run, reference, fault.place[0])
    why = weights_differ(run, again, reference) or records_differ(run, reference)
    yield "a call fails: --resume afterwards gives the same bits, metrics and result", why
    yield "a call fails: no half file is left after --resume", strange(run, reference)


def never_held(calls: list[dict[str, Any]]) -> bool:
    """Whether a call has failed before the directory was this job's, which the calls on .lock make it."""
    failed = next(i for i, call in enumerate(calls) if "fails" in call)
    if calls[failed]["rank"]:  # these begin when it is
        return False
    until_held = itertools.dropwhile(lambda call: call["path"] != LOCK, calls[: failed + 1])
    return all(call["path"] == LOCK for call in until_held)


def unclear(run: Path, ended: Ended, calls: list[dict[str, Any]], reference: Reference) -> str:
    """What is wrong with how a run has ended in which a call failed; it may have gone on in spite of that."""
    outcome = result(run)
    if ended.hung or "Traceback" in ended.text:
        return ended.hung or f"traceback: {ended.last}"
    if ended.code == 0:
        same = outcome.get("weights_sha256") == reference.result["weights_sha256"]
        return "" if same else "goes on, and ends with other weights"
    reason = os.strerror(next(call["fails"] for call in calls if "fails" in call))
    if ended.code not in CODES or reason not in ended.text or str(run) not in ended.text:
        return f"code {ended.code}, {reason!r} and the path expected: {ended.last}"
    if never_held(calls):
        return ""  # what is written there may be another job's
    if outcome.get("status") != "failed" or reason not in str(outcome.get("reason")):
        return f"result.json says {outcome.get('status')}, {outcome.get('reason')}"
    return ""
