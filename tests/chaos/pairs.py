"""Two and three jobs that want one directory at once: one gets it, and none does harm."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.chaos.campaign import Case, Verdict
from tests.chaos.jobs import Ended, Job
from tests.chaos.runs import COMMON, LIMIT, Lab, Reference, records_differ, result, strange, weights_differ
from tests.conftest import eventually

SETTINGS = f"{COMMON} --hidden 8 --dropout 0.1 --steps 40"
KINDS = ("new", "new", "resumed", "resumed", "lock removed", "without --out")
REFUSED = 73


@dataclass(frozen=True)
class Together:
    """Jobs by their ranks, and when each starts after the one before."""

    kind: str
    ranks: tuple[int, ...]
    pauses: tuple[float, ...]

    def __str__(self) -> str:
        when = ", ".join(
            f"{ranks} ranks after {pause:.2f} s" for ranks, pause in zip(self.ranks, self.pauses, strict=True)
        )
        return f"{self.kind}: {when}"


def cases(lab: Lab, rng: Random) -> Iterator[Case]:
    """Without end: two or three jobs of one or two ranks."""
    reference = lab.reference(SETTINGS)
    for _ in itertools.count():
        count = rng.choice((2, 2, 3))
        ranks = tuple(rng.choice((1, 2)) for _ in range(count))
        pauses = (0.0, *(rng.choice((0.0, rng.uniform(0, 0.6))) for _ in range(count - 1)))
        case = Together(rng.choice(KINDS), ranks, pauses)
        trial = apart if case.kind == "without --out" else at_once
        yield Case(str(case), lambda path, case=case, trial=trial: trial(path, reference, case))


def at_once(path: Path, reference: Reference, case: Together) -> Iterator[Verdict]:
    """Jobs on one --out."""
    run = path / "run"
    more = [] if case.kind == "new" else ["--resume"]
    with contextlib.ExitStack() as stack:
        jobs = []
        for ranks, pause in zip(case.ranks, case.pauses, strict=True):
            time.sleep(pause)
            if case.kind == "lock removed" and jobs:
                eventually(lambda: (run / "metrics.jsonl").exists() or jobs[0].process.poll() is not None, LIMIT)
                (run / ".lock").unlink(missing_ok=True)
            jobs.append(stack.enter_context(Job(ranks, *reference.arguments, *more, "--out", run)))
        ends = [job.wait(LIMIT) for job in jobs]
    what = "two or three jobs on one --out"
    what += ", .lock removed" if case.kind == "lock removed" else ""
    yield f"{what}: one wins, the others 73", unfair(ends, all_may_win=bool(more))
    winner = next((ended for ended in ends if ended.code == 0), ends[0])
    why = weights_differ(run, winner, reference) or records_differ(run, reference) or strange(run, reference)
    yield f"{what}: weights, metrics and result right, no half file", why


def unfair(ends: list[Ended], all_may_win: bool) -> str:
    """What is wrong with how jobs on one directory have ended; one that starts late may find the run done."""
    winners = [ended for ended in ends if ended.code == 0]
    good = winners and all(ended.code in (0, REFUSED) and not ended.hung for ended in ends)
    if good and (all_may_win or len(winners) == 1) and not any("Traceback" in ended.text for ended in ends):
        return ""
    return "; ".join(f"code {ended.code} {ended.hung} {ended.last}" for ended in ends)


def apart(path: Path, reference: Reference, case: Together) -> Iterator[Verdict]:
    """Jobs without --out in one directory: each makes a directory of its own."""
    with contextlib.ExitStack() as stack:
        jobs = []
        for ranks, pause in zip(case.ranks, case.pauses, strict=True):
            time.sleep(pause)
            jobs.append(stack.enter_context(Job(ranks, *reference.arguments, cwd=path)))
        ends = [job.wait(LIMIT) for job in jobs]
    runs = sorted((path / "runs").iterdir())
    digests = {result(run).get("weights_sha256") for run in runs}
    right = len(runs) == len(ends) and digests == {reference.result["weights_sha256"]}
    why = "" if right else f"{len(runs)} directories, codes {[ended.code for ended in ends]}: {ends[0].last}"
    yield "two or three jobs without --out: a directory each, and the right weights", why
