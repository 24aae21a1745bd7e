"""Writing a file of whose arrays every rank has segments: each writes its own, mostly while training goes on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml.errors import OutputError, RunError
from mpiml.run import segments, shared_file
from mpiml.run.background import Work
from mpiml.run.contents import Contents
from mpiml.run.digests import SIZE, blocks_in
from mpiml.run.directory import named_errors, sync, temporary
from mpiml.run.segments import Copies, Segment, Span
from mpiml.run.verified import Progress
from mpiml.run.writing import create_empty, exchanged, write, write_for_others
from mpiml.team import Team

ACTION = "write the checkpoint"


class File(NamedTuple):
    """A file that is to be written.

    Attributes:
        path: its name when it is whole.
        contents: without digests; None if a whole file of that name is there, which stays.
        ending: is called on rank 0 when all but the header is on disk. It returns a function that a thread calls when
            the file has its name.
        ended: is called on rank 0 after that.
    """

    path: Path
    contents: Contents | None
    ending: Callable[[], Callable[[], object]]
    ended: Callable[[], object]


@dataclass
class _Save:
    """A save on this rank, until all ranks know how it went.

    Attributes:
        path, unfinished: the name of the file, and its name meanwhile.
        rows: of this rank's segments.
        work: hashing and writing them.
        hashed: digests of their blocks.
        error: what else went wrong on this rank.
        sent: the gathering of all ranks' digests on rank 0.
        file, all_rows, received: on rank 0.
        finishing: on rank 0, the end of the work on the file; lost: whether there will be no file.
        after: what is to be done on rank 0 then.
        over: whether there is nothing left to do on this rank.
    """

    path: Path
    unfinished: Path
    file: File | None
    rows: NDArray[np.int64]
    all_rows: list[NDArray[np.int64]] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    hashed: bytearray = field(default_factory=bytearray)
    error: RunError | None = None
    sent: MPI.Request | None = None
    received: list[NDArray[np.uint8]] = field(default_factory=list)
    finishing: Work | None = None
    lost: bool = False
    after: list[Callable[[], object]] = field(default_factory=list)
    over: bool = False

    @property
    def problem(self) -> RunError | None:
        """What went wrong on this rank."""
        return self.error or next((w.error for w in (*self.work, self.finishing) if w and w.error), None)

    @property
    def seconds(self) -> float:
        """For how long this rank has been at work."""
        return max(work.seconds for work in self.work) + (self.finishing.seconds if self.finishing else 0.0)

    @property
    def what(self) -> str:
        """How a message begins."""
        return f"cannot {ACTION} {self.path}"


class Saver:
    """Writes files of which every rank has a part; collective to make, to begin and to settle.

    Each rank hashes and writes its own segments, in two threads. The digests then go to rank 0, which writes the header
    with them, and gives the file its name when all is safe on disk. In the background, a rank copies its segments and
    goes on training meanwhile; it calls `tick` now and then. A file is begun when the one before is settled.

    If not all ranks see the directory, those of rank 0's node write for all, and never in the background.

    Args:
        team: the ranks, those of a node next to each other, rank 0's first.
        node: those of this rank's node.
        crowded: whether these have more threads than cores: one that waits for a core may hold Python's lock.
    """

    def __init__(self, team: Team, node: MPI.Intracomm, crowded: bool = False):
        self.team, self.clock = Team(MPI.Intracomm(team.comm.Dup()), team.clock), team.clock
        self.first_node = team.broadcast(node.size)
        self.copies, self._crowded = Copies(), crowded
        self.seconds = 0.0  # that this rank has worked on the last file
        self._save: _Save | None = None

    @property
    def busy(self) -> bool:
        """Whether a file is not settled; the same on all ranks."""
        return self._save is not None

    @property
    def working(self) -> bool:
        """Whether this rank still has something to do for the file in flight."""
        return self._save is not None and not self._save.over

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the file in flight has failed."""
        return self._save is not None and self._save.problem is not None

    def begin(self, prepare: Callable[[], File], own: Sequence[Segment], background: bool = False) -> None:
        """Begin to write a file, and unless it is to be written in the background, settle it; collective.

        Args:
            prepare: is called on rank 0.
            own: this rank's segments; all ranks together have each element of the file's arrays once.

        Raises, on all ranks alike, the RunError that `prepare` raises, or as `settle`, also for the file before.
        """
        self.settle()
        file, path, unfinished, contents = self._created(prepare)
        if contents is None:
            return
        descriptor, unopened, seen = shared_file.opened(self.team, unfinished, os.O_WRONLY)
        if background := background and seen:
            own = self.copies.of(own)
        save = _Save(path, unfinished, file, shared_file.rows(own, sorted(contents.kinds)))
        save.all_rows = [of.reshape(-1, 3) for of in shared_file.gathered(self.team, save.rows.reshape(-1))]
        spans = segments.spans(own, contents.starts)
        if seen and self.first_node < self.team.size:
            spans = exchanged(self.team, spans, contents.first)
        there = seen or self.team.rank < self.first_node
        if there and unopened:
            save.error = OutputError(f"{save.what}: {unopened.strerror or unopened}")
        yields = background and not self._crowded
        save.work = [
            Work(lambda progress: shared_file.hash_all(own, save.hashed, progress), save.what, yields),
            Work(lambda progress: write(descriptor, spans if there else [], progress), save.what, yields),
        ]
        if not seen:
            problem = write_for_others(self.team, self.first_node, unfinished, spans, save.what)
            save.error = save.error or problem
        self._save = save  # which is complete only now: what interrupts this before must not let `free` finish the file
        if not background:
            self.settle()

    def tick(self) -> None:
        """Go on with the file in flight."""
        save = self._save
        if save is None or save.over:
            return
        self.seconds = save.seconds
        if not all(work.done for work in save.work):
            return
        if save.sent is None:
            self._send_digests(save)
        if save.sent and not save.sent.Test():
            return
        if save.file is None:
            save.over = True
        elif save.finishing is None:
            save.finishing = self._finish(save, save.file)
        elif save.finishing.done:
            self._end(save, save.file)

    def afterwards(self, action: Callable[[], object]) -> None:
        """Let rank 0 do something when the file in flight has its name, which it may have already."""
        save = self._save
        assert save, "it is not settled"
        if save.over:
            self._do(save, action)
        else:
            save.after.append(action)

    def settle(self) -> None:
        """Return when the file in flight, if there is one, has its name; collective.

        Raises, on all ranks alike, the error of the first rank on which something went wrong; then there is no file.
        """
        save = self._save
        if save is None:
            return
        for work in save.work:
            with self.clock.doing("checkpoint"):
                work.finish(self.clock)
        while not save.over:
            self.tick()
            if save.finishing:
                with self.clock.doing("checkpoint"):
                    save.finishing.finish(self.clock)
            elif save.sent:
                self.team.wait([save.sent])
        self._save = None

        def check() -> None:
            if save.problem:
                raise save.problem

        self.team.together(check)

    def free(self) -> None:
        """Give back the communicator; collective."""
        self.team.comm.Free()

    def _created(self, prepare: Callable[[], File]) -> tuple[File | None, Path, Path, Contents | None]:
        """Make an empty file; collective. Returns, of what is to be written, all on rank 0; its name, the name of the
        file that has been made, and what it is to hold, or None if a whole one is there."""
        files: list[File] = []  # on rank 0

        def create() -> tuple[Path, Path, Contents | None]:
            files.append(file := prepare())
            unfinished = temporary(file.path)
            if file.contents:
                with named_errors(ACTION, file.path):
                    create_empty(unfinished, file.contents.size)
            else:
                file.ending()()
                file.ended()
            return file.path, unfinished, file.contents

        made = self.team.on_rank_0(create)
        return files[0] if files else None, *made

    def _send_digests(self, save: _Save) -> None:
        """Let rank 0 have the digests of this rank's blocks, and whether something went wrong here."""
        message = np.zeros(_message(save.rows), np.uint8)
        message[0] = save.problem is not None
        message[1 : 1 + len(save.hashed)] = np.frombuffer(save.hashed, np.uint8)
        receive = None
        if save.file is not None:
            sizes = [_message(rows) for rows in save.all_rows]
            everything = np.empty(sum(sizes), np.uint8)
            save.received, receive = np.split(everything, np.cumsum(sizes)[:-1]), (everything, sizes)
        save.sent = self.team.comm.Igatherv(message, receive)

    def _finish(self, save: _Save, file: File) -> Work:
        """Rank 0: write the header, and give the file its name; or remove what is there."""
        then: Callable[[], object] | None = None
        try:
            with named_errors(ACTION, file.path):
                then = file.ending()
        except RunError as error:
            save.error = error
        save.lost = save.problem is not None or any(message[0] for message in save.received)

        def finish(progress: Progress) -> None:
            try:
                if then and not save.lost:
                    blocks = [(rows, of[1:].tobytes()) for rows, of in zip(save.all_rows, save.received, strict=True)]
                    assert file.contents, "there is something to write"
                    kinds = file.contents.kinds
                    header = file.contents.header(shared_file.of_arrays(sorted(kinds), kinds, blocks))
                    write(os.open(save.unfinished, os.O_WRONLY), [Span(0, memoryview(header))], progress)
                    os.replace(save.unfinished, file.path)
                    sync(file.path.parent)
                    then()
            finally:
                with contextlib.suppress(OSError):
                    save.unfinished.unlink()

        return Work(finish, save.what, yields=False)

    def _end(self, save: _Save, file: File) -> None:
        """Rank 0: do what comes after the work on the file."""
        save.lost = save.lost or save.problem is not None
        for action in (file.ended, *save.after):
            self._do(save, action)
        save.over = True

    def _do(self, save: _Save, action: Callable[[], object]) -> None:
        if save.file is not None and not save.lost:
            try:
                with named_errors(ACTION, save.path):
                    action()
            except RunError as error:
                save.error = error


def _message(rows: NDArray[np.int64]) -> int:
    """The bytes that a rank with these rows sends to rank 0 about a save."""
    return 1 + SIZE * sum(blocks_in(count) for *_, count in rows.tolist())
