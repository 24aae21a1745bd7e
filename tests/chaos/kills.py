"""Kills without notice, at random moments from the start of the job on; then the run goes on, on another layout.

Runs of workers are also asked to stop, which they do within a round.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.chaos.campaign import Case, Verdict
from tests.chaos.jobs import Job, kill
from tests.chaos.runs import COMMON, Lab, Reference, newest, records_differ, resumed, strange, weights_differ

SETTINGS = f"{COMMON} --hidden 32,32,32 --dropout 0.1 --keep-best 1 --steps 60"
SAVES = ("sync", "async", "async")  # --save; the second kind mostly
SAVE_EVERY = (1, 2, 3)
WORKERS = (
    f"{SETTINGS} --workers 4 --average-every 9 --average-from 10 --outer-lr 0.7 --outer-momentum 0.9 --ema 0.9 "
    "--stop-grace 0"
)
LAYOUTS = ((1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (4, 2), (4, 4), (3, 3))  # ranks and stages
VICTIMS = ("one rank", "one rank", "two ranks", "all ranks", "mpirun")
ASKED = "one rank by SIGUSR1"
LIMIT = 15.0  # seconds in which a job is gone


@dataclass(frozen=True)
class Kill:
    """Who is killed on which layout, how many seconds after the start, and how the job saves."""

    layout: tuple[int, int]
    victim: str
    moment: float
    save: str
    every: int

    def __str__(self) -> str:
        where = f"{self.layout[0]} in {self.layout[1]} stages"
        return f"{self.what} of {where} after {self.moment:.2f} s, --save {self.save} every {self.every}"

    @property
    def what(self) -> str:
        """What is done to whom."""
        return f"stop of {self.victim}" if self.victim == ASKED else f"kill -9 of {self.victim}"


def cases(lab: Lab, rng: Random) -> Iterator[Case]:
    """Without end: one to three kills, and the layout on which the run is brought to its end."""
    return _cases(lab.reference(SETTINGS), VICTIMS, rng)


def of_workers(lab: Lab, rng: Random) -> Iterator[Case]:
    """The same of a run whose workers learn apart from step 10 on."""
    return _cases(lab.reference(WORKERS), (*VICTIMS, ASKED, ASKED, ASKED), rng)


def _cases(reference: Reference, victims: Sequence[str], rng: Random) -> Iterator[Case]:
    for _ in itertools.count():
        drawn = random_kills(rng, reference.seconds, victims)
        last, pick = rng.choice(LAYOUTS), rng.random()
        name = f"{', '.join(map(str, drawn))}, then {last[0]} ranks in {last[1]} stages"
        yield Case(name, lambda path, drawn=drawn, last=last, pick=pick: trial(path, reference, drawn, last, pick))


def random_kills(rng: Random, seconds: float, victims: Sequence[str]) -> list[Kill]:
    """One to three kills within the time that a run takes."""
    moments = [rng.uniform(0.02, 1.1 * seconds + 0.3) for _ in range(rng.choice((1, 1, 2, 3)))]
    return [
        Kill(rng.choice(LAYOUTS), rng.choice(victims), moment, rng.choice(SAVES), rng.choice(SAVE_EVERY))
        for moment in moments
    ]


def trial(path: Path, reference: Reference, kills: list[Kill], last: tuple[int, int], pick: float) -> Iterator[Verdict]:
    """Kill and go on again and again; `pick` in [0, 1) says which ranks are killed."""
    run, before = path / "run", 0
    for stroke in kills:
        ranks, stages = stroke.layout
        flags = ["--pipe", stages, "--save", stroke.save, "--save-every", stroke.every, "--resume", "--out", run]
        with Job(ranks, *reference.arguments, *flags) as job:
            time.sleep(stroke.moment)
            hit = strike(job, stroke.victim, pick)
            ended = job.wait(LIMIT)
        if hit:
            yield f"{stroke.what}: the job is gone in {LIMIT:.0f} s", ended.hung
        after = newest(run)
        yield "the newest whole checkpoint never goes back", f"{before}, then {after}" if after < before else ""
        before = after
    ended = resumed(run, reference, last[0], "--pipe", last[1])
    why = weights_differ(run, ended, reference) or records_differ(run, reference)
    yield "resumed on another layout: weights, metrics and result of the undisturbed run", why
    yield "resumed on another layout: no half file is left", strange(run, reference)


def strike(job: Job, victim: str, pick: float) -> bool:
    """Kill without notice, or ask to stop. Returns whether there was anybody to kill."""
    if victim == "mpirun":
        processes = [job.process.pid] if job.process.poll() is None else []
    else:
        ranks = job.ranks()
        count = {"one rank": 1, ASKED: 1, "two ranks": 2}.get(victim, len(ranks))
        first = int(pick * len(ranks))
        processes = (ranks[first:] + ranks[:first])[:count]
    for process in processes:
        kill(process, signal.SIGUSR1 if victim == ASKED else signal.SIGKILL)
    return bool(processes)
