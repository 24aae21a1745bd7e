"""Draws trials from the spaces of all parts until time is up, on as many workers as there are cores."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.chaos.others import who_ends_it_first
from tests.chaos.runs import Lab

Verdict = tuple[str, str]  # what was looked at, and in a line what was wrong with it; nothing if all was right


@dataclass(frozen=True)
class Case:
    """A trial in words, and what makes it: in an empty directory, it yields a verdict on each thing it looks at."""

    name: str
    trial: Callable[[Path], Iterable[Verdict]]


Cases = Callable[[Lab, Random], Iterator[Case]]


@dataclass
class Row:
    """How often something was tried, and survived; how often others ended the process first, who cannot be mended."""

    tried: int = 0
    survived: int = 0
    others: int = 0


@dataclass(frozen=True)
class Miss:
    """Something that was not as it should be; `others` says who ended the process first, if anybody did."""

    part: str
    number: int
    case: str
    what: str
    why: str
    others: str

    def __str__(self) -> str:
        return f"{self.part}:{self.number} {self.case}: {self.what}: {self.why}"


@dataclass
class Figures:
    """What came of all trials, by part and by what was looked at."""

    rows: dict[tuple[str, str], Row] = field(default_factory=dict)
    misses: list[Miss] = field(default_factory=list)

    @property
    def own(self) -> list[Miss]:
        """The misses that are this package's."""
        return [miss for miss in self.misses if not miss.others]

    def add(self, part: str, number: int, case: str, what: str, why: str) -> None:
        """Count one verdict."""
        row = self.rows.setdefault((part, what), Row())
        row.tried += 1
        row.survived += not why
        if why:
            self.misses.append(Miss(part, number, case, what, why, who_ends_it_first(part, case, why)))
            row.others += bool(self.misses[-1].others)
            print(f"MISS {self.misses[-1]}", flush=True)


def space(part: str, cases: Cases, lab: Lab, seed: int) -> Iterator[tuple[int, Case]]:
    """The numbered trials of a part in the order of a seed."""
    return enumerate(cases(lab, Random(f"{seed} {part}")))


def run(part: str, drawn: Iterator[tuple[int, Case]], figures: Figures, scratch: Path, seconds: float) -> None:
    """Try case after case until there is none left or time is up; what has begun then is brought to its end."""
    end, lock = time.monotonic() + seconds, threading.Lock()
    failures: list[BaseException] = []

    def draw() -> tuple[int, Case] | None:
        with lock:
            return next(drawn, None) if time.monotonic() < end and not failures else None

    def work() -> None:
        try:
            while (numbered := draw()) is not None:
                number, case = numbered
                for what, why in _tried(case, scratch / f"{part}-{number}"):
                    with lock:
                        figures.add(part, number, case.name, what, why)
        except BaseException as error:  # of the campaign itself, in drawing a case
            failures.append(error)

    workers = [threading.Thread(target=work, name=f"worker {i}") for i in range(len(os.sched_getaffinity(0)))]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    except BaseException as error:  # asked to stop: trials that have begun end their jobs
        failures.append(error)
        for worker in workers:
            worker.join()
    if failures:
        raise failures[0]


def _tried(case: Case, path: Path) -> list[Verdict]:
    path.mkdir(parents=True)
    verdicts: list[Verdict] = []
    try:
        verdicts.extend(case.trial(path))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        verdicts.append(
            ("trials that could be judged", f"{type(error).__name__}: {error} ({where.name}:{where.lineno})")
        )
    finally:
        shutil.rmtree(path, ignore_errors=True)
    return verdicts


def only(drawn: Iterator[tuple[int, Case]], number: int) -> Iterator[tuple[int, Case]]:
    """One trial of a part, by its number in the order of the seed."""
    return itertools.islice(drawn, number, number + 1)
