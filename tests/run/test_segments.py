"""Who writes what of a file, against brute force: each byte once, and no unit by two ranks."""

from __future__ import annotations

import itertools
from random import Random

import numpy as np
import pytest

from mpiml.run.digests import of_blocks
from mpiml.run.segments import Copies, Segment, Span, digests_of, divided, size_of_copies, spans, writers
from mpiml.vectors import ALIGNMENT, BLOCK


def drawn(rng: Random, size: int, ranks: int) -> list[list[Span]]:
    """Of each rank its spans of a file of random bytes; together they are all of it but some gaps."""
    content = memoryview(rng.randbytes(size))
    cuts = sorted({0, size, *(rng.randrange(size) for _ in range(rng.randrange(1, 40)))})
    every: list[list[Span]] = [[] for _ in range(ranks)]
    owner = 0
    for start, stop in itertools.pairwise(cuts):
        owner = rng.choice([owner, rng.randrange(ranks)])  # often several in a row
        if rng.random() < 0.9:
            every[owner].append(Span(start, content[start:stop]))
    return every


def bytes_at(of: list[Span]) -> dict[int, int]:
    """Each byte by its place; there is none twice."""
    every = [(span.start + at, byte) for span in of for at, byte in enumerate(span.view)]
    assert len(dict(every)) == len(every)
    return dict(every)


@pytest.mark.parametrize("seed", range(200))
def test_each_unit_is_written_by_one_rank_and_each_byte_once(seed: int) -> None:
    rng = Random(seed)
    unit, size, ranks = rng.choice([1, 4, 16, 64]), rng.randrange(1, 600), rng.randrange(1, 6)
    every, edges, writing = drawn(rng, size, ranks), list[tuple[int, int, int]](), dict[int, set[int]]()
    for rank, of in enumerate(every):
        own = bytes_at(of)
        whole, rest = divided(of, unit)
        assert bytes_at([*whole, *rest]) == own
        for place in bytes_at(whole):
            assert all(other in own for other in range(place // unit * unit, (place // unit + 1) * unit))
            writing.setdefault(place // unit, set()).add(rank)
        for span in rest:
            assert span.start // unit == (span.stop - 1) // unit
            first = span.start // unit * unit
            assert not all(other in own for other in range(first, first + unit))
            edges.append((span.start, span.stop, rank))
    rng.shuffle(edges)
    by = writers(np.array(edges, np.int64).reshape(-1, 3), unit).tolist()
    for (start, _, _), rank in zip(edges, by, strict=True):
        writing.setdefault(start // unit, set()).add(rank)
        assert rank == min(other for other in edges if other[0] // unit == start // unit)[2]
    assert all(len(ranks) == 1 for ranks in writing.values())


def test_spans_lie_where_their_arrays_do_in_little_endian() -> None:
    a, b = np.arange(6.0), np.arange(4, dtype=">i4")
    own = [Segment("b", 1, b[1:3]), Segment("a", 2, a[2:5]), Segment("a", 0, a[:1])]
    made = spans(own, {"a": 100, "b": 40})
    assert [(span.start, span.stop) for span in made] == [(44, 52), (100, 108), (116, 140)]
    assert [span.view.tobytes() for span in made] == [b[1:3].astype("<i4").tobytes(), a[:1].tobytes(), a[2:5].tobytes()]


def test_copies_are_aligned_and_stay_what_they_were() -> None:
    arrays = [np.arange(5.0), np.arange(3, dtype="u1"), np.zeros(0), np.arange(70, dtype=">f4"), np.array([True])]
    own = [Segment(f"a{number}", 0, array, number != 1) for number, array in enumerate(arrays)]
    before, memory = [array.tobytes() for array in arrays], Copies()
    memory.claim(size_of_copies(own))
    copies = memory.of(own)
    for array in arrays:
        array[...] = 0
    assert [copy.values.tobytes() for copy in copies] == before
    assert [copy._replace(values=None) for copy in copies] == [one._replace(values=None) for one in own]
    places = [copy.values.ctypes.data - copies[0].values.ctypes.data for copy in copies if copy.values.size]
    assert places == [0, 64, 128, 128 + 320]
    assert all(place % ALIGNMENT == 0 for place in places)
    assert size_of_copies(own) == places[-1] + ALIGNMENT
    again = memory.of(own[:1])
    assert np.shares_memory(again[0].values, copies[0].values), "it was enough"


def parts_of(rng: Random, arrays: list[np.ndarray], ranks: int) -> list[list[tuple[int, int, int]]]:
    """Rows of each rank: ranges of arrays, that begin with blocks."""
    every: list[list[tuple[int, int, int]]] = [[] for _ in range(ranks)]
    for number, array in enumerate(arrays):
        blocks = -(-array.size // BLOCK)
        cuts = sorted({0, blocks, *(rng.randrange(blocks + 1) for _ in range(3))})
        for first, last in itertools.pairwise(cuts):
            start, stop = first * BLOCK, min(last * BLOCK, array.size)
            every[rng.randrange(ranks)].append((number, start, stop - start))
    for rows in every:
        rng.shuffle(rows)
    return every


@pytest.mark.parametrize("seed", range(20))
def test_digests_of_blocks_come_together_whoever_has_them(seed: int) -> None:
    rng = Random(seed)
    arrays = [np.arange(rng.choice([0, 1, BLOCK, rng.randrange(6 * BLOCK)]), dtype="f4") for _ in range(4)]
    every = parts_of(rng, arrays, rng.randrange(1, 4))
    sizes = [array.size for array in arrays]
    hashed = [b"".join(of_blocks(arrays[n][a : a + count]) for n, a, count in rows) for rows in every]
    parts = [(np.array(rows, np.int64).reshape(-1, 3), of) for rows, of in zip(every, hashed, strict=True)]
    assert digests_of(parts, sizes) == [of_blocks(array) for array in arrays]


def test_digests_of_blocks_that_are_missing_or_there_twice_are_refused() -> None:
    array = np.arange(2.0 * BLOCK)
    first, second = (0, 0, BLOCK), (0, BLOCK, BLOCK)
    digest = of_blocks(array[:BLOCK])
    for rows in ([first], [first, first], [first, second, second], []):
        with pytest.raises(ValueError, match=r"are missing|are there twice"):
            digests_of([(np.array(rows, np.int64).reshape(-1, 3), digest * len(rows))], [array.size])
