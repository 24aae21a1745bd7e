"""What ranks do together with a file of which each has a part: open it, read it, hash it, and relay it to others."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml.errors import NotFiniteError, OutputError
from mpiml.run import digests, segments
from mpiml.run.contents import Contents
from mpiml.run.digests import Kind, little
from mpiml.run.directory import PART
from mpiml.run.segments import Segment, Span
from mpiml.run.verified import Progress, read_into
from mpiml.team import Team
from mpiml.vectors import BLOCK

HASHED = 16 * BLOCK  # elements that are looked at and hashed at once: they stay in a cache meanwhile
Blocks = tuple[NDArray[np.int64], bytes]  # rows and digests, as of segments.digests_of


def opened(team: Team, path: Path, flags: int) -> tuple[int, OSError | None, bool]:
    """The descriptor of a file that is there on rank 0, or -1 and why it cannot be opened here: on another node because
    it is not there, say; and whether all ranks have opened it. Collective."""
    descriptor, problem = -1, None
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        problem = error
    seen = np.array([problem is None], np.int64)
    team.wait([team.comm.Iallreduce(MPI.IN_PLACE, seen, MPI.MIN)])
    return descriptor, problem, bool(seen[0])


def gathered(team: Team, array: NDArray[Any]) -> list[NDArray[Any]]:
    """The 1-D arrays of all ranks, on rank 0; elsewhere none. Collective."""
    sizes = np.zeros(team.size, np.int64)
    team.wait([team.comm.Igather(np.array([array.size]), None if team.rank else sizes)])
    everything = np.empty(sizes.sum(), array.dtype)
    team.wait([team.comm.Igatherv(array, None if team.rank else (everything, sizes.tolist()))])
    return [] if team.rank else np.split(everything, np.cumsum(sizes)[:-1])


def allgathered(team: Team, array: NDArray[np.int64]) -> NDArray[np.int64]:
    """The 1-D arrays of all ranks, one after another; collective."""
    sizes = np.empty(team.size, np.int64)
    team.wait([team.comm.Iallgather(np.array([array.size]), sizes)])
    everything = np.empty(sizes.sum(), np.int64)
    team.wait([team.comm.Iallgatherv(array, (everything, sizes.tolist()))])
    return everything


def rows(own: Sequence[Segment], names: Sequence[str]) -> NDArray[np.int64]:
    """Of each segment the number of its array among `names`, its first element, and how many it has."""
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([(numbers[s.name], s.first, s.values.size) for s in own], np.int64).reshape(-1, 3)


def hash_all(own: Sequence[Segment], hashed: bytearray, progress: Progress) -> None:
    """Add the digests of the segments' blocks to `hashed`. Raises NotFiniteError for values that must be finite."""
    for segment in own:
        for first in range(0, segment.values.size, HASHED):
            part = segment.values[first : first + HASHED]
            if segment.finite and not np.isfinite(part).all():
                raise NotFiniteError(f"{segment.name} is not finite, so nothing is saved")
            hashed += digests.of_blocks(little(part))
            progress()


def of_arrays(names: Sequence[str], kinds: Mapping[str, Kind], blocks: Sequence[Blocks]) -> dict[str, bytes]:
    """The digests of arrays by those of their blocks."""
    sizes = [int(np.prod(kinds[name][1], dtype=object)) for name in names]
    of_each = segments.digests_of(blocks, sizes)
    return {name: digests.of_array(name, kinds[name], each) for name, each in zip(names, of_each, strict=True)}


def digests_of(team: Team, own: Sequence[Segment], kinds: Mapping[str, Kind]) -> dict[str, bytes]:
    """The digests of arrays, on rank 0; elsewhere none. Collective.

    Args:
        own: this rank's segments; all ranks together have each element of the arrays once.
        kinds: of all arrays.
    """
    names, hashed = sorted(kinds), bytearray()
    hash_all([segment._replace(finite=False) for segment in own], hashed, team.clock.progress)
    every = gathered(team, rows(own, names).reshape(-1))
    of_blocks = gathered(team, np.frombuffer(hashed, np.uint8))
    blocks = [(of.reshape(-1, 3), each.tobytes()) for of, each in zip(every, of_blocks, strict=True)]
    return {} if team.rank else of_arrays(names, kinds, blocks)


def load(
    team: Team,
    first_node: int,
    path: Path,
    contents: Contents,
    names: Iterable[str],
    into: Sequence[Segment],
    counted: Sequence[Segment],
) -> None:
    """Read arrays of a file that is there on rank 0, each rank what it needs of them; collective.

    If not all ranks see the file, the `first_node` ranks of rank 0's node read for the others.

    Args:
        names: of all arrays that are read, the same on all ranks.
        into: what this rank needs: their values are written.
        counted: those of them, or parts of them, that this rank verifies: all ranks together each element once.

    Raises OutputError, on all ranks alike, if the file cannot be read, or an array does not match its digest.
    """
    problem = _read(team, first_node, path, contents, into)

    def check() -> None:
        if problem:
            raise problem

    team.together(check)
    known = digests_of(team, counted, {name: contents.kinds[name] for name in names})

    def compare() -> None:
        for name, digest in known.items():
            if contents.digests is not None and contents.digests[name] != digest:
                raise OutputError(f"{path} is damaged: {name} does not match its SHA-256")

    team.on_rank_0(compare)


def _read(team: Team, first_node: int, path: Path, contents: Contents, into: Sequence[Segment]) -> OutputError | None:
    """Read as `load` does, but verify nothing; collective. Returns what went wrong on this rank."""
    descriptor, unopened, seen = opened(team, path, os.O_RDONLY)
    problem: OutputError | None = None

    def read(start: int, elements: NDArray[Any]) -> None:
        nonlocal problem
        try:
            if unopened:
                raise unopened
            read_into(descriptor, start, elements, team.clock.progress)
        except OSError as error:
            problem = OutputError(f"cannot read {path}: {error.strerror or error}")
        except EOFError:
            problem = OutputError(f"{path} is damaged: it is too short")

    try:
        if seen or team.rank < first_node:
            for one in into:
                read(contents.starts[one.name] + one.first * one.values.itemsize, one.values)
        if not seen:
            spans = segments.spans(into, contents.starts)
            relayed(team, first_node, spans, lambda start, view: read(start, np.frombuffer(view, np.uint8)), False)
    finally:
        if descriptor >= 0:
            with contextlib.suppress(OSError):  # all has been read
                os.close(descriptor)
    return problem


def relayed(
    team: Team, first_node: int, own: Sequence[Span], here: Callable[[int, memoryview], object], writing: bool
) -> None:
    """Let the `first_node` ranks of rank 0's node write or read spans of the others, part by part; collective.

    Args:
        own: spans of this rank. Those of others are filled when they are read.
        here: (place, bytes) writes or reads on the first node.
        writing: whether spans are written.
    """
    comm, rank = team.comm, team.rank
    every = team.allgather([(span.start, span.stop) for span in own] if rank >= first_node else [])
    if rank >= first_node:
        for span in own:
            view = np.frombuffer(span.view, np.uint8)
            for first in range(0, view.size, PART):
                part, other = view[first : first + PART], rank % first_node
                team.wait([comm.Isend(part, other) if writing else comm.Irecv(part, other)])
        return
    buffer = np.empty(PART, np.uint8)
    for other in range(rank, comm.size, first_node):
        for start, stop in every[other]:
            for first in range(start, stop, PART):
                view = buffer[: min(PART, stop - first)]
                if writing:
                    team.wait([comm.Irecv(view, other)])
                here(first, view.data)
                if not writing:
                    team.wait([comm.Isend(view, other)])
