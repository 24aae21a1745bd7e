"""The canonical order of the gradient sum, and how ranks share the work of it; no MPI.

The sum over micro-batches 0..total-1 is a balanced binary tree: node (l, i) covers [i 2^l, (i+1) 2^l) clipped to
`total`, and a missing right child passes the left one up. Whoever holds what, each addition of the tree is made
with the same two operands, so the sum has the same bits on every layout.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mpiml.partition import part

Range = tuple[int, int]


def shift_reduce(ranges: Iterable[Range], total: int) -> tuple[list[int], list[Range]]:
    """Plan the sum of contributions that cover `ranges` of micro-batches and come in this order.

    Returns:
        How many times, after each contribution is put on a stack, the top is to be added into the one below it;
        and the ranges that then stay on the stack: the maximal nodes of the canonical tree.
    """
    stack: list[Range] = []
    counts = []
    for contribution in ranges:
        stack.append(contribution)
        count = 0
        while len(stack) > 1 and _is_node(stack[-2], stack[-1], total):
            right = stack.pop()
            stack[-1] = (stack[-1][0], right[1])
            count += 1
        counts.append(count)
    return counts, stack


def _is_node(left: Range, right: Range, total: int) -> bool:
    (low, middle), (next_low, high) = left, right
    size = middle - low
    return middle == next_low and low % (2 * size) == 0 and high == min(low + 2 * size, total)


def slots(counts: Sequence[int]) -> list[int]:
    """The stack's depth at which each contribution of a plan is put."""
    depths, depth = [], 0
    for count in counts:
        depths.append(depth)
        depth += 1 - count
    return depths


@dataclass(frozen=True)
class Source:
    """A contribution to a sum: the partial sum number `partial` of local rank `rank`, or of another node `node`."""

    covers: Range
    partial: int
    rank: int = 0
    node: int | None = None


@dataclass(frozen=True)
class Message:
    """A partial sum of this node, for the slice that replica `owner` owns; sources and counts as in shift_reduce."""

    owner: int
    partial: int
    sources: list[Source]
    counts: list[int]


@dataclass
class Plan:
    """What one replica does for the sum: nodes are groups of neighbouring replicas that share memory.

    Attributes:
        block: its micro-batches.
        counts, slots: how it sums them (see shift_reduce), in `depth` vectors.
        sources, root_counts: what it adds up for the slice that it owns, in order.
        messages: what it sends, for slices owned on other nodes; `lanes` to whom it sends its own slice's values,
            `owners` from whom it receives values.
    """

    block: Range
    depth: int
    counts: list[int]
    slots: list[int]
    sources: list[Source]
    root_counts: list[int]
    messages: list[Message] = field(default_factory=list)
    lanes: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)


def plan(replica: int, nodes: Sequence[int], total: int) -> Plan:
    """The plan of one replica.

    Args:
        replica: which.
        nodes: the number of replicas on each node, in replica order.
        total: the number of micro-batches of a step.
    """
    *firsts, replicas = itertools.accumulate(nodes, initial=0)
    home = max(node for node, first in enumerate(firsts) if first <= replica)
    local = replica - firsts[home]

    def ranks(node: int) -> list[Source]:
        return [
            Source(covers, partial, rank=rank)
            for rank in range(nodes[node])
            for partial, covers in enumerate(partials(firsts[node] + rank, replicas, total))
        ]

    def node_partials(node: int) -> list[Source]:
        left = shift_reduce([source.covers for source in ranks(node)], total)[1]
        return [Source(covers, partial, node=node) for partial, covers in enumerate(left)]

    sources = [s for node in range(len(nodes)) for s in (ranks(node) if node == home else node_partials(node))]
    root_counts, root = shift_reduce([source.covers for source in sources], total)
    assert root == [(0, total)], f"the plan sums {root} instead of all {total} micro-batches"

    block = part(replica, replicas, total)
    counts = shift_reduce(_singles(block), total)[0]
    result = Plan(block, depth(replica, replicas, total), counts, slots(counts), sources, root_counts)
    here = ranks(home)
    contents = []
    for partial in node_partials(home):
        low, high = partial.covers
        inside = [source for source in here if low <= source.covers[0] and source.covers[1] <= high]
        contents.append((partial.partial, inside, shift_reduce([source.covers for source in inside], total)[0]))
    elsewhere = (owner for owner in range(replicas) if not firsts[home] <= owner < firsts[home] + nodes[home])
    for owner in elsewhere:
        if owner % nodes[home] == local:
            result.owners.append(owner)
            result.messages += [Message(owner, *content) for content in contents]
    result.lanes = [speaker for node, speaker in enumerate(lanes(replica, nodes)) if node != home]
    return result


def lanes(owner: int, nodes: Sequence[int]) -> list[int]:
    """The replica on each node that speaks with `owner`: slice modulo local ranks, so that all links are used."""
    return [first + owner % size for first, size in zip(itertools.accumulate(nodes, initial=0), nodes, strict=False)]


def depth(replica: int, replicas: int, total: int) -> int:
    """How many vectors a replica needs for the sum of its own micro-batches."""
    return 1 + max(slots(shift_reduce(_singles(part(replica, replicas, total)), total)[0]), default=0)


def partials(replica: int, replicas: int, total: int) -> list[Range]:
    """What remains of a replica's own micro-batches after it has added up what it can alone."""
    return shift_reduce(_singles(part(replica, replicas, total)), total)[1]


def _singles(block: Range) -> list[Range]:
    return [(m, m + 1) for m in range(*block)]


def aligned(replicas: int, total: int) -> bool:
    """Whether every replica's micro-batches sum to one node of the tree, which keeps messages shortest."""
    return all(len(partials(replica, replicas, total)) == 1 for replica in range(replicas))
