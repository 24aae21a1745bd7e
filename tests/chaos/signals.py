"""Signals that ask a job to save and stop, and ranks that are stopped (SIGSTOP), from the first moments on."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.chaos.campaign import Case, Verdict
from tests.chaos.jobs import Ended, Job, kill
from tests.chaos.runs import Lab, newest, result
from tests.conftest import eventually

SETTINGS = "--hidden 32,32,32 --microbatches 12 --batch 256 --log-every 1 --eval-every 0 --save-every 0 --steps 1000000"
LAYOUTS = ((3, 1), (4, 2), (1, 1))
TARGETS = ("mpirun", "rank 0", "last rank", "all ranks")
TIMES = {"1 x": (1, 0.0), "2 x at once": (2, 0.02), "2 x in 1.5 s": (2, 1.5)}
STALL = 3  # --stall-timeout
LIMIT = 20.0  # seconds in which a job is gone: a start counts as stuck after 8
SAVED = 75


@dataclass(frozen=True)
class Signal:
    """Which signal comes to whom, how often, and when: seconds after the start, or after the first step."""

    number: signal.Signals
    target: str
    times: str
    layout: tuple[int, int]
    started: bool
    moment: float

    def __str__(self) -> str:
        times, _, pause = self.times.partition("x")
        since = "the first step" if self.started else "the start"
        what = f"{times}x {self.number.name}{pause} to {self.target}"
        return f"{what} of {self.layout[0]} in {self.layout[1]} stages, {self.moment:.2f} s after {since}"


def cases(lab: Lab, rng: Random) -> Iterator[Case]:
    """All signals to all targets, and stops of single ranks, at random moments; again and again."""
    asks = [
        (number, target, times)
        for number, target, times in itertools.product((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), TARGETS, TIMES)
        if not (number == signal.SIGINT and times == "2 x in 1.5 s")  # a second Ctrl-C does not wait for a save
    ]
    stops = [(signal.SIGSTOP, target, "1 x") for target in ("rank 0", "last rank") for _ in range(8)]
    while True:
        drawn = asks + stops
        rng.shuffle(drawn)
        for number, target, times in drawn:
            started = rng.random() < 0.6
            moment = rng.uniform(0, 0.6)
            layouts = (
                LAYOUTS[:2] if number == signal.SIGSTOP else LAYOUTS
            )  # alone, a rank that is stopped just stays so
            case = Signal(number, target, times, rng.choice(layouts), started, moment)
            yield Case(str(case), lambda path, case=case: trial(path, case))


def trial(path: Path, case: Signal) -> Iterator[Verdict]:
    """Start a job that would run for long, send it what it is to get, and look at how it ends."""
    run, (ranks, stages) = path / "run", case.layout
    settings = [*SETTINGS.split(), "--pipe", stages, "--stall-timeout", STALL, "--out", run]
    with Job(ranks, *settings) as job:
        if case.started and not eventually((run / "metrics.jsonl").exists, LIMIT):
            yield "a long job starts", job.wait(0).last
            return
        time.sleep(case.moment)
        training = (run / "metrics.jsonl").exists()
        targets = send(job, case)
        ended = job.wait(LIMIT)
    if not targets:  # there was no rank yet
        return
    if case.number == signal.SIGSTOP:
        yield from stopped(run, ended, case, training)
    elif training:
        yield "SIGTERM, SIGINT, SIGUSR1 while training: saved, and code 75", unsaved(run, ended)
    else:
        why = ended.hung or ("code 0" if ended.code == 0 else "")
        yield "SIGTERM, SIGINT, SIGUSR1 while starting: the job is gone", why


def send(job: Job, case: Signal) -> list[int]:
    """Send the signals. Returns to whom."""
    ranks = job.ranks()
    targets = {"mpirun": [job.process.pid], "rank 0": ranks[:1], "last rank": ranks[-1:]}.get(case.target, ranks)
    times, pause = TIMES[case.times]
    for i in range(times):
        time.sleep(pause if i else 0)
        for process in targets:
            kill(process, case.number)
    return targets


def unsaved(run: Path, ended: Ended) -> str:
    """What is wrong with a job that was asked to save and stop."""
    outcome = result(run)
    status, step, saved = outcome.get("status"), outcome.get("step", 0), newest(run)
    if ended.hung or ended.code != SAVED or status != "stopped" or not 0 < step == saved:
        return f"{ended.hung} code {ended.code}, {status} in step {step}, newest checkpoint {saved}: {ended.last}"
    return ""


def stopped(run: Path, ended: Ended, case: Signal, training: bool) -> Iterator[Verdict]:
    """Judge a job one of whose ranks has been stopped: who is named must be that one."""
    what = "while training" if training else "while starting"
    yield f"SIGSTOP {what}: the job is gone in {LIMIT:.0f} s", ended.hung or ("code 0" if ended.code == 0 else "")
    if ended.hung:
        return
    rank, said = 0 if case.target == "rank 0" else case.layout[0] - 1, result(run).get("rank")
    if training or said is not None:
        yield f"SIGSTOP {what}: the rank is named", "" if said == rank else f"rank {said} is named: {ended.last}"
