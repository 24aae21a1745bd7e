"""Halving along the canonical tree: how nodes sum and share what each holds in few messages; no MPI.

Where the partial sums of nodes are nodes of the canonical tree, two siblings hold the same part of the vector. They
exchange halves of it, and each adds left + right for the half that it keeps: after log2 of the number of nodes rounds
each owns a share of the sum, with the bits of the tree. A right sibling that is smaller hands its part over to the
left one, so that owners are the largest power of two of the nodes. New values go the same way back.
Recursive halving: Rabenseifner, "Optimization of collective reduction operations", ICCS 2004.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from mpiml.parallel.slices import Range, bounds, owned
from mpiml.vectors import Block

# What is assumed of a fast network when an exchange is chosen, as in LogGP (Alexandrov et al., SPAA 1995): seconds
# until a message arrives, that a core needs to send one or to receive one, and that a node's link needs for each.
LATENCY, OVERHEAD, GAP = 1.5e-6, 0.5e-6, 1e-8
# Bytes per second of a node's link, that a core adds up, and that it updates, which moves four times as much memory.
LINK, ADD, UPDATE = 12.5e9, 4e9, 1e9
# The fewest nodes that halve: fewer have at most 30 others, which by these constants send to a core in 30 microseconds,
# and in each round of halving a node waits for one that may be late.
FEWEST = 32
CLEARLY = 2 / 3  # of the time of the direct exchange, or less: the constants are none of the machine's own


@dataclass(frozen=True)
class Round:
    """What a node does in a round. Ranges are of shares, as many as there are owners in the end.

    Attributes:
        sends: (to node, range).
        source: the node whose partial sum of `kept` comes; None in the last round of a node that hands its part over.
        kept: what the node goes on with.
    """

    sends: list[tuple[int, Range]]
    source: int | None
    kept: Range


def owners(nodes: int) -> int:
    """How many nodes own a share in the end, the first ones: the largest power of two."""
    return 1 << nodes.bit_length() - 1


def share(node: int, nodes: int) -> int | None:
    """The number of the share that a node owns in the end, if it owns one."""
    return _reversed(node, nodes.bit_length() - 1) if node < owners(nodes) else None


def lanes(run: Sequence[Block], nodes: int, of_node: int) -> list[list[Sequence[Block]]]:
    """The shares of each lane in a run of blocks, which its nodes own in the end. Where lanes have fewer blocks than
    shares, those of neighbouring lanes are in other shares, so that they belong to other nodes."""
    return [owned(part, owners(nodes), lane / of_node) for lane, part in enumerate(owned(run, of_node))]


def of_replicas(shares: Sequence[Sequence[Sequence[Block]]], nodes: int) -> list[Sequence[Block]]:
    """What each replica owns in the end of `shares` of lanes."""
    numbers = (share(node, nodes) for node in range(nodes))
    return [[] if one is None else of_lane[one] for one in numbers for of_lane in shares]


def rounds(node: int, nodes: int) -> list[Round]:
    """All rounds of a node, from the leaves of the tree to its root: one on each level on which it has a sibling."""
    made = list[Round]()
    kept = (0, owners(nodes))
    for level in range((nodes - 1).bit_length()):
        size = 1 << level
        first = node // (2 * size) * (2 * size)
        middle = first + size
        if middle >= nodes:
            continue
        rights = owners(min(nodes - middle, size))
        width, shift = owners(nodes) >> level, level - (rights.bit_length() - 1)
        if rights == size:
            made.append(_exchange(node, size, kept))
            kept = made[-1].kept
        elif node < middle:
            giver = _reversed(kept[0] // width >> shift, level - shift)
            made.append(Round([], middle + giver, kept))
        else:
            parts = range(kept[0] // width, kept[1] // width)
            sends = [(first + _reversed(one, level), (one * width, (one + 1) * width)) for one in parts]
            return [*made, Round(sends, None, (0, 0))]
    return made


def _exchange(node: int, size: int, held: Range) -> Round:
    """The round of siblings of `size` nodes each, of which both hold this range: the left one keeps its first half."""
    half = sum(held) // 2
    first, second = (held[0], half), (half, held[1])
    kept, sent = (second, first) if node & size else (first, second)
    return Round([(node ^ size, sent)], node ^ size, kept)


def _reversed(number: int, bits: int) -> int:
    """The number with its lowest `bits` bits in reverse order."""
    return int(f"{number:0{bits}b}"[::-1], 2) if bits else 0


def fits(nodes: Sequence[int], leaves: int) -> bool:
    """Whether each node's partial sum is a node of the tree over `leaves`, on the same level: there are several nodes,
    with equally many replicas as `nodes` says, and a power of two of leaves for each."""
    each, rest = divmod(leaves, len(nodes))
    return len(nodes) > 1 and len(set(nodes)) == 1 and not rest and each.bit_count() == 1


def faster(nodes: Sequence[int], leaves: int, blocks: Sequence[Block], item: int) -> bool:
    """Whether halving can be used, and is clearly faster than the direct exchange (mpiml.parallel.exchange) of a vector
    of these blocks with `item` bytes an element, by the constants above. A vector with arrays that stand in several
    layers is not halved: ranks of equal number own equal slices of these on all stages, on whatever nodes they are."""
    if not blocks or any(block.array for block in blocks):
        return False
    if len(nodes) < FEWEST or not fits(nodes, leaves):
        return False
    direct, halved = seconds(len(nodes), nodes[0], blocks, item)
    return halved < CLEARLY * direct


def seconds(count: int, of_node: int, blocks: Sequence[Block], item: int) -> tuple[float, float]:
    """Seconds of a sum and its update by the constants above, on `count` nodes with `of_node` replicas each: by direct
    exchange, by halving.

    A direct exchange sends all messages at once, but one for every other node, and where a vector has few blocks for so
    many nodes, whole blocks from all nodes to one. Halving waits in each round; where owners are fewer, each updates
    more.
    """
    vector = item * (blocks[-1].stop - blocks[0].start)
    block = item * max(block.stop - block.start for block in blocks)
    slices = [item * (stop - start) for start, stop in map(bounds, owned(blocks, count * of_node))]
    to_node = (count - 1) * max(sum(slices[first : first + of_node]) for first in range(0, len(slices), of_node))
    largest, message = max(slices), 2 * OVERHEAD + of_node * GAP
    direct = 2 * (LATENCY + (count - 1) * message + to_node / LINK) + largest * ((count - 1) / ADD + 1 / UPDATE)
    parts = [1 / (2 << level) for level in range((count - 1).bit_length())]  # of the vector that a round moves
    moved = sum(max(vector * part, block) for part in parts) / LINK
    added = sum(max(vector / of_node * part, block) for part in parts) / ADD
    updated = max(vector / of_node / owners(count), block) / UPDATE
    return direct, 2 * (most_messages(count) * (LATENCY + message) + moved) + added + updated


@functools.cache
def most_messages(nodes: int) -> int:
    """The most messages that a node sends or receives in the rounds of a sum."""
    of_nodes = (rounds(node, nodes) for node in range(nodes))
    return max(sum(max(len(one.sends), 1) for one in of_node) for of_node in of_nodes)
