"""Tests of the canonical tree: any layout of replicas on nodes builds the same expression, message by message."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

from mpiml.parallel.tree import SumPlan, added, aligned, depth, links, partials, partners, shift_reduce, slots, sum_plan
from mpiml.partition import part

LAYOUTS = [
    [1],
    [4],
    [16],
    [1, 1],
    [1] * 5,
    [1] * 12,
    [1] * 16,
    [3, 2],
    [2, 3],
    [1, 4, 1],
    [4, 4, 4],
    [5, 1, 2, 4],
    [2] * 8,
    [7, 5],
    [3, 3, 3],
]
TOTALS = [12, 16, 24, 37]


def root_size(total: int) -> int:
    """The least power of two that covers all micro-batches."""
    size = 1
    while size < total:
        size *= 2
    return size


def expression(low: int, size: int, total: int, leaf: int = 1) -> str:
    """The definition: a node is its two halves added up, and a missing right half passes the left one up; a leaf is a
    run of micro-batches, added one after the other."""
    if size == 1:
        first, *others = range(low * leaf, (low + 1) * leaf)
        return functools.reduce(lambda so_far, m: f"({so_far}+{m})", others, str(first))
    half = size // 2
    left = expression(low, half, total, leaf)
    return left if low + half >= total else f"({left}+{expression(low + half, half, total, leaf)})"


def maximal(start: int, stop: int, low: int, size: int, total: int) -> Iterator[tuple[int, int]]:
    """The largest nodes that lie inside start..stop-1, found from the root downwards."""
    high = min(low + size, total)
    if start <= low < high <= stop:
        yield low, high
    elif low < stop and start < high:
        yield from maximal(start, stop, low, size // 2, total)
        yield from maximal(start, stop, low + size // 2, size // 2, total)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 8, 11, 12, 16, 17, 24, 37])
def test_shift_reduce_leaves_the_maximal_nodes(total: int) -> None:
    for start in range(total):
        for stop in range(start, total + 1):
            counts, left = shift_reduce([(m, m + 1) for m in range(start, stop)], total)
            assert left == list(maximal(start, stop, 0, root_size(total), total))
            assert len(left) == stop - start - sum(counts)


def test_shift_reduce_does_not_join_ranges_with_a_gap() -> None:
    assert shift_reduce([(0, 1), (2, 3)], 4) == ([0, 0], [(0, 1), (2, 3)])


def test_values_are_added_as_soon_as_they_come() -> None:
    """So that few are there at once."""
    done: list[str] = []

    class Value(str):
        def __add__(self, other: str) -> Value:
            done.append(f"({self}+{other})")
            return Value(done[-1])

    def values() -> Iterator[Value]:
        for m in range(1, 7):
            done.append(f"{m}")
            yield Value(m)

    left = added([(m, m + 1) for m in range(1, 7)], values(), 8)
    assert left == ([(1, 2), (2, 4), (4, 6), (6, 7)], ["1", "(2+3)", "(4+5)", "6"])
    assert done == ["1", "2", "3", "(2+3)", "4", "5", "(4+5)", "6"]


def test_slots_are_depths_of_the_stack() -> None:
    counts, _ = shift_reduce([(m, m + 1) for m in range(8)], 8)
    assert counts == [0, 1, 0, 2, 0, 1, 0, 3]
    assert slots(counts) == [0, 1, 1, 2, 1, 2, 2, 3]


def reduce(parts: list[str], counts: list[int]) -> str:
    """What a plan's additions make of `parts`: one expression."""
    stack: list[str] = []
    for contribution, count in zip(parts, counts, strict=True):
        stack.append(contribution)
        for _ in range(count):
            right = stack.pop()
            stack[-1] = f"({stack[-1]}+{right})"
    (result,) = stack
    return result


def own_sums(own: SumPlan) -> list[str]:
    """What lies in a replica's slots after its last micro-batch; a slot in use is never written to."""
    held: list[str] = []
    assert own.depth == 1 + max(own.slots, default=0)
    for index, m in enumerate(range(*own.microbatches)):
        assert own.slots[index] == len(held)
        held.append(str(m))
        for _ in range(own.counts[index]):
            right = held.pop()
            held[-1] = f"({held[-1]}+{right})"
    return held


def send_all(plans: list[SumPlan], held: list[list[str]], firsts: list[int]) -> dict[tuple[int, int, int], str]:
    """All partial sums on their way, by (sender, receiver, partial)."""
    sent = {}
    for sender, own in enumerate(plans):
        first = max(f for f in firsts if f <= sender)
        for message in own.messages:
            address = sender, message.owner, message.partial
            assert address not in sent
            sent[address] = reduce([held[first + c.rank][c.partial] for c in message.contributions], message.counts)
    return sent


def simulate(nodes: list[int], total: int, leaf: int = 1) -> None:
    replicas, firsts = sum(nodes), [sum(nodes[:node]) for node in range(len(nodes))]
    plans = [sum_plan(replica, nodes, total, leaf) for replica in range(replicas)]
    held = [own_sums(own) for own in plans]
    sent = send_all(plans, held, firsts)
    for owner, own in enumerate(plans):
        first = max(f for f in firsts if f <= owner)
        parts = []
        for one in own.contributions:
            if one.node is None:
                parts.append(held[first + one.rank][one.partial])
            else:
                parts.append(sent.pop((partners(owner, nodes)[one.node], owner, one.partial)))
        assert reduce(parts, own.root_counts) == expression(0, root_size(total // leaf), total // leaf, leaf)
    assert not sent, "messages that nobody expects"


@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize("nodes", LAYOUTS, ids=str)
def test_every_layout_builds_the_canonical_tree(nodes: list[int], total: int) -> None:
    simulate(nodes, total)


@pytest.mark.parametrize(("total", "leaf"), [(48, 2), (51, 3), (64, 4), (112, 7)])
@pytest.mark.parametrize("nodes", LAYOUTS, ids=str)
def test_leaves_are_runs_of_micro_batches(nodes: list[int], total: int, leaf: int) -> None:
    simulate(nodes, total, leaf)


@pytest.mark.parametrize(
    ("replica", "replicas", "total", "leaf", "expected"),
    [
        *[(0, 1, 64, leaf, vectors) for leaf, vectors in ((1, 7), (2, 7), (4, 6), (8, 5), (32, 3), (64, 2))],
        *[(5, 16, 48 * 16, leaf, vectors) for leaf, vectors in ((1, 7), (3, 6), (48, 2))],
    ],
)
def test_large_leaves_need_few_vectors(replica: int, replicas: int, total: int, leaf: int, expected: int) -> None:
    """Two and one for each level of the tree over a replica's own leaves."""
    assert depth(replica, replicas, total, leaf) == expected


@pytest.mark.parametrize("nodes", LAYOUTS, ids=str)
def test_one_micro_batch_each(nodes: list[int]) -> None:
    simulate(nodes, sum(nodes))


@pytest.mark.parametrize("total", [1, 2, 3, 5])
@pytest.mark.parametrize("nodes", [[3, 4], [1] * 7, [6], [1, 1, 5]], ids=str)
def test_replicas_and_nodes_without_micro_batches(nodes: list[int], total: int) -> None:
    simulate(nodes, total)


@pytest.mark.parametrize("nodes", LAYOUTS, ids=str)
def test_values_reach_every_other_node_once(nodes: list[int]) -> None:
    """Partners and owners are two views of the same links."""
    replicas = range(sum(nodes))
    given = [(owner, taker) for owner in replicas for taker in links(owner, nodes)[0]]
    taken = [(owner, taker) for taker in replicas for owner in links(taker, nodes)[1]]
    assert sorted(given) == sorted(taken)
    assert len(set(given)) == len(given) == sum(nodes) * (len(nodes) - 1)
    home = [node for node, count in enumerate(nodes) for _ in range(count)]
    for owner in replicas:
        assert [home[taker] for taker in links(owner, nodes)[0]] == [n for n in range(len(nodes)) if n != home[owner]]


@pytest.mark.parametrize("nodes", [[3, 2], [4, 4], [5, 1, 2]], ids=str)
def test_partners_share_the_links(nodes: list[int]) -> None:
    for node, count in enumerate(nodes):
        numbers = [partners(owner, nodes)[node] - sum(nodes[:node]) for owner in range(sum(nodes))]
        loads = [numbers.count(local) for local in range(count)]
        assert max(loads) - min(loads) <= 1


def test_partials_are_what_a_replica_is_left_with() -> None:
    cases = [(replicas, total) for total in (*range(1, 40), 96, 100, 127, 128, 129) for replicas in range(1, total + 3)]
    for replicas, total in cases:
        for replica in range(replicas):
            own = [(m, m + 1) for m in range(*part(replica, replicas, total))]
            assert partials(replica, replicas, total) == shift_reduce(own, total)[1]


@pytest.mark.parametrize(
    ("replicas", "total", "expected"), [(1, 37, True), (4, 16, True), (3, 12, True), (3, 24, True), (5, 12, False)]
)
def test_aligned(replicas: int, total: int, expected: bool) -> None:
    assert aligned(replicas, total) is expected
