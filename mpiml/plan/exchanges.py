"""The messages of gradient sums on any grid, by direct exchange or by halving; no MPI."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from mpiml.nn.parameters import Layout
from mpiml.parallel import halving, slices
from mpiml.parallel.slices import bounds, elements, owned
from mpiml.parallel.tree import depth, partials, shift_reduce
from mpiml.training.job import Job, sharers
from mpiml.vectors import Block

Counts = NDArray[np.int64]  # bytes or messages: a number for each replica of a stage, or for each node


@functools.cache
def node_partials(first: int, count: int, replicas: int, leaves: int) -> tuple[int, int]:
    """How many partial sums `count` replicas of one memory are left with, and how many of them have several sources."""
    ranges = [covers for replica in range(first, first + count) for covers in partials(replica, replicas, leaves)]
    left = shift_reduce(ranges, leaves)[1]
    return len(left), len(set(left) - set(ranges))


@functools.cache
def depths(replicas: int, microbatches: int, leaf: int = 1) -> Counts:
    """For each replica, how many gradient vectors it needs (mpiml.parallel.tree)."""
    return np.array([depth(replica, replicas, microbatches, leaf) for replica in range(replicas)])


@dataclass(frozen=True)
class Traffic:
    """Messages of one sum over replicas (mpiml.parallel.exchange); all in bytes but `messages`.

    Attributes:
        slices: by replica, what it owns of the vector.
        gradients_out, gradients_in: by replica, partial sums that it sends and receives.
        values_out, values_in: by replica, new values that it sends and receives.
        packed: by replica, buffers for partial sums that it adds up only to send them.
        messages: by replica, how many it sends.
        gradients_abroad, values_abroad: by node of the job, what its replicas send to other nodes.
        gradients_received, values_received: by node of the job, what comes from other nodes.
    """

    slices: Counts
    gradients_out: Counts
    gradients_in: Counts
    values_out: Counts
    values_in: Counts
    packed: Counts
    messages: Counts
    gradients_abroad: Counts
    values_abroad: Counts
    gradients_received: Counts
    values_received: Counts

    @classmethod
    def none(cls, replicas: int, nodes: int) -> Traffic:
        """No messages."""
        return cls(*np.zeros((7, replicas), np.int64), *np.zeros((4, nodes), np.int64))

    def add(self, other: Traffic, replicas: slice) -> None:
        """Have the messages of a sum over some of the replicas, too."""
        for field in fields(self):
            of_nodes = field.name.endswith(("abroad", "received"))
            getattr(self, field.name)[slice(None) if of_nodes else replicas] += getattr(other, field.name)


def traffic(job: Job, stage: int) -> Traffic:
    """The messages of the canonical sums of a stage's gradients in a step; none with --allreduce mpi, where the library
    decides."""
    layout, everything = job.stages[stage].layout, Traffic.none(job.replicas, job.nodes)
    item = layout.dtype.itemsize
    if job.config.allreduce == "mpi" or job.members == 1:
        everything.slices[:] = layout.updated * item if job.config.allreduce == "mpi" else _of_one(layout) * item
        return everything
    nodes = halved(job, stage)
    if nodes:
        shares = np.array(
            [[list(map(bounds, lane)) for lane in halving.lanes(run, *nodes)] for run in runs_of_buckets(job, stage)],
            np.int64,
        )
        packs = node_partials(0, nodes[1], job.members, job.worker_leaves)[1] > 0
        for group, homes in enumerate(job.group_homes(stage)):
            part = _halved(shares, item, homes, job.nodes, packs)
            everything.add(part, slice(group * job.members, (group + 1) * job.members))
        return everything
    further = [run for place in layout.further_blocks() for run in slices.runs(place, 0, job.members)]
    for runs, published in ((owned_runs(job, stage), True), ([owned(run, job.members) for run in further], False)):
        limits = np.array([[bounds(blocks) for blocks in run] for run in runs], np.int64).reshape(-1, job.members, 2)
        for group, homes in enumerate(job.group_homes(stage)):
            lengths = np.diff(limits)[..., 0]
            part = direct(lengths, item, homes, job.nodes, job.shared, job.worker_leaves, published)
            everything.add(part, slice(group * job.members, (group + 1) * job.members))
    return everything


def halved(job: Job, stage: int) -> tuple[int, int] | None:
    """The nodes of each group of a stage and the replicas on each, if they exchange by halving, as place.py decides."""
    if job.config.allreduce == "mpi":
        return None
    layout, groups = job.stages[stage].layout, {tuple(sharers(homes, job.shared)) for homes in job.group_homes(stage)}
    nodes = next(iter(groups))
    if len(groups) > 1 or not halving.faster(nodes, job.worker_leaves, _blocks(layout), layout.dtype.itemsize):
        return None
    return len(nodes), nodes[0]


def exchange_text(job: Job) -> str:
    """How the nodes that have a stage exchange its sums; nothing where none has to."""
    groups = [homes for stage in range(len(job.stages)) for homes in job.group_homes(stage)]
    if job.config.allreduce == "mpi" or all(len(sharers(homes, job.shared)) == 1 for homes in groups):
        return ""
    halve = {stage: nodes for stage in range(len(job.stages)) if (nodes := halved(job, stage))}
    if not halve:
        return "nodes exchange sums directly"
    stages = "" if len(halve) == len(job.stages) else f" of stages {', '.join(map(str, halve))}"
    counts = sorted({count for count, _ in halve.values() if halving.owners(count) < count})
    few = " or ".join(f"{halving.owners(count):,} of {count:,}" for count in counts)
    text = f"nodes exchange sums{stages} by halving"
    return f"{text}; {few} nodes hold optimizer state and update" if few else text


def _halved(shares: Counts, item: int, homes: Counts, all_nodes: int, packs: bool) -> Traffic:
    """The messages of a sum by halving (mpiml.parallel.halving).

    Args:
        shares: where each share of each lane starts and stops: (buckets, lanes, shares, 2); `item` bytes an element.
        homes, all_nodes: as of `direct`.
        packs: whether replicas add up their node's partial sum only to send it.
    """
    _, lanes, count, _ = shares.shape
    nodes, made = len(homes) // lanes, Traffic.none(len(homes), all_nodes)
    # Shares lie one after another, some of them empty: where the first one from here on starts, the last one stops.
    starts = np.where(shares[..., 0] < shares[..., 1], shares[..., 0], shares.max(initial=0))
    starts = np.minimum.accumulate(starts[..., ::-1], -1)[..., ::-1]
    stops = np.maximum.accumulate(shares[..., 1], -1)

    def lengths(first: int, last: int) -> Counts:
        sizes: Counts = stops[..., last - 1] - starts[..., first]
        return np.maximum(sizes, 0) * item

    for node in range(nodes):
        own, number = slice(node * lanes, (node + 1) * lanes), halving.share(node, nodes)
        made.packed[own] = lengths(0, count).sum(0) * packs
        made.slices[own] = 0 if number is None else lengths(number, number + 1).sum(0)
        for one in halving.rounds(node, nodes):
            for to, part in one.sends:
                each, other = lengths(*part), slice(to * lanes, (to + 1) * lanes)
                for replicas, sent, come in (
                    (own, made.gradients_out, made.values_in),
                    (other, made.values_out, made.gradients_in),
                ):
                    sent[replicas] += each.sum(0)
                    come[replicas] += each.sum(0)
                    made.messages[replicas] += (each > 0).sum(0)
                here, there = homes[own.start], homes[other.start]
                if here != there:
                    for amounts, home in (
                        (made.gradients_abroad, here),
                        (made.gradients_received, there),
                        (made.values_abroad, there),
                        (made.values_received, here),
                    ):
                        amounts[home] += each.sum()
    return made


def owned_runs(job: Job, stage: int) -> list[list[Sequence[Block]]]:
    """For each bucket, the blocks that each member of a group owns."""
    nodes = halved(job, stage)
    if nodes:
        return [halving.of_replicas(halving.lanes(run, *nodes), nodes[0]) for run in runs_of_buckets(job, stage)]
    return [owned(run, job.members) for run in runs_of_buckets(job, stage)]


def direct(
    owned_elements: Counts,
    item: int,
    homes: Counts,
    all_nodes: int,
    shared: bool,
    contributions: int,
    published: bool = True,
) -> Traffic:
    """The messages of a sum.

    mpiml.parallel.tree.sum_plan lists every message of one replica: too many to list for thousands of replicas, which
    need their number alone. A test holds that both agree.

    Args:
        owned_elements: what each replica owns of each bucket: (buckets, replicas); `item` bytes each.
        homes: the node of each replica, of `all_nodes`; shared: whether those of a node have one memory.
        contributions: of all replicas together.
        published: whether there are values, which go back; of the gradient at a further place of an array, there are
            none.
    """
    replicas, back = len(homes), int(published)
    lengths, parts = owned_elements.sum(axis=0) * item, (owned_elements > 0).sum(axis=0)
    counts = np.array(sharers(homes, shared))  # replicas of each group that shares a memory
    firsts, others = np.cumsum(counts) - counts, len(counts) - 1
    left = [node_partials(*group, replicas, contributions) for group in zip(firsts, counts, strict=True)]
    partial, added = np.repeat(np.array(left), counts, axis=0).T  # of each replica's group
    lane_bytes, lane_parts = _of_lanes(counts, lengths), _of_lanes(counts, parts)

    def of_nodes(nodes: Counts, amounts: Counts) -> Counts:
        return np.bincount(nodes, amounts, all_nodes).astype(np.int64)

    node_bytes = of_nodes(homes, lengths)
    node_partial_sums, node_groups = (of_nodes(homes[firsts], each) for each in (partial[firsts], np.ones_like(firsts)))
    return Traffic(
        slices=back * lengths,
        gradients_out=partial * lane_bytes,
        gradients_in=(partial[firsts].sum() - partial) * lengths,
        values_out=back * others * lengths,
        values_in=back * lane_bytes,
        packed=added * lane_bytes,
        messages=partial * lane_parts + back * others * parts,
        gradients_abroad=node_partial_sums * (lengths.sum() - node_bytes),
        values_abroad=back * node_bytes * (len(counts) - node_groups),
        gradients_received=node_bytes * (node_partial_sums.sum() - node_partial_sums),
        values_received=back * node_groups * (lengths.sum() - node_bytes),
    )


def _of_lanes(counts: Counts, amounts: Counts) -> Counts:
    """For each replica, the sum of `amounts` over the replicas of other groups whose partner it is
    (mpiml.parallel.tree.partners): those whose number modulo the size of its group is its own number in the group."""
    owners = np.arange(len(amounts))
    sizes, firsts = np.repeat(counts, counts), np.repeat(np.cumsum(counts) - counts, counts)
    lanes = owners - firsts
    everyone = np.zeros_like(amounts)
    for size in set(counts.tolist()):
        alike = sizes == size
        everyone[alike] = np.bincount(owners % size, amounts, size)[lanes[alike]]
    everyone -= amounts[firsts + (lanes - firsts) % sizes]  # each lane has one replica of the group itself
    return everyone


def runs_of_buckets(job: Job, stage: int) -> list[Sequence[Block]]:
    """The runs of blocks that are exchanged at once."""
    layout = job.stages[stage].layout
    several = any(len(sharers(homes, job.shared)) > 1 for homes in job.group_homes(stage))
    size = elements(job.config.bucket, layout.dtype) if several else 0
    return slices.runs(_blocks(layout), size, job.members)


@functools.lru_cache(1)  # there may be many, and they are needed several times, stage by stage
def _blocks(layout: Layout) -> list[Block]:
    return layout.blocks()


def _of_one(layout: Layout) -> int:
    """The elements of a vector that one replica alone owns, from its first block to its last."""
    start, stop = bounds(_blocks(layout))
    return stop - start
