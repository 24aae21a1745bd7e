"""Tests of halving: nodes that follow their rounds build the expression of the canonical tree, however many."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from mpiml.parallel import halving
from mpiml.parallel.halving import Round
from mpiml.vectors import BLOCK, Block

NODES = [*range(2, 34), 100, 127, 157, 255, 256, 1000, 1563, 2048]
Expressions = dict[tuple[int, int], int]  # the number of a sum, by those of its operands


def tree(made: Expressions, low: int, size: int, nodes: int) -> int:
    """The number of the canonical sum over low..low+size-1, by its definition."""
    if size == 1:
        return low
    left, middle = tree(made, low, size // 2, nodes), low + size // 2
    if middle >= nodes:
        return left
    return made.setdefault((left, tree(made, middle, size // 2, nodes)), nodes + len(made))


def follow(plans: Sequence[Sequence[Round]], made: Expressions) -> list[int]:
    """What each node has in the end, when messages are as slow as can be; all of them must have come to their ends."""
    nodes = len(plans)
    done, sums, sent = [0] * nodes, list(range(nodes)), dict[tuple[int, int], tuple[tuple[int, int], int]]()

    def send(node: int) -> None:
        for to, part in plans[node][done[node]].sends if done[node] < len(plans[node]) else ():
            assert (node, to) not in sent
            sent[node, to] = part, sums[node]

    for node in range(nodes):
        send(node)
    waiting = list(range(nodes))
    while waiting:
        node = waiting.pop()
        while done[node] < len(plans[node]):
            one = plans[node][done[node]]
            if one.source is not None:
                if (one.source, node) not in sent:
                    break
                part, other = sent.pop((one.source, node))
                assert part == one.kept
                operands = (sums[node], other) if node < one.source else (other, sums[node])
                sums[node] = made.setdefault(operands, nodes + len(made))
            done[node] += 1
            send(node)
            waiting += [to for to, _ in plans[node][done[node]].sends] if done[node] < len(plans[node]) else []
    assert not sent
    assert done == [len(plan) for plan in plans]
    return sums


@pytest.mark.parametrize("nodes", NODES)
def test_nodes_build_the_expression_of_the_tree(nodes: int) -> None:
    made = Expressions()
    root = tree(made, 0, 1 << (nodes - 1).bit_length(), nodes)
    plans = [halving.rounds(node, nodes) for node in range(nodes)]
    sums = follow(plans, made)
    shares = [halving.share(node, nodes) for node in range(nodes)]
    assert sorted(one for one in shares if one is not None) == list(range(halving.owners(nodes)))
    for plan, total, share in zip(plans, sums, shares, strict=True):
        assert plan[-1].kept == ((0, 0) if share is None else (share, share + 1))
        assert share is None or total == root


@pytest.mark.parametrize("nodes", NODES[:-2])
def test_values_come_back_to_all(nodes: int) -> None:
    """Each round backwards: what was kept goes to where its other part came from, and what was sent comes back."""
    plans = [halving.rounds(node, nodes) for node in range(nodes)]
    had, left = [set(range(*plan[-1].kept)) for plan in plans], [list(plan) for plan in plans]
    sent = dict[tuple[int, int], tuple[int, int]]()
    moved = True
    while moved:
        moved = False
        for node, plan in enumerate(left):
            while plan:
                one = plan[-1]
                if one.source is not None:
                    assert had[node] == set(range(*one.kept))
                    sent[node, one.source] = one.kept
                if any((giver, node) not in sent for giver, _ in one.sends):
                    break
                for giver, part in one.sends:
                    assert sent[giver, node] == part
                    had[node] |= set(range(*part))
                plan.pop()
                moved = True
    assert not any(left)
    assert all(one == set(range(halving.owners(nodes))) for one in had)


@pytest.mark.parametrize(("nodes", "messages"), [(2, 1), (3, 2), (4, 2), (16, 4), (157, 13), (1000, 11), (1024, 10)])
def test_few_messages(nodes: int, messages: int) -> None:
    assert halving.most_messages(nodes) == messages


@pytest.mark.parametrize(
    ("nodes", "microbatches", "fits"),
    [
        ([2, 2], 4, True),
        ([3, 3, 3], 12, True),
        ([1] * 5, 5, True),
        ([4], 4, False),
        ([3, 2], 8, False),
        ([2, 2], 6, False),
        ([2, 2, 2], 8, False),
    ],
)
def test_where_partial_sums_of_nodes_are_nodes_of_the_tree(nodes: list[int], microbatches: int, fits: bool) -> None:
    assert halving.fits(nodes, microbatches) == fits


def blocks(elements: int) -> list[Block]:
    return [Block(start, min(start + BLOCK, elements), True) for start in range(0, elements, BLOCK)]


@pytest.mark.parametrize(
    ("elements", "nodes", "of_node", "faster"),
    [
        *[(10**6, nodes, 64, True) for nodes in (157, 1000, 10_000)],
        *[(10**7, 157, 64, False), (10**7, 1000, 64, True), (10**7, 1000, 1, True)],
        *[(10**8, 1000, 64, False), (10**8, 10_000, 64, True), (10**9, 10_000, 64, False)],
        (10**4, halving.FEWEST, 1, True),
        (10**4, halving.FEWEST - 1, 1, False),
        (10**6, halving.FEWEST, 1, False),  # bytes count there, and not messages
        (0, 1000, 1, False),
    ],
)
def test_many_nodes_halve_what_is_short_for_so_many(elements: int, nodes: int, of_node: int, faster: bool) -> None:
    assert halving.faster([of_node] * nodes, nodes * of_node, blocks(elements), 4) == faster


def test_who_cannot_halve_does_not() -> None:
    assert halving.faster([2] * 64, 128, blocks(5), 4)
    assert not halving.faster([2] * 64, 192, blocks(5), 4)
    *others, last = blocks(5)
    assert not halving.faster([2] * 64, 128, [*others, dataclasses.replace(last, array="of two layers")], 4)


@pytest.mark.parametrize("of_node", [1, 4, 16, 64])
def test_few_blocks_belong_to_many_nodes(of_node: int) -> None:
    """Else one node would receive nearly everything."""
    for run in (blocks(5), blocks(64 * BLOCK), blocks(61 * BLOCK - 7)):
        shares = halving.lanes(run, 64, of_node)
        assert [block for lane in shares for share in lane for block in share] == run
        owned = [sum(len(lane[share]) for lane in shares) for share in range(64)]
        assert max(owned) <= 2
