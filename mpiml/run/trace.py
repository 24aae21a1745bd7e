"""A timeline of a job in the Trace Event Format, which ui.perfetto.dev and chrome://tracing draw: a track per rank.

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import numpy as np
from mpi4py import MPI

from mpiml.clock import Activity, Clock
from mpiml.errors import ConfigError, OutputError, RunError
from mpiml.run.console import say as say_to
from mpiml.run.directory import is_own, named_errors, temporary, write_atomically
from mpiml.run.offsets import Ruler
from mpiml.team import Team, wait

EVENTS = 500_000  # in a file, of all ranks: about 50 MB, which a browser still takes
LEAST = 2_000  # of a rank, however many ranks there are
TRACKS = EVENTS // LEAST  # of as many ranks a file has tracks

Noted = tuple[float, int, str | None, str, int]  # the fields of an Event, which would take too long to create


class Event(NamedTuple):
    """At `time` a rank begins `name`: an activity, or a part of computing for a micro-batch (-1: for none). `within` is
    the activity under which it is booked, if that is another."""

    time: float
    step: int
    within: str | None
    name: str
    microbatch: int


class Span(NamedTuple):
    """What a rank did from `begin` to `end`, in seconds."""

    begin: float
    end: float
    name: str
    details: dict[str, int]


class Recorder(Clock):
    """A clock that records when activities begin: the last ones, as many as fit into a file with those of all ranks."""

    def __init__(self, ranks: int):
        super().__init__()
        self.limit = max(EVENTS // ranks, LEAST)
        self.events: deque[Noted] = deque([(self._since, 0, None, self.activity, -1)], self.limit)

    def __call__(self, activity: Activity) -> None:
        super().__call__(activity)
        self.events.append((self._since, self.step, self.within, activity, -1))

    def mark(self, part: str, microbatch: int) -> None:
        """As of a Clock. A part begins when computing began, unless another part came between."""
        time, *_, name, _ = self.events[-1]
        if name == "compute":
            self.events.pop()
        else:
            time = perf_counter()
        self.events.append((time, self.step, self.within, part, microbatch))

    @contextmanager
    def booked(self, name: Activity) -> Iterator[None]:
        """As of a Clock; afterwards the interrupted part of computing continues."""
        before = self.events[-1]
        with super().booked(name):
            yield
        self.events.append((self._since, *before[1:]))

    @property
    def first(self) -> int:
        """The first step of which all events are kept."""
        return 0 if len(self.events) < self.limit else self.events[0][1] + 1


class Grid(Protocol):
    """The parts of a grid (mpiml.parallel.grid) that a timeline needs."""

    node: MPI.Intracomm
    leaders: MPI.Intracomm | None
    team: Team
    replicas: int


def clock_for(path: str | None, ranks: int) -> Clock:
    """The clock of a rank: a Recorder if the job is traced to `path`, else a Clock."""
    return Recorder(ranks) if path else Clock()


def check(path: str | None, run: str | None) -> None:
    """Raise OutputError if `path` cannot be written, and ConfigError if it is a file of the run in the directory `run`.
    Rank 0 calls it, before anything else is written.

    A missing directory is no error: it may be the run's own, which is created later.
    """
    if not path:
        return
    if run and is_own(Path(path), Path(run)):
        raise ConfigError(f"--trace {path}: the run itself writes there; choose another name")
    with named_errors("write", Path(path)):
        if Path(path).is_dir():
            raise IsADirectoryError(None, "is a directory")
        parent = next(folder for folder in Path(path).absolute().parents if folder.exists())
        probe = temporary(parent / Path(path).name)
        probe.touch(exist_ok=False)
        probe.unlink()


@contextmanager
def written(path: str | None, grid: Grid, say: Callable[[str], None]) -> Iterator[None]:
    """Write the timeline when a block ends, even by an error that all ranks raise; collective.

    If it cannot be written, rank 0 prints a warning, and the run does not fail.
    """
    clock = grid.team.clock
    if not (path and isinstance(clock, Recorder)):
        yield
        return
    ruler = Ruler(grid.node, grid.leaders, perf_counter)
    try:
        yield
    except RunError as error:
        if error.everywhere:
            _write(Path(path), grid, clock, ruler)
        raise
    if text := _write(Path(path), grid, clock, ruler):
        say(text)


def _write(path: Path, grid: Grid, clock: Recorder, ruler: Ruler) -> str:
    """Returns a line to print: where the timeline is; empty if it could not be written."""
    clock("log")
    complete = np.array([clock.first])
    wait([grid.team.comm.Iallreduce(MPI.IN_PLACE, complete, MPI.MAX)])
    first = min(int(complete[0]), clock.step)  # the last step is shown even if it is not complete
    kept = [event for event in clock.events if event[1] >= first]
    steps = f"{next((event[1] for event in kept if event[1]), 0)} to {clock.step}"
    ruler.finish()
    *times, end = ruler.times([*(event[0] for event in kept), perf_counter()])
    origin = np.array(times[:1])
    wait([grid.team.comm.Iallreduce(MPI.IN_PLACE, origin, MPI.MIN)])
    events = [Event(time, *event[1:]) for time, event in zip(times, kept, strict=True)]
    drawn, rank = drawn_ranks(grid.team.size), grid.team.rank
    own = lines(1 + rank, spans(events, end), float(origin[0])) if rank in drawn else ""
    everyones = grid.team.comm.gather(own)

    def write() -> str:
        import gzip

        content = to_json(list(filter(None, everyones or [])), tracks(grid), steps).encode()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, gzip.compress(content, 5, mtime=0) if path.suffix == ".gz" else content)
        except (OSError, OutputError) as error:
            say_to(f"warning: the timeline is lost: {error}", sys.stderr)
            return ""
        return f"timeline: {path}" + (f" (from step {first} on; earlier steps did not fit)" if first else "")

    return grid.team.on_rank_0(write)


def drawn_ranks(ranks: int) -> Sequence[int]:
    """The ranks that a timeline shows: all, or TRACKS of them, evenly spaced from the first to the last."""
    return range(ranks) if ranks <= TRACKS else [(ranks - 1) * track // (TRACKS - 1) for track in range(TRACKS)]


def tracks(grid: Grid) -> dict[int, str]:
    """The names of the tracks, by number: one more than the rank."""
    names = {}
    for rank in drawn_ranks(grid.team.size):
        stage, replica = divmod(rank, grid.replicas)
        names[1 + rank] = f"rank {grid.team.launched[rank]}: stage {stage}, replica {replica}"
    return names


def spans(events: Sequence[Event], end: float) -> Iterator[Span]:
    """The spans of a rank's events, outer spans before inner ones; the last event lasts until `end`.

    A step encloses all that is done in it, and an evaluation or a checkpoint encloses all that it does.
    """
    until = [*(event.time for event in events[1:]), end]
    for step, group in itertools.groupby(zip(events, until, strict=True), key=lambda pair: pair[0].step):
        inside = list(group)
        yield Span(inside[0][0].time, inside[-1][1], f"step {step}" if step else "start", {})
        for name, block in itertools.groupby(inside, key=lambda pair: pair[0].within or pair[0].name):
            yield from _block(name, list(block))


def _block(name: str, pairs: Sequence[tuple[Event, float]]) -> Iterator[Span]:
    nested = any(event.within for event, _ in pairs)
    if nested:
        yield Span(pairs[0][0].time, pairs[-1][1], name, {})
    for event, until in pairs:
        if until <= event.time or (nested and event.name == name):
            continue
        if event.microbatch < 0:
            yield Span(event.time, until, event.name, {})
        else:
            about = {"step": event.step, "micro-batch": event.microbatch}
            yield Span(event.time, until, f"{event.name} {event.microbatch}", about)


def lines(track: int, rank_spans: Iterable[Span], origin: float) -> str:
    """A line of JSON for each span of a rank, with times in microseconds from `origin`."""
    encode = json.JSONEncoder(separators=(",", ":")).encode
    texts = []
    for span in rank_spans:
        # Whole nanoseconds: no gaps, no overlaps.
        begin, end = (round((time - origin) * 1e9) for time in (span.begin, span.end))
        entry = {"ph": "X", "pid": 1, "tid": track, "ts": begin / 1e3, "dur": (end - begin) / 1e3, "name": span.name}
        texts.append(encode({**entry, "args": span.details} if span.details else entry))
    return ",\n".join(texts)


def to_json(everyones: Sequence[str], names: Mapping[int, str], steps: str) -> str:
    """The timeline from the ranks' lines and the names of their tracks."""
    head: list[dict[str, Any]] = [{"name": "process_name", "args": {"name": "mpiml.train"}}]
    for track, name in names.items():
        head.append({"tid": track, "name": "thread_name", "args": {"name": name}})
        head.append({"tid": track, "name": "thread_sort_index", "args": {"sort_index": track}})
    texts = [json.dumps({"ph": "M", "pid": 1, **entry}) for entry in head]
    about = json.dumps({"steps": steps})
    events = ",\n".join([*texts, *everyones])
    return f'{{"displayTimeUnit": "ms", "otherData": {about}, "traceEvents": [\n{events}\n]}}\n'
