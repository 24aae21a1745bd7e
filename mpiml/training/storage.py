"""The state of a run in its directory: restored where it left off, or begun anew, and saved."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from mpi4py import MPI

from mpiml.errors import ConfigError, RunError
from mpiml.parallel.state import VALUES, State
from mpiml.run import digests, shared_file, step_files
from mpiml.run.checkpoint import texts_of
from mpiml.run.contents import Contents
from mpiml.run.deadline import Deadline
from mpiml.run.digests import little
from mpiml.run.directory import sync_file
from mpiml.run.node import memory_available
from mpiml.run.result import update_result
from mpiml.run.saving import File, Saver
from mpiml.run.segments import Segment, size_of_copies
from mpiml.run.verified import Array, kinds_of, stays
from mpiml.training import accounts
from mpiml.training.arrays import needed_kinds, segments
from mpiml.training.hold import Hold
from mpiml.training.restoring import Restored, Restoring
from mpiml.training.rounds import Round
from mpiml.training.run import Run

MOST = 0.5  # of a node's memory that is available, copies may take so much


class Store:
    """The state of a run in its directory. Every method but `tick` is collective. `deadline` learns how long saving
    takes.

    Raises DirectoryError, on all ranks alike, where it would write and another job has taken the directory.
    """

    def __init__(self, run: Run, hold: Hold, deadline: Deadline):
        self.run, self.hold, self.deadline = run, hold, deadline
        self.team, self.clock = run.grid.team, run.grid.team.clock
        self._saver = Saver(self.team, run.grid.node, run.crowded)
        self._saved, self._background = 0, False  # the step of the last save
        self._evaluates = False  # whether this job has begun an evaluation
        self._untimed = False  # whether the deadline does not know how long the last save in the background took
        states, layouts = len(run.state.names) - 1, run.model.layouts
        size = sum((layout.size + states * layout.updated) * layout.dtype.itemsize for layout in layouts)
        deadline.expect(size + sum(array.nbytes for array in run.model.constants.arrays.values()))

    def restore(self) -> Restored:
        """Put the state of the newest good checkpoint, or weights and constants of --init, in place."""
        restored = Restoring(self.run, self.hold, self._saver.first_node).restore()
        self._saved = restored.saved
        for scored in restored.scores:
            self.run.best.add(*scored)
        if self.run.noise:
            self.run.noise.averages = restored.noise
        if restored.step:  # the job before may have been killed before it did so
            self.team.on_rank_0(self._prune)
        return restored

    def claim(self) -> list[str]:
        """Claim memory for saving while training goes on, as --save asks. Returns what a person should know. Raises
        ConfigError, on all ranks alike, if a rank has not enough."""
        config = self.run.config
        if config.save == "sync" or not config.save_every:
            return []
        size = size_of_copies(self._of_rank(self.run.learning.saved_state, self._others({})))
        of_node, least = self._of_nodes(size)
        if config.save == "auto" and of_node > MOST * least:
            there = f"{least / 1e9:.2g} GB are available" if least else "how much is available is not known"
            return [f"training waits for saves: copies take {of_node / 1e9:.2g} GB a node, and {there}; see --save"]
        self._background = True
        self.deadline.expect_in_flight()
        self.team.together(lambda: self._claim(size))
        return []

    def _claim(self, size: int) -> None:
        try:
            self._saver.copies.claim(size)
        except MemoryError:
            needs = f"a rank has no {size / 1e9:.2g} GB for its copy; --save sync needs none"
            raise ConfigError(f"--save {self.run.config.save}: {needs}") from None

    def save(self, step: int, going_on: bool = True) -> None:
        """Write the checkpoint of a step, unless that is done, when the metrics so far are on disk. It is saved when
        `settle` returns; if training is `going_on`, that may be later."""
        if step != self._saved:
            self._write(step, {}, going_on and self._background)

    def save_round(self, left: Round) -> int:
        """Write a checkpoint within a round that workers have left: of each of them, and how far it is. Returns its
        step, the last that all have done."""
        of_workers = accounts.arrays_of(left.workers, left.reported.logged, left.steps)
        self.run.learning.left = of_workers
        self._write(int(of_workers[accounts.STEPS].min()), of_workers, background=False)
        return self._saved

    def _write(self, step: int, left: Mapping[str, Array], background: bool) -> None:
        state, others = self.run.learning.saved_state, self._others(left)

        def prepare() -> File:
            self.clock("checkpoint")
            self.hold.check()
            sync_file(self.hold.metrics)
            path = self.hold.checkpoints / step_files.file_name(step)
            run = self.run
            texts = texts_of(step, run.config.to_toml(), run.model.task.to_json(), run.model.constants.entries)
            kinds = needed_kinds(run.model.layouts, state.names) | kinds_of(others)
            contents = None if stays(path, self.clock.progress) else Contents.of(kinds, texts)
            return File(path, contents, self._ending(step), lambda: self._noted(step))

        self.settle()
        with self.clock.booked("checkpoint"):
            state.current()
            began = time.monotonic()
            self._saver.begin(prepare, self._of_rank(state, others), background)
        self._saved, self._untimed = step, self._saver.working
        if not (left or self._untimed):  # a round that was left has more to save
            self.deadline.saved(time.monotonic() - began)

    def _time(self) -> None:
        """Let the deadline know how long a save in the background takes."""
        if self._untimed:
            self._untimed = self._saver.working
            (self.deadline.saving if self._untimed else self.deadline.saved)(self._saver.seconds)

    def _of_rank(self, state: State, others: Mapping[str, Array]) -> list[Segment]:
        """What this rank saves: its parts of vectors, and other arrays."""
        constants = self.run.model.constants.entries
        own = [Segment(name, 0, little(array).reshape(-1), name not in constants) for name, array in others.items()]
        return [*self._segments(state), *own]

    def _others(self, left: Mapping[str, Array]) -> dict[str, Array]:
        """The arrays of a checkpoint that are no parts of vectors, which are rank 0's."""
        if self.team.rank:
            return {}
        arrays = dict(self.run.model.constants.arrays) | dict(left)
        for preparation in self.run.data.preparations:
            arrays |= preparation.arrays()
        return arrays

    def _segments(self, state: State, *names: str) -> list[Segment]:
        """What is saved of this rank's parts of vectors (default: all)."""
        layout, parts = self.run.model.layouts[self.run.grid.stage], state.parts
        return [
            segment
            for name in names or state.names
            if name in parts
            for segment in segments(layout, name, parts[name].collected, once=True)
        ]

    def _ending(self, step: int) -> Callable[[], Callable[[], object]]:
        """What is done, in a thread of rank 0, when a checkpoint has its name."""
        best = self.run.best.steps  # of now: when the file has its name, the best may be a step that is not saved yet

        def ending() -> Callable[[], object]:
            self.hold.check()
            return lambda: step_files.prune(self.hold.checkpoints, step, self.run.config.keep, best)

        return ending

    def _noted(self, step: int) -> None:
        """Rank 0: note in the result that a step is saved."""
        self.hold.check()
        update_result(self.hold.path, {"step": step, "saved": step} | self.run.best.result(self.hold.path))

    @property
    def failed(self) -> bool:
        """Whether this rank knows that a save has failed, so that the run is to stop."""
        return self._saver.failed

    def tick(self) -> None:
        """Go on with a save, in no time; not collective."""
        self._saver.tick()
        self._time()

    def settle(self) -> None:
        """Return when all that has been saved is on disk. Raises OutputError or NotFiniteError if it could not be."""
        with self.clock.booked("checkpoint"):
            self._saver.settle()
        self._time()

    def before_evaluation(self) -> None:
        """Before the first evaluation of a job, have on disk what has been saved: if it fails where steps do not, it
        will fail again, and going on must begin after those steps."""
        if not self._evaluates:
            self._evaluates = True
            self.settle()

    def save_best(self, step: int) -> None:
        """Save a step that is one of the best by now, and remove the checkpoints of those that no longer are."""
        self.save(step)
        best = self.run.best.steps

        def keep() -> None:
            self.hold.check()
            step_files.prune(self.hold.checkpoints, step, self.run.config.keep, best)
            update_result(self.hold.path, self.run.best.result(self.hold.path))

        if self._saver.busy:
            self._saver.afterwards(keep)
        else:
            self.team.on_rank_0(keep)

    def _prune(self) -> None:
        step_files.prune(self.hold.checkpoints, self._saved, self.run.config.keep, self.run.best.steps)

    def saved(self) -> dict[str, Any]:
        """The fields of result.json on checkpoints: the newest, and the best evaluation's."""
        best: dict[str, Any] = self.team.on_rank_0(lambda: self.run.best.result(self.hold.path))
        return {"saved": self._saved} | best

    def digest(self) -> str:
        """The SHA-256 of all weights, the same for every layout; within a round, of those before it."""
        run = self.run
        with self.clock.booked("checkpoint"):
            run.learning.saved_state.current()
            own = self._segments(run.learning.saved_state, VALUES)
            known = shared_file.digests_of(self.team, own, needed_kinds(run.model.layouts, (VALUES,)))
            return self.team.broadcast(digests.of_arrays(known))

    def finish(self, outcome: Mapping[str, Any]) -> dict[str, Any]:
        """Write how the run ended. Returns the whole result."""

        def write() -> dict[str, Any]:
            self.hold.check()
            sync_file(self.hold.metrics)
            return update_result(self.hold.path, outcome)

        return self.team.on_rank_0(write)

    def free(self) -> None:
        """Settle what has been begun, and give back what the MPI library holds."""
        with contextlib.suppress(RunError):  # another one is on its way
            self._saver.settle()
        self._saver.free()

    def _of_nodes(self, size: int) -> tuple[int, int]:
        """The most bytes that the ranks of a node need, of which each needs `size`, and the least that a node has."""
        total = np.array([size], np.int64)
        self.team.wait([self.run.grid.node.Iallreduce(MPI.IN_PLACE, total)])
        most = np.array([total[0], -memory_available()], np.int64)
        self.team.wait([self.team.comm.Iallreduce(MPI.IN_PLACE, most, MPI.MAX)])
        return int(most[0]), -int(most[1])
