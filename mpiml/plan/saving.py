"""What saving takes on any grid: the bytes of a checkpoint, and of copies of what is saved; no MPI."""

from __future__ import annotations

import numpy as np

from mpiml.nn import base as nn
from mpiml.parallel.slices import owned, pieces
from mpiml.plan.exchanges import Counts, owned_runs, runs_of_buckets
from mpiml.plan.sums import Averaging, outer, states
from mpiml.training.job import Job
from mpiml.vectors import ALIGNMENT, bytes_of


def checkpoint(job: Job, workers: int) -> int:
    """The bytes of a checkpoint's vectors: of the model, and of so many workers that each have their own."""
    kept = states(job)
    updated = (0 if workers else kept) + outer(job) + workers * (1 + kept)
    layouts = [stage.layout for stage in job.stages]
    total = sum((layout.size + updated * layout.updated) * layout.dtype.itemsize for layout in layouts)
    again = [(p, layout.dtype) for layout in layouts for p in layout.parameters if p.first is not p]  # saved once
    return total - sum(bytes_of(p.size, dtype) * (1 + updated * (not p.frozen)) for p, dtype in again)


def copies(job: Job, stage: int, average: Averaging | None) -> Counts:
    """By replica, the bytes of its copy of what it saves of a stage, so that training can go on meanwhile, as
    mpiml.training.storage.Store.claim asks for them; without what --normalize and --fill keep. `average` is that of
    workers, if they learn apart. Ranks that hold the same (mpiml.parallel.state.parts) have a share of it each.
    """
    taken = np.zeros(job.replicas, np.int64)
    if job.config.save == "sync" or not job.config.save_every:
        return taken
    layout = job.stages[stage].layout
    alone = job.config.allreduce == "mpi" or job.owners  # where each holds everything
    dtype = layout.dtype
    runs = [[run] for run in runs_of_buckets(job, stage)] if alone else owned_runs(job, stage)
    shares = job.replicas if alone else job.groups
    for member in range(len(runs[0]) if runs else 0):
        held = sorted((piece for run in runs for piece in pieces(run[member])), key=lambda piece: piece.start)
        for number, share in enumerate(owned(held, shares) if held else []):
            taken[number if alone else number * job.members + member] = sum(
                bytes_of(stop - start, dtype) * (1 + states(job) * (piece.momentum is None))
                for piece in share
                if piece.counted
                for start, stop in piece.blocks
            )
    if average and outer(job):
        counts = np.arange(job.replicas) % job.members == 0 if alone else True
        taken += -(-average.mean.slices // ALIGNMENT) * ALIGNMENT * counts
    taken[0] += sum(bytes_of(p.size, dtype) for p in layout.parameters if p.frozen and p.first is p)
    taken[0] += 0 if stage else _constants(job)
    return taken


def mirror(job: Job, stage: int) -> int:
    """The bytes of a rank's copies on the host of values and state on a device of its own: of the values, which are
    drawn on the host, and of the state once it is saved (mpiml.parallel.on_device.Mirror)."""
    layout = job.stages[stage].layout
    updated = states(job) * layout.updated * bool(job.config.save_every)
    return bytes_of(layout.size + updated, layout.dtype) if job.owners else 0


def _constants(job: Job) -> int:
    """The bytes of the constants of all stages, which rank 0 saves."""
    every = nn.constants([layer for stage in job.stages for layer in stage.layers]).values()
    return sum(bytes_of(one.array.size, one.array.dtype) for one in every if one.saved)
