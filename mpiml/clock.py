"""What this rank is doing at the moment, and how long it has spent on what."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Literal, get_args

# What a rank can be doing. data, model: reading the one and building the other, with the user's functions for them.
# waiting: for a neighbouring stage. communication: the step record, and what the computing did not hide of the exchange
# of gradients and values. update: adding up gradients and optimizing, in pieces. joining: waiting outside the steps.
Activity = Literal[
    "start",
    "data",
    "model",
    "compute",
    "waiting",
    "communication",
    "update",
    "evaluation",
    "checkpoint",
    "log",
    "joining",
]
ACTIVITIES: tuple[Activity, ...] = get_args(Activity)
# In each of these a rank may rightly stand still for as long as another rank is busy.
BLOCKED_ON_OTHERS: frozenset[Activity] = frozenset({"waiting", "communication", "joining"})
SHARES: tuple[Activity, ...] = ("compute", "waiting", "communication", "update", "data")


def unwatched() -> None:
    """In place of `Clock.progress` for work that no watch looks at."""


class Clock:
    """Seconds per activity. Call it with one of ACTIVITIES whenever that activity begins."""

    def __init__(self) -> None:
        self.activity: Activity = "start"
        self.within: Activity | None = None  # while set, time is booked under this name, whatever the activity
        self.step = 0
        self.moves = 0  # grows with every call and by progress(): a rank whose moves stand still is stuck
        self.seconds: dict[str, float] = {}
        self._since = perf_counter()

    def __call__(self, activity: Activity) -> None:
        now = perf_counter()
        name = self.within or self.activity
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now
        self.activity = activity
        self.moves += 1

    def progress(self) -> None:
        """Say that long work goes on, whatever the activity."""
        self.moves += 1

    def mark(self, part: str, microbatch: int) -> None:
        """Say which part of the computing of a micro-batch begins: for whoever draws it (mpiml.run.trace)."""

    @contextmanager
    def doing(self, activity: Activity) -> Iterator[None]:
        """An activity for the length of a block; after it the one before goes on."""
        before = self.activity
        self(activity)
        yield
        self(before)

    @contextmanager
    def booked(self, name: Activity) -> Iterator[None]:
        """Book all time in a block under `name`: an evaluation's compute is not the training's."""
        doing = self.activity
        self(name)
        self.within = name
        try:
            yield
        finally:
            self(doing)
            self.within = None

    def shares(self) -> list[float]:
        """Seconds so far in each of SHARES."""
        return [self.seconds.get(activity, 0.0) for activity in SHARES]
