"""The canonical order of the gradient sum, and how the replicas of a stage share the work; no MPI.

The sum over leaves 0..total-1 is a balanced binary tree: node (l, i) covers [i 2^l, (i+1) 2^l) clipped to `total`, and
a missing right child passes the left one up. A leaf is a micro-batch, or a run of `leaf` of them, added one after the
other. Whichever ranks hold the operands, each addition has the same two, so the sum has the same bits on every layout.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mpiml.partition import part

Range = tuple[int, int]
T = TypeVar("T")


def shift_reduce(ranges: Iterable[Range], total: int) -> tuple[list[int], list[Range]]:
    """Plan the sum of contributions that cover `ranges` of leaves and come in this order.

    Returns for each contribution how many times the top of the stack is added into the one below it once the
    contribution has been pushed; and the ranges that stay on the stack at the end: the canonical tree's maximal nodes.
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


def added(ranges: Sequence[Range], values: Iterable[T], total: int) -> tuple[list[Range], list[T]]:
    """Add up `values` as shift_reduce plans it for their `ranges`: the ranges that stay on the stack and their sums. No
    more values are asked for than the stack has room for, about log2 of their number."""
    counts, left = shift_reduce(ranges, total)
    stack: list[Any] = []
    for count, value in zip(counts, values, strict=True):
        stack.append(value)
        for _ in range(count):
            right = stack.pop()
            stack[-1] = stack[-1] + right
    return left, stack


def _is_node(left: Range, right: Range, total: int) -> bool:
    (low, middle), (next_low, high) = left, right
    size = middle - low
    return middle == next_low and low % (2 * size) == 0 and high == min(low + 2 * size, total)


def slots(counts: Sequence[int]) -> list[int]:
    """For each contribution of a plan, the place in the stack to which it is pushed, from 0 on."""
    depths, depth = [], 0
    for count in counts:
        depths.append(depth)
        depth += 1 - count
    return depths


@dataclass(frozen=True)
class Contribution:
    """Partial sum number `partial`, of the leaves `covers`: of local rank `rank`, or of another node `node`."""

    covers: Range
    partial: int
    rank: int = 0
    node: int | None = None


@dataclass(frozen=True)
class Message:
    """Partial sum number `partial` of this node, which goes to the replica `owner` for its slice: how this node's
    contributions make it, with counts as in shift_reduce."""

    owner: int
    partial: int
    contributions: list[Contribution]
    counts: list[int]


@dataclass(frozen=True)
class SumPlan:
    """What one replica does for the sum.

    Attributes:
        microbatches: its own.
        counts, slots: how it sums them (see shift_reduce), in `depth` vectors.
        contributions, root_counts: what it adds up for the slice that it owns, in this order.
        messages: the partial sums that it sends to the owners of other slices.
    """

    microbatches: Range
    depth: int
    counts: list[int]
    slots: list[int]
    contributions: list[Contribution]
    root_counts: list[int]
    messages: list[Message]


def sum_plan(replica: int, nodes: Sequence[int], microbatches: int, leaf: int = 1) -> SumPlan:
    """The plan of one replica for a step of so many micro-batches, `leaf` to a leaf. `nodes` are the numbers of
    replicas on each node, in replica order; those of a node share memory."""
    total = microbatches // leaf
    *firsts, replicas = itertools.accumulate(nodes, initial=0)
    home, _ = _home(replica, nodes)

    def of_ranks(node: int) -> list[Contribution]:
        return [
            Contribution(covers, partial, rank=rank)
            for rank in range(nodes[node])
            for partial, covers in enumerate(partials(firsts[node] + rank, replicas, total))
        ]

    def of_node(node: int) -> list[Contribution]:
        left = _reduce(of_ranks(node), total)[1]
        return [Contribution(covers, partial, node=node) for partial, covers in enumerate(left)]

    contributions = [c for node in range(len(nodes)) for c in (of_ranks(node) if node == home else of_node(node))]
    root_counts, root = _reduce(contributions, total)
    assert root == [(0, total)], f"the plan sums {root} instead of all {total} leaves"

    local, contents = of_ranks(home), []
    for sent in of_node(home):
        low, high = sent.covers
        inside = [c for c in local if low <= c.covers[0] and c.covers[1] <= high]
        contents.append((sent.partial, inside, _reduce(inside, total)[0]))
    counts = _own(replica, replicas, microbatches, leaf)
    return SumPlan(
        microbatches=part(replica, replicas, microbatches, leaf),
        depth=depth(replica, replicas, microbatches, leaf),
        counts=counts,
        slots=slots(counts),
        contributions=contributions,
        root_counts=root_counts,
        messages=[Message(owner, *content) for owner in links(replica, nodes)[1] for content in contents],
    )


def partners(owner: int, nodes: Sequence[int]) -> list[int]:
    """On each node, the replica that exchanges messages about the slice of `owner`: for neighbouring owners different
    ones, so that all replicas of a node share its traffic."""
    return [first + owner % size for first, size in zip(itertools.accumulate(nodes, initial=0), nodes, strict=False)]


def links(replica: int, nodes: Sequence[int]) -> tuple[list[int], list[int]]:
    """The replicas of other nodes with which a replica exchanges messages: its partners, for its own slice; and the
    owners whose partner it is, for theirs."""
    home, first = _home(replica, nodes)
    local = range(first, first + nodes[home])
    others = [partner for node, partner in enumerate(partners(replica, nodes)) if node != home]
    owners = range(replica - first, sum(nodes), nodes[home])
    return others, [owner for owner in owners if owner not in local]


def _home(replica: int, nodes: Sequence[int]) -> tuple[int, int]:
    """The node of a replica, and that node's first replica."""
    *firsts, _ = itertools.accumulate(nodes, initial=0)
    return max((node, first) for node, first in enumerate(firsts) if first <= replica)


def depth(replica: int, replicas: int, microbatches: int, leaf: int = 1) -> int:
    """How many vectors a replica needs for the sum of its own micro-batches: as many as for its leaves, and one more
    for what is added to a leaf."""
    return 1 + max(slots(_of_leaves(replica, replicas, microbatches // leaf)), default=0) + (leaf > 1)


def partials(replica: int, replicas: int, total: int) -> list[Range]:
    """The partial sums of a replica: what its own leaves are once it has added up all that it can alone, the largest
    nodes of the tree that lie within them."""
    (low, high), ranges = part(replica, replicas, total), list[Range]()
    while low < high:
        size = low & -low or 1 << total.bit_length()
        while min(low + size, total) > high:
            size //= 2
        ranges.append((low, min(low + size, total)))
        low = ranges[-1][1]
    return ranges


def _own(replica: int, replicas: int, microbatches: int, leaf: int) -> list[int]:
    """How a replica sums its own micro-batches, with counts as of shift_reduce: those of a leaf are added to its first,
    and after the last one the leaf is merged into what lies below it."""
    counts = []
    for merged in _of_leaves(replica, replicas, microbatches // leaf):
        counts += [0, *[1] * (leaf - 1)]
        counts[-1] += merged
    return counts


def _of_leaves(replica: int, replicas: int, total: int) -> list[int]:
    """How a replica adds up its own leaves: the counts of shift_reduce."""
    return shift_reduce([(one, one + 1) for one in range(*part(replica, replicas, total))], total)[0]


def _reduce(contributions: Iterable[Contribution], total: int) -> tuple[list[int], list[Range]]:
    return shift_reduce([contribution.covers for contribution in contributions], total)


def aligned(replicas: int, total: int) -> bool:
    """Whether every replica's leaves sum to one node of the tree, which keeps messages shortest."""
    return all(len(partials(replica, replicas, total)) == 1 for replica in range(replicas))
