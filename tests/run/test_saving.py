"""Files that several ranks write, each its own part: the same bytes whoever holds what, or none at all."""

from __future__ import annotations

import errno
import os
import resource
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mpiml.errors import DirectoryError, NotFiniteError, OutputError
from mpiml.run import verified
from mpiml.run.contents import Contents
from mpiml.run.saving import File, Saver
from mpiml.run.segments import UNIT, Segment
from mpiml.run.verified import kinds_of
from tests.run.holders import NODES, WORLD, arrays, dealt, placed

pytestmark = pytest.mark.mpi
TEXTS = {"format": "test", "step": "3"}
NAME = "f.safetensors"
LIMIT = 60  # seconds, for a thread that would wait for ever if this test failed
Place = tuple[Saver, Path]


@pytest.fixture
def place(request: pytest.FixtureRequest, together: Path, tmp_path: Path) -> Iterator[Place]:
    """A saver of all ranks, and the directory as each names it."""
    with placed(getattr(request, "param", "one"), together, tmp_path) as (team, node, path):
        saver = Saver(team, node)
        yield saver, path
        saver.free()


each_way = pytest.mark.parametrize(
    ("place", "background"), [("one", True), ("several", False), ("unseen", True)], indirect=["place"]
)
every_place = pytest.mark.parametrize("place", NODES, indirect=True)


def file(path: Path, of: Mapping[str, Any], calls: list[str] | None = None) -> Callable[[], File]:
    """What is to be written; `calls` gets what is called at the end of it."""
    noted = [] if calls is None else calls

    def ending() -> Callable[[], object]:
        noted.append("ending")
        return lambda: noted.append("named" if (path / NAME).exists() else "not named")

    contents = Contents.of(kinds_of(of), TEXTS)
    return lambda: File(path / NAME, contents, ending, lambda: noted.append("ended"))


def save(saver: Saver, prepare: Callable[[], File], own: list[Segment], background: bool = False) -> None:
    """Write a file, in the background or not."""
    saver.begin(prepare, own, background)
    saver.settle()


def names(together: Path) -> list[str]:
    WORLD.Barrier()
    there = sorted(os.listdir(together))
    WORLD.Barrier()
    return there


def expected(tmp_path: Path, of: Mapping[str, Any]) -> bytes:
    """The file that one rank writes."""
    verified.write(tmp_path / "expected", of, TEXTS, replace=True)
    return (tmp_path / "expected").read_bytes()


@every_place
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_the_file_is_the_same_byte_for_byte_whoever_holds_what(
    place: Place, together: Path, tmp_path: Path, background: bool, seed: int
) -> None:
    (saver, path), of, calls = place, arrays(seed), list[str]()
    saver.begin(file(path, of, calls), dealt(of, seed)[WORLD.rank], background)
    seen = path.is_absolute() or WORLD.size == 1
    assert saver.busy is (background and seen)
    saver.tick()
    saver.settle()
    assert (saver.busy, saver.failed, saver.working) == (False, False, False)
    assert names(together) == [NAME]
    assert (together / NAME).read_bytes() == expected(tmp_path, of)
    assert load_file(together / NAME)["wide"].tobytes() == of["wide"].tobytes()
    assert calls == (["ending", "named", "ended"] if WORLD.rank == 0 else [])


@every_place
def test_one_rank_may_hold_everything_and_others_nothing(place: Place, together: Path, tmp_path: Path) -> None:
    (saver, path), of = place, arrays()
    for holder in {0, WORLD.size - 1}:
        own = [Segment(name, 0, array.reshape(-1)) for name, array in of.items()] if WORLD.rank == holder else []
        saver.begin(file(path, of), own)
        assert (together / NAME).read_bytes() == expected(tmp_path, of)
        WORLD.Barrier()


def test_a_file_without_arrays(place: Place, together: Path, tmp_path: Path) -> None:
    place[0].begin(file(place[1], {}), [])
    assert (together / NAME).read_bytes() == expected(tmp_path, {})


def test_what_is_computed_meanwhile_does_not_get_into_the_file(
    place: Place, together: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Nothing is hashed or written before all arrays have changed. And to go on with a save never takes time."""
    (saver, path), of, slow = place, arrays(), threading.Event()
    before, own, fsync, update = expected(tmp_path, of), dealt(of, 1)[WORLD.rank], os.fsync, Slow(slow)
    monkeypatch.setattr(os, "fsync", lambda descriptor: update(fsync, descriptor))
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *arguments: update(pwrite, *arguments))
    saver.begin(file(path, of), own, background=True)
    for segment in own:
        segment.values[...] = 0
    for _ in range(100):
        saver.tick()
        assert saver.busy
    assert not update.late
    assert names(together) != [NAME]
    slow.set()
    saver.settle()
    assert not update.late
    assert (together / NAME).read_bytes() == before


class Slow:
    """Lets threads other than the main one do something only after an event."""

    def __init__(self, event: threading.Event):
        self.event, self.late = event, False

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            self.late |= not self.event.wait(LIMIT)
        return function(*arguments)


def test_the_next_file_waits_for_the_one_before(place: Place, together: Path, tmp_path: Path) -> None:
    saver, path = place
    for salt in range(3):
        of = arrays(salt)
        saver.begin(file(path, of), dealt(of, salt)[WORLD.rank], background=True)
        if salt:
            assert (together / NAME).read_bytes() == expected(tmp_path, arrays(salt - 1))
        WORLD.Barrier()
    saver.settle()
    assert (together / NAME).read_bytes() == expected(tmp_path, arrays(2))


def and_own(of: Mapping[str, Any], seed: int) -> tuple[dict[str, Any], list[Segment]]:
    """Arrays with one more for each rank, with a whole unit of the file, and the segments of this rank."""
    more = {f"own.{rank}": np.zeros(UNIT // 2, np.float32) for rank in range(WORLD.size)}
    name = f"own.{WORLD.rank}"
    return dict(of) | more, [*dealt(of, seed)[WORLD.rank], Segment(name, 0, more[name])]


def check_saves(place: Place, together: Path, tmp_path: Path) -> None:
    """A file is written, after all that has happened, and nothing is left of what could not be."""
    assert names(together) == []
    of, own = and_own(arrays(5), 5)
    place[0].begin(file(place[1], of), own)
    assert names(together) == [NAME]
    assert (together / NAME).read_bytes() == expected(tmp_path, of)


LAST = WORLD.size - 1


@each_way
@pytest.mark.parametrize("rank", sorted({0, LAST}))
def test_values_of_one_rank_that_are_not_finite_are_everybodys_error(
    place: Place, together: Path, tmp_path: Path, background: bool, rank: int
) -> None:
    (of, own), calls = and_own(arrays(), 1), list[str]()
    if WORLD.rank == rank:
        own[-1].values[3] = np.nan
    with pytest.raises(NotFiniteError, match=rf"^own.{rank} is not finite, so nothing is saved$") as error:
        save(place[0], file(place[1], of, calls), own, background)
    assert error.value.everywhere
    assert {"named", "not named", "ended"}.isdisjoint(calls)
    check_saves(place, together, tmp_path)


def test_values_that_need_not_be_finite_are_saved(place: Place, together: Path, tmp_path: Path) -> None:
    of, own = and_own({}, 1)
    for array in of.values():
        array[1:3] = np.nan, -np.inf
    place[0].begin(file(place[1], of), [segment._replace(finite=False) for segment in own])
    assert (together / NAME).read_bytes() == expected(tmp_path, of)


def full(*arguments: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@each_way
@pytest.mark.parametrize("rank", sorted({0, LAST}))
def test_a_disk_that_is_full_for_one_rank_is_everybodys_error(
    place: Place, together: Path, tmp_path: Path, monkeypatch: Any, background: bool, rank: int
) -> None:
    (saver, path), (of, own), calls = place, and_own({}, 1), list[str]()
    with monkeypatch.context() as patch:
        if rank == WORLD.rank:
            patch.setattr(os, "pwrite", full)
        if path.is_absolute() or rank == 0:  # else this rank writes nothing
            with pytest.raises(
                OutputError, match=rf"^cannot write the checkpoint {path / NAME}: No space left"
            ) as error:
                save(saver, file(path, of, calls), own, background)
            assert error.value.everywhere
            assert {"named", "not named", "ended"}.isdisjoint(calls)
    check_saves(place, together, tmp_path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_fails_at_the_end_on_rank_0_is_everybodys_error(
    place: Place, together: Path, tmp_path: Path, monkeypatch: Any, call: str
) -> None:
    (saver, path), of, calls = place, arrays(), list[str]()
    with monkeypatch.context() as patch:
        saver.begin(file(path, of, calls), dealt(of, 1)[WORLD.rank], background=True)
        saver.afterwards(lambda: calls.append("afterwards"))
        if WORLD.rank == 0:
            patch.setattr(os, call, full)
        with pytest.raises(OutputError, match=r"No space left"):
            saver.settle()
    assert calls == (["ending"] if WORLD.rank == 0 else [])
    check_saves(place, together, tmp_path)


@pytest.mark.parametrize("limit", [1, 100_000])
def test_a_file_larger_than_files_may_be(place: Place, together: Path, tmp_path: Path, limit: int) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(
            OutputError, match=r"^cannot write the checkpoint .*/f.safetensors: File too large"
        ) as error:
            place[0].begin(file(place[1], arrays()), dealt(arrays(), 1)[WORLD.rank])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.everywhere
    check_saves(place, together, tmp_path)


@every_place
def test_a_file_that_rank_0_cannot_open_is_everybodys_error(
    place: Place, together: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    (saver, path), of, opened = place, arrays(), os.open

    def refused(path: Any, flags: int, *more: Any) -> int:
        if WORLD.rank == 0 and flags == os.O_WRONLY:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return opened(path, flags, *more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refused)
        with pytest.raises(OutputError, match=r"^cannot write the checkpoint .*/f.safetensors: Too many open") as error:
            save(saver, file(path, of), dealt(of, 1)[WORLD.rank], background=True)
    assert error.value.everywhere
    check_saves(place, together, tmp_path)


@pytest.mark.parametrize("background", [False, True])
def test_what_the_owner_refuses_is_everybodys_error(
    place: Place, together: Path, tmp_path: Path, background: bool
) -> None:
    """Before anything is written, or when all is but the name."""
    (saver, path), of = place, arrays()

    def refused() -> Any:
        raise DirectoryError("taken over by another job")

    first = file(path, of)()
    for prepare in (refused, lambda: first._replace(ending=refused), lambda: first._replace(ending=lambda: refused)):
        with pytest.raises(DirectoryError, match=r"^taken over by another job$") as error:
            save(saver, prepare, dealt(of, 1)[WORLD.rank], background)
        assert error.value.everywhere
        assert not saver.busy
        if WORLD.rank == 0:
            (together / NAME).unlink(missing_ok=True)  # it had its name when the last of them was called
    check_saves(place, together, tmp_path)


def test_a_file_that_is_there_stays_and_what_comes_after_it_is_done(place: Place, together: Path) -> None:
    (saver, path), calls = place, list[str]()
    if WORLD.rank == 0:
        (together / NAME).write_bytes(b"whole")
    saver.begin(lambda: file(path, {}, calls)()._replace(contents=None), dealt(arrays(), 1)[WORLD.rank], True)
    assert not saver.busy
    assert calls == (["ending", "named", "ended"] if WORLD.rank == 0 else [])
    assert (names(together), (together / NAME).read_bytes()) == ([NAME], b"whole")


@pytest.mark.parametrize("late", [False, True])
def test_who_asks_for_it_is_called_when_the_file_has_its_name(place: Place, together: Path, late: bool) -> None:
    """Or has it already."""
    (saver, path), of, calls = place, arrays(), list[str]()
    saver.begin(file(path, of, calls), dealt(of, 1)[WORLD.rank], background=True)
    while late and saver.working:
        saver.tick()
    saver.afterwards(lambda: calls.append("afterwards"))
    saver.settle()
    assert calls == (["ending", "named", "ended", "afterwards"] if WORLD.rank == 0 else [])


def test_a_rank_knows_that_its_own_part_has_failed(place: Place, monkeypatch: Any) -> None:
    (saver, path), (of, own) = place, and_own({}, 1)
    with monkeypatch.context() as patch:
        if WORLD.rank == LAST:
            patch.setattr(os, "pwrite", full)
        saver.begin(file(path, of), own, background=True)
        until = time.monotonic() + LIMIT
        while saver.working and time.monotonic() < until:
            saver.tick()
            time.sleep(0.001)
        assert not saver.working
        assert saver.failed is (WORLD.rank == LAST)
        with pytest.raises(OutputError, match="No space left"):
            saver.settle()
    assert not saver.failed


@pytest.mark.parametrize("place", ["one", "several"], indirect=True)
def test_no_rank_needs_memory_for_more_than_its_copy(place: Place) -> None:
    """And the parts at the edges of units, which it writes for others."""
    (saver, path), size = place, 1 << 22
    of = {f"own.{rank}": np.ones(size, np.float32) for rank in range(WORLD.size)}
    own, most = [Segment(f"own.{WORLD.rank}", 0, of[f"own.{WORLD.rank}"])], list[int]()
    for background in (False, True):
        tracemalloc.start()
        try:
            save(saver, file(path, of), own, background)
            most.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert most[0] < 4 << 20
    assert most[1] < 4 * size + (4 << 20)
