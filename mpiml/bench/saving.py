"""Checkpoints against the disk and against SHA-256, and training while one is written."""

from __future__ import annotations

import hashlib
import subprocess
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

from mpiml.bench.models import Trainer, perceptron
from mpiml.bench.pairs import PAIRS, ratio, seconds
from mpiml.bench.rows import Ratio
from mpiml.run import shared_file
from mpiml.run.checkpoint import texts_of
from mpiml.run.contents import Contents, contents_in
from mpiml.run.saving import File, Saver
from mpiml.run.segments import size_of_copies
from mpiml.team import quiet_barrier
from mpiml.training.arrays import needed_kinds, segments

WORLD = MPI.COMM_WORLD
MB = 1 << 20


class Saving:
    """Saves of the weights and the optimizer's state of a perceptron, one file in the place of another.

    Attributes:
        own: this rank's segments.
    """

    def __init__(self, hidden: int):
        self.trainer: Trainer = perceptron(WORLD, [hidden, hidden], 64, WORLD.size, optimizer="adam")
        self.run, self.path = self.trainer.run, Path("step-000000001.safetensors")
        self.saver = Saver(self.run.grid.team, self.run.grid.node)
        state, layouts = self.run.state, self.run.model.layouts
        layout = layouts[self.run.grid.stage]
        self.own = [
            one for name in state.names for one in segments(layout, name, state.parts[name].collected, once=True)
        ]
        self.contents = Contents.of(needed_kinds(layouts, state.names), texts_of(1, "", "", {}))
        self.saver.copies.claim(size_of_copies(self.own))

    def begin(self, background: bool) -> None:
        """Begin to save."""
        self.path.unlink(missing_ok=True)
        file = File(self.path, self.contents, lambda: lambda: None, lambda: None)
        self.saver.begin(lambda: file, self.own, background)

    def save(self) -> None:
        """Save while training waits."""
        self.begin(background=False)

    def step(self) -> float:
        """A step of training, on all ranks. Returns the seconds that it takes."""
        WORLD.Barrier()
        began = time.perf_counter()
        self.trainer.step()
        self.saver.tick()
        return time.perf_counter() - began

    def hash(self) -> None:
        """SHA-256 of all that this rank saves."""
        for segment in self.own:
            hashlib.sha256(segment.values.data)
        WORLD.Barrier()

    def dd(self) -> None:
        """Write as many bytes by dd, from memory to disk, on rank 0."""
        if WORLD.rank == 0:
            count = -(-self.contents.size // MB)
            command = ["dd", "if=/dev/zero", "of=dd", "bs=1M", f"count={count}", "conv=fsync", "status=none"]
            subprocess.run(command, check=True)
            Path("dd").unlink()
        quiet_barrier(WORLD)


def save(hidden: str) -> Ratio:
    """Bytes/s of a save that training waits for over those of dd or of SHA-256, whichever is slower here."""
    saving = Saving(int(hidden))
    spent = np.array([seconds(saving.hash, 2), seconds(saving.dd, 2)])
    WORLD.Allreduce(MPI.IN_PLACE, spent, MPI.MAX)
    return ratio(WORLD, saving.hash if spent[0] > spent[1] else saving.dd, saving.save, 1)


def save_stall(hidden: str) -> Ratio:
    """The milliseconds for which training stands still for a save in the background."""
    saving, spent = Saving(int(hidden)), list[float]()
    for _ in range(PAIRS + 1):
        saving.path.unlink(missing_ok=True)  # which takes longer than to begin
        quiet_barrier(WORLD)
        began = time.perf_counter()
        saving.begin(background=True)
        spent.append(1000 * (time.perf_counter() - began))
        saving.saver.settle()
    slowest = np.array(spent[1:])
    WORLD.Allreduce(MPI.IN_PLACE, slowest, MPI.MAX)
    return Ratio.of(slowest.tolist())


def save_beside(hidden: str, what: str) -> Ratio:
    """Time of steps while a save is in flight over that of as many steps without. `what`: that, "measured"; or the
    "least" that it can be where all cores are busy: 1 + CPU seconds of a rank for a save / seconds of these steps."""
    saving, ratios = Saving(int(hidden)), list[float]()
    for _ in range(PAIRS + 1):
        quiet_barrier(WORLD)
        saving.begin(background=True)
        beside = [saving.step()]
        while WORLD.allreduce(saving.saver.working, MPI.LOR):
            beside.append(saving.step())
        saving.saver.settle()
        without = [saving.step() for _ in beside]
        began = time.process_time()
        saving.save()
        work = WORLD.allreduce(time.process_time() - began) / WORLD.size
        ratios.append((sum(beside) if what == "measured" else sum(without) + work) / sum(without))
    return Ratio.of(ratios[1:])


def resume(hidden: str) -> Ratio:
    """Bytes/s of reading a checkpoint from the page cache over those of SHA-256."""
    saving = Saving(int(hidden))
    saving.save()
    contents, team = contents_in(saving.path), saving.run.grid.team

    def read() -> None:
        shared_file.load(team, team.size, saving.path, contents, contents.kinds, saving.own, saving.own)

    return ratio(WORLD, saving.hash, read, 1)
