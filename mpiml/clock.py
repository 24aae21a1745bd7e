"""The current activity of a rank, and the time that it has spent in each activity."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Literal, get_args

# data, model: reading or building it, with the user's functions. waiting: for a neighbouring stage. communication: the
# step record, and the part of the exchange of gradients and values that computing did not hide. update: adding up
# gradients and the optimizer, in pieces. joining: waiting for other ranks outside of steps.
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
# In these a rank may make no progress while another rank is busy.
BLOCKED_ON_OTHERS: frozenset[Activity] = frozenset({"waiting", "communication", "joining"})
SHARES: tuple[Activity, ...] = ("compute", "waiting", "communication", "update", "data")


def unwatched() -> None:
    """In place of `Clock.progress`, for work that no watch observes."""


class Clock:
    """Seconds per activity. Call it with an activity when that begins."""

    def __init__(self) -> None:
        self.activity: Activity = "start"
        self.within: Activity | None = None  # if set, time is booked under this activity
        self.step = 0
        self.call = ""  # of this package, which a program of one's own has made
        self.patient = ""  # long work of a user's own, which is progress however long it takes
        self.moves = 0  # grows with every call and by progress(); a rank whose moves do not change is stuck
        self.seconds: dict[Activity, float] = {}
        self._since = perf_counter()

    def __call__(self, activity: Activity) -> None:
        now = perf_counter()
        name = self.within or self.activity
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now
        self.activity = activity
        self.moves += 1

    def progress(self) -> None:
        """Report progress within a long activity."""
        self.moves += 1

    def mark(self, part: str, microbatch: int) -> None:
        """A part of the computing of a micro-batch begins: for timelines (mpiml.run.trace)."""

    @contextmanager
    def doing(self, activity: Activity) -> Iterator[None]:
        """An activity during a block; afterwards the previous one continues."""
        before = self.activity
        self(activity)
        yield
        self(before)

    def calling(self, call: str) -> Calling:
        """A call during a block, for messages."""
        return Calling(self, call)

    @contextmanager
    def booked(self, name: Activity) -> Iterator[None]:
        """Book all time in a block under `name`: computing in an evaluation does not count as compute."""
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


class Calling:
    """A block in which a call of this package is made; of calls within each other messages name the outermost."""

    __slots__ = ("_before", "_call", "_clock")  # not a generator: it is entered in every sum

    def __init__(self, clock: Clock, call: str):
        self._clock, self._call, self._before = clock, call, clock.call

    def __enter__(self) -> None:
        self._clock.call = self._before or self._call

    def __exit__(self, *error: object) -> None:
        self._clock.call = self._before
