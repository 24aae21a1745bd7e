"""Writing spans of one file by several ranks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mpi4py import MPI

from mpiml.errors import OutputError
from mpiml.run import segments, shared_file
from mpiml.run.directory import PART
from mpiml.run.segments import Span
from mpiml.run.verified import Progress
from mpiml.team import Team


def create_empty(path: Path, size: int) -> None:
    """Create a file of so many bytes, which take no room yet. Raises OSError; then there is none."""
    created = open(path, "xb")  # noqa: SIM115 (closing it may fail, too)
    try:
        with created as file:
            file.truncate(size)
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def write(descriptor: int, spans: Sequence[Span], progress: Progress) -> None:
    """Write spans into an open file, flush it to disk part by part, and close it; -1 is no file. Raises OSError."""
    if descriptor < 0:
        return
    try:
        waiting = 0
        for span in spans:
            for first in range(0, len(span.view), PART):
                rest, at = span.view[first : first + PART], span.start + first
                while rest:
                    count = os.pwrite(descriptor, rest, at)
                    rest, at, waiting = rest[count:], at + count, waiting + count
                if waiting >= PART:
                    os.fsync(descriptor)
                    waiting = 0
                progress()
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchanged(team: Team, own: Sequence[Span], first: int) -> list[Span]:
    """What this rank writes if ranks are on several nodes: of units that several ranks have bytes of, one writes all.
    Before byte `first` is the header, which is rank 0's. Collective."""
    comm, rank, requests = team.comm, team.rank, list[MPI.Request]()
    header = [Span(0, memoryview(bytes(first)))] if rank == 0 else []
    spans, rest = segments.divided([*header, *own])
    views = {span.start: span.view for span in rest}
    edges = np.array([(span.start, span.stop, rank) for span in rest], np.int64)
    every = shared_file.allgathered(team, edges.reshape(-1)).reshape(-1, 3)
    writer = segments.writers(every)
    concerned = (every[:, 2] == rank) | (writer == rank)
    for start, stop, holder, to in np.column_stack([every, writer])[concerned].tolist():
        if rank == holder == to:
            spans.append(Span(start, views[start]))
        elif rank == holder:
            requests.append(comm.Isend(np.frombuffer(views[start], np.uint8), to))
        else:
            received = np.empty(stop - start, np.uint8)
            requests.append(comm.Irecv(received, holder))
            spans.append(Span(start, received.data))
    team.wait(requests)
    return [span for span in spans if span.start >= first]


def write_for_others(team: Team, first_node: int, path: Path, spans: Sequence[Span], what: str) -> OutputError | None:
    """Write by the `first_node` ranks of rank 0's node what the others have; collective. Returns what went wrong on
    this rank, which begins with `what`."""
    problem: OutputError | None = None

    def write_one(start: int, view: memoryview) -> None:
        nonlocal problem
        if problem is None:  # else what others send is taken all the same
            try:
                write(os.open(path, os.O_WRONLY), [Span(start, view)], team.clock.progress)
            except OSError as error:
                problem = OutputError(f"{what}: {error.strerror or error}")

    shared_file.relayed(team, first_node, spans, write_one, writing=True)
    return problem
