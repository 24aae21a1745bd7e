"""Cutting a flat vector into the slices that replicas own and the pieces that fit a cache; no MPI."""

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mpiml.vectors import PIECE


class Block(Protocol):
    """vector[start:stop], a run of elements of one parameter (mpiml.nn.parameters.Block)."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def decay(self) -> bool: ...


@dataclass(frozen=True)
class Piece:
    """vector[start:stop], whose parameters all decay or all do not; `blocks` are relative to `start`."""

    start: int
    stop: int
    decay: bool
    blocks: list[tuple[int, int]]


def owned(blocks: Sequence[Block], owners: int) -> list[Sequence[Block]]:
    """Give each owner a contiguous run of blocks, of nearly equal length; some may get none."""
    starts = [block.start for block in blocks]
    size = blocks[-1].stop if blocks else 0
    bounds = [bisect_left(starts, size * owner / owners) for owner in range(owners)] + [len(blocks)]
    return [blocks[a:b] for a, b in itertools.pairwise(bounds)]


def bounds(run: Sequence[Block]) -> tuple[int, int]:
    """Where a run of blocks starts and stops."""
    return (run[0].start, run[-1].stop) if run else (0, 0)


def pieces(run: Sequence[Block]) -> list[Piece]:
    """Join neighbouring blocks of one kind into pieces of at most PIECE elements."""
    joined: list[Piece] = []
    for block in run:
        last = joined[-1] if joined else None
        if last and last.decay == block.decay and block.stop - last.start <= PIECE:
            inside = [*last.blocks, (block.start - last.start, block.stop - last.start)]
            joined[-1] = Piece(last.start, block.stop, block.decay, inside)
        else:
            joined.append(Piece(block.start, block.stop, block.decay, [(0, block.stop - block.start)]))
    return joined
