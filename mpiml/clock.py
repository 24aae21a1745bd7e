"""What this rank is doing at the moment, and how long it has spent on what."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

# In each of these a rank may rightly stand still for as long as another rank is busy.
BLOCKED_ON_OTHERS = frozenset({"waiting", "communication", "joining"})
SHARES = ("compute", "waiting", "communication", "update", "data")


def unwatched() -> None:
    """In place of `Clock.progress` for work that no watch looks at."""


class Clock:
    """Seconds per activity. Call it with an activity's name whenever that activity begins.

    Activities: compute, waiting (for a neighbouring stage), communication (step record, exchange of gradients and
    values: what the computing did not hide), update (adding up gradients and optimizing, piece by piece), data,
    evaluation, checkpoint, log, start, joining (a collective outside the steps).
    """

    def __init__(self) -> None:
        self.activity = "start"
        self.within: str | None = None  # while set, time is booked under this name, whatever the activity
        self.step = 0
        self.moves = 0  # grows with every call and by progress(): a rank whose moves stand still is stuck
        self.seconds: dict[str, float] = {}
        self._since = perf_counter()

    def __call__(self, activity: str) -> None:
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
    def booked(self, name: str) -> Iterator[None]:
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
