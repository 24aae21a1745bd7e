"""What ranks read together of one file, and the digests of what they hold."""

from __future__ import annotations

import errno
import os
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from mpiml.clock import Clock
from mpiml.errors import NotFiniteError, OutputError
from mpiml.run import shared_file, verified
from mpiml.run.contents import contents_in
from mpiml.run.digests import of_blocks
from mpiml.run.segments import Segment
from mpiml.run.shared_file import HASHED, digests_of, hash_all
from mpiml.run.verified import kinds_of
from mpiml.team import Team
from tests.forging import digest_of_array, write_before
from tests.run.holders import NODES, WORLD, arrays, dealt, placed

TEXTS = {"format": "test"}
Place = tuple[Team, int, Path]
every_place = pytest.mark.parametrize("place", NODES, indirect=True)


@pytest.fixture
def place(request: pytest.FixtureRequest, together: Path, tmp_path: Path) -> Iterator[Place]:
    """All ranks, how many of them are on the first node, and a file as each names it, whose content rank 0 has written:
    native arrays as of `arrays`."""
    with placed(getattr(request, "param", "one"), together, tmp_path) as (team, node, path):
        if WORLD.rank == 0:
            verified.write(together / "f", native(), TEXTS)
        yield team, team.broadcast(node.size), path / "f"


def native() -> dict[str, Any]:
    return {name: array.astype(array.dtype.newbyteorder("=")) for name, array in arrays().items()}


def empty(own: list[Segment]) -> list[Segment]:
    """Segments with other values, which a file is read into."""
    return [segment._replace(values=np.ones_like(segment.values)) for segment in own]


def load(place: Place, of: Mapping[str, Any], into: list[Segment], counted: list[Segment]) -> None:
    team, first_node, path = place
    contents = team.on_rank_0(lambda: contents_in(path))
    shared_file.load(team, first_node, path, contents, of, into, counted)


def changed(file: Path, name: str, at: int = -1) -> None:
    """Change a byte of an array in a file."""
    content, contents = bytearray(file.read_bytes()), contents_in(file)
    array = native()[name]
    content[contents.starts[name] + (at if at >= 0 else array.nbytes - 1)] ^= 1
    file.write_bytes(content)


@pytest.mark.mpi
@every_place
@pytest.mark.parametrize("seed", range(2))
def test_each_rank_reads_what_it_needs_and_all_is_verified_once(place: Place, seed: int) -> None:
    """Some need parts that others have too."""
    of = native()
    every, rng = dealt(of, seed), Random(seed)
    counted = empty(every[WORLD.rank])
    more = [segment for own in every for segment in own if rng.random() < 0.3]
    into = [*counted, *empty(more)]
    load(place, of, into, counted)
    for read, segment in zip(into, [*every[WORLD.rank], *more], strict=True):
        assert read.values.tobytes() == segment.values.tobytes(), read.name


@pytest.mark.mpi
@every_place
def test_damage_is_everybodys_error_and_of_arrays_that_are_read_alone(place: Place, together: Path) -> None:
    of = native()
    own = empty(dealt(of, 1)[WORLD.rank])
    if WORLD.rank == 0:
        changed(together / "f", "mean")
    WORLD.Barrier()
    with pytest.raises(OutputError, match=rf"^{place[2]} is damaged: mean does not match its SHA-256$") as error:
        load(place, of, own, own)
    assert error.value.everywhere
    del of["mean"]
    load(place, of, [s for s in own if s.name != "mean"], [s for s in own if s.name != "mean"])
    WORLD.Barrier()
    if WORLD.rank == 0:
        os.truncate(together / "f", (together / "f").stat().st_size - 1)
    WORLD.Barrier()
    with pytest.raises(OutputError, match=r"f is damaged: ") as error:
        load(place, native(), own, own)
    assert error.value.everywhere


@pytest.mark.mpi
@every_place
def test_a_file_that_becomes_shorter_or_cannot_be_read_is_everybodys_error(
    place: Place, together: Path, monkeypatch: Any
) -> None:
    """When its header has been read."""
    (team, first_node, path), of = place, native()
    own, contents = empty(dealt(of, 1)[WORLD.rank]), contents_in(together / "f")
    WORLD.Barrier()

    def broken(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        if WORLD.rank == 0:
            patch.setattr(os, "preadv", broken)
        with pytest.raises(OutputError, match=rf"^cannot read {path}: Input/output error$") as error:
            shared_file.load(team, first_node, path, contents, of, own, own)
        assert error.value.everywhere
    if WORLD.rank == 0:
        os.truncate(together / "f", contents.first)
    WORLD.Barrier()
    with pytest.raises(OutputError, match=rf"^{path} is damaged: it is too short$"):
        shared_file.load(team, first_node, path, contents, of, own, own)
    WORLD.Barrier()
    if WORLD.rank == 0:
        (together / "f").unlink()
    WORLD.Barrier()
    with pytest.raises(OutputError, match=rf"^cannot read {path}: No such file or directory$"):
        shared_file.load(team, first_node, path, contents, of, own, own)


@pytest.mark.mpi
def test_a_file_with_one_sha256_of_all_is_read(place: Place, together: Path) -> None:
    """Rank 0 has verified it, as a whole."""
    of = native()
    own = dealt(of, 1)[WORLD.rank]
    if WORLD.rank == 0:
        write_before(together / "f", of, TEXTS)
    into = empty(own)
    load(place, of, into, into)
    assert all(read.values.tobytes() == one.values.tobytes() for read, one in zip(into, own, strict=True))


@pytest.mark.mpi
@pytest.mark.parametrize("seed", range(3))
def test_digests_are_those_of_the_arrays_whoever_holds_what(seed: int) -> None:
    of = arrays(seed)
    known = digests_of(Team(WORLD, Clock()), dealt(of, seed)[WORLD.rank], kinds_of(of))
    assert known == ({} if WORLD.rank else {name: digest_of_array(name, array) for name, array in of.items()})


@pytest.mark.mpi
def test_no_rank_needs_more_memory_to_read_than_what_it_reads_into(place: Place) -> None:
    of = native()
    own = empty(dealt(of, 3)[WORLD.rank])
    tracemalloc.start()
    try:
        load(place, of, own, own)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 1 << 20


def test_each_part_of_hashing_is_progress() -> None:
    moves, hashed = list[int](), bytearray()
    values = np.arange(3.0 * HASHED + 5)
    hash_all([Segment("w", 0, values), Segment("v", 0, values[:7])], hashed, lambda: moves.append(1))
    assert bytes(hashed) == of_blocks(values) + of_blocks(values[:7])
    assert len(moves) == 4 + 1


@pytest.mark.parametrize("at", [0, HASHED - 1, HASHED, -1])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_found_wherever_they_are(at: int, value: float) -> None:
    values = np.zeros(2 * HASHED + 5, np.float32)
    values[at] = value
    with pytest.raises(NotFiniteError, match=r"^w is not finite, so nothing is saved$"):
        hash_all([Segment("w", 0, values)], bytearray(), lambda: None)
    hash_all([Segment("w", 0, values, finite=False)], bytearray(), lambda: None)
