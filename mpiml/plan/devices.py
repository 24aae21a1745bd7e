"""Memory on the devices of a job's ranks, on any grid; no MPI, and no device is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpiml.command import plural, size, table
from mpiml.plan.exchanges import Counts, depths
from mpiml.plan.sums import states
from mpiml.training.device_memory import DeviceVectors, constants_of, vectors_on_device
from mpiml.training.job import Job


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes that ranks of a stage hold on their devices: by replica its vectors, and the activations of micro-batches
    in flight."""

    vectors: list[DeviceVectors]
    activations: Counts

    @property
    def held(self) -> Counts:
        return np.array([one.total for one in self.vectors], np.int64) + self.activations


@dataclass(frozen=True)
class DeviceLine:
    """What the rank of a stage that holds most on its device holds there, in bytes: see DeviceVectors; `total` is the
    sum of all."""

    values: int
    gradient_vectors: int
    gradients: int
    state: int
    scratch: int
    constants: int
    activations: int
    total: int


def memory_of(job: Job, stage: int, activations: Counts) -> DeviceMemory:
    """What a stage holds on devices, with so many bytes of `activations` by replica."""
    design, counts = job.stages[stage], slots(job).tolist()
    constants = constants_of(design.layers)
    of_slots = {
        count: vectors_on_device(design.layout, count, states(job), job.owners, job.copies, constants)
        for count in set(counts)
    }
    return DeviceMemory([of_slots[count] for count in counts], activations)


def line(job: Job, memory: DeviceMemory) -> DeviceLine:
    """The line of a stage on the screen."""
    rank = int(np.argmax(memory.held))
    vectors = memory.vectors[rank]
    return DeviceLine(
        values=vectors.values,
        gradient_vectors=int(slots(job)[rank]),
        gradients=vectors.gradients,
        state=vectors.state,
        scratch=vectors.scratch,
        constants=vectors.constants,
        activations=int(memory.activations[rank]),
        total=int(memory.held[rank]),
    )


def fullest(job: Job, memories: Sequence[DeviceMemory]) -> int:
    """The bytes that the ranks of the fullest device hold there together; of a rank, if it is not known which share
    one."""
    held = np.concatenate([memory.held for memory in memories])
    if job.node_devices is None:
        return int(held.max())
    node, own = np.divmod(np.arange(len(held)), job.node_ranks)
    return int(np.bincount(node * job.node_devices + own % job.node_devices, held).max())


def sharing(job: Job) -> int:
    """The most ranks that share a device; 0 if that is not known."""
    most = min(job.ranks, job.node_ranks)
    if job.node_devices:
        return -(-most // job.node_devices)
    return 1 if job.owners or not job.config.share_devices or most == 1 else 0


def screen(kind: str, lines: Sequence[DeviceLine], owners: bool, shared_by: int, most: int) -> list[str]:
    """The memory on devices as text. Arguments are those of mpiml.plan.sizing.Plan."""
    heads = ["stage", "values", "gradients", *["optimizer", "scratch"] * owners, "constants", "activations"]
    rows = [[*heads, "device memory"]]
    for number, one in enumerate(lines):
        each = one.gradients // one.gradient_vectors
        gradients = f"{one.gradient_vectors} x {size(each)}" if one.gradient_vectors > 1 else size(each)
        update = [size(one.state), size(one.scratch)] * owners
        rows.append(
            [str(number), size(one.values), gradients, *update, *map(size, (one.constants, one.activations, one.total))]
        )
    where = "the update is made there" if owners else "the update is made on the host"
    text = f"device memory of each stage's fullest rank (--device {kind}): {where}"
    held = f"at most {size(most)} a rank"
    if shared_by > 1:
        held = f"at most {size(most)} a device, which {plural(shared_by, 'rank')} share"
    held += ", without PyTorch, its libraries, and what a pass needs for a moment"
    unknown = ["several ranks use one device together: --node-devices N says how much"] * (not shared_by)
    return [*table(rows, "r" * len(rows[0])), text, held, *unknown]


def slots(job: Job) -> Counts:
    """By replica, its vectors of gradients."""
    return np.tile(depths(job.members, job.worker_microbatches, job.config.leaf), job.groups)
