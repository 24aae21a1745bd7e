"""Messages between stages that have the same array (mpiml.parallel.ties); no MPI."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import numpy as np

from mpiml.nn import base as nn
from mpiml.nn.parameters import Parameter
from mpiml.parallel.slices import owned
from mpiml.plan.exchanges import Counts
from mpiml.training.job import Job


def _arrays(job: Job) -> Iterator[tuple[Parameter, Counter[int]]]:
    """Each array that is trained and stands in several layers, with the number of its places on each stage."""
    places: dict[Parameter, Counter[int]] = {}
    for number, stage in enumerate(job.stages):
        for parameter in nn.parameters(stage.layers):
            if parameter.places and not parameter.frozen:
                places.setdefault(parameter.first, Counter())[number] += 1
    yield from places.items()


def received(job: Job, stage: int) -> Counts:
    """By replica, the bytes of the sums that it receives of the places on other stages."""
    layout, total = job.stages[stage].layout, np.zeros(job.members, np.int64)
    for array, places in _arrays(job):
        if places[stage]:
            blocks = [block for block in layout.blocks() if block.array == array.name]
            own = [sum(block.stop - block.start for block in run) for run in owned(blocks, job.members)]
            whole = [array.size] * job.members
            each = np.array(whole if job.config.allreduce == "mpi" else own)
            total += each * (places.total() - places[stage]) * layout.dtype.itemsize
    return np.tile(total, job.groups)


def sent(job: Job) -> tuple[float, float]:
    """The bytes that all ranks together send in a step: between nodes, and to ranks of the same node."""
    between = within = 0.0
    copies = job.replicas if job.config.allreduce == "mpi" else job.groups
    for array, places in _arrays(job):
        for one, other in itertools.permutations(places, 2):
            size = places[one] * array.size * job.stages[one].layout.dtype.itemsize * copies * job.copies
            crossing = float(np.mean(job.homes(one) != job.homes(other)))
            between, within = between + size * crossing, within + size * (1 - crossing)
    return between, within
