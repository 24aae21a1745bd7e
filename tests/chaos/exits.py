"""Every phase of a job x every way out of it x first and last rank: the job ends in time and says why."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from mpiml.run import verified
from tests.chaos.campaign import Case, Verdict
from tests.chaos.jobs import Ended, Job
from tests.chaos.runs import Lab, checkpoints, result

PHASES = (
    *("import", "data", "model", "transform", "forward", "loss", "backward", "metric", "evaluation", "checkpoint"),
    *("write", "last step", "atexit"),
)
SEEN = ("raise", "sys.exit(0)", "sys.exit(3)", "endless loop", "SIGSTOP")  # somebody is left to say what happened
UNSEEN = ("os._exit(0)", "os._exit(5)", "SIGKILL", "SIGSEGV")
LATE = ("endless loop", "SIGSTOP", "SIGKILL", "SIGSEGV")  # make a job fail also when the run is done
RANKS, LIMIT = 3, 15.0
OWN_PHASES = ("before", "first", "loop", "put", "alive", "save", "write", "last")  # of a loop of one's own
BY_ONE = ("write", "save")  # what only the last rank does in a loop of one's own
OWN_SAVED = {"before": 0, "first": 0, "last": 7}  # the last step that has been saved then, in others at least 2
USER = "tests.chaos.trouble"
SETTINGS = (
    f"--model {USER}:model --data {USER}:load --transform {USER}:transform --loss {USER}:loss --metric {USER}:metric "
    "--microbatches 12 --batch 256 --steps 8 --log-every 1 --eval-every 4 --eval-rows 32 --save-every 2 "
    "--stall-timeout 4"
)
WORD = "trouble of a user's own"


def cases(lab: Lab, rng: Random) -> Iterator[Case]:
    """The whole matrix."""
    matrix = list(itertools.product(PHASES, SEEN + UNSEEN, (0, RANKS - 1)))
    rng.shuffle(matrix)
    for phase, way, rank in matrix:
        name = f"{way} in phase {phase} of rank {rank} of {RANKS}"
        yield Case(name, lambda path, cell=(phase, way, rank): trial(path, *cell))


def own_cases(lab: Lab, rng: Random) -> Iterator[Case]:
    """The whole matrix of a loop of one's own, in which a block that is `alive` may take for ever."""
    matrix = [
        (phase, way, rank)
        for phase, way, rank in itertools.product(OWN_PHASES, SEEN + UNSEEN, (0, RANKS - 1))
        if not (phase in BY_ONE and rank == 0) and (phase, way) != ("alive", "endless loop")
    ]
    rng.shuffle(matrix)
    for phase, way, rank in matrix:
        name = f"{way} in phase {phase} of rank {rank} of {RANKS}"
        yield Case(name, lambda path, cell=(phase, way, rank): own_trial(path, *cell))


def own_trial(path: Path, phase: str, way: str, rank: int) -> Iterator[Verdict]:
    """A loop of one's own in which one rank leaves."""
    run = path / "run"
    with Job(RANKS, run, rank, phase, way, module="tests.contract.own_loop") as job:
        ended = job.wait(LIMIT)
    why = lasting(ended, phase, way)
    if not why and way in SEEN and phase != "before":
        why = unsaid(ended, result(run), way, rank)
    yield f"own loop, phase {phase}: gone in {LIMIT:.0f} s, not with code 0, reason and rank in writing", why
    files = checkpoints(run)
    for file in files.values():
        verified.read(file, lambda name: True, keep=False)
    least, saved = OWN_SAVED.get(phase, 2), max(files, default=0)
    yield "own loop: what has been saved stays, and is whole", "" if saved >= least else f"step {saved}, not {least}"


def trial(path: Path, phase: str, way: str, rank: int) -> Iterator[Verdict]:
    """A job in which one rank leaves."""
    run = path / "run"
    with Job(RANKS, *SETTINGS.split(), "--out", run, CHAOS_TROUBLE=f"{phase}:{way}:{rank}") as job:
        ended = job.wait(LIMIT)
    why = lasting(ended, phase, way)
    if not why and way in SEEN and phase != "atexit":
        why = unsaid(ended, result(run), way, rank)
    yield f"ways out in phase {phase}: gone in {LIMIT:.0f} s, not with code 0, reason and rank in writing", why


def lasting(ended: Ended, phase: str, way: str) -> str:
    """What is wrong with the end of a job by itself."""
    if ended.hung:
        return ended.hung
    return "exit code 0" if ended.code == 0 and (phase != "atexit" or way in LATE) else ""


def unsaid(ended: Ended, outcome: dict[str, Any], way: str, rank: int) -> str:
    """What is wrong with what is left in writing: in result.json if there is one, else on standard error."""
    if way == "raise" and WORD not in ended.text:
        return f"no traceback: {ended.last}"
    if outcome and (outcome.get("status"), outcome.get("rank")) != ("failed", rank):
        said = {key: outcome.get(key) for key in ("status", "rank", "reason")}
        return f"result.json says {said}"
    return "" if outcome or f"rank {rank}" in ended.text else f"not a word of the rank: {ended.last}"
