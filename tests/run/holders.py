"""Arrays of a file, and the segments of them that each of several ranks holds."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from mpi4py import MPI

from mpiml.clock import Clock
from mpiml.run.segments import Segment
from mpiml.team import Team
from mpiml.vectors import BLOCK

WORLD = MPI.COMM_WORLD
NODES = ("one", "several", "unseen")  # of the last, only the first sees the directory


def arrays(salt: int = 0) -> dict[str, Any]:
    """Of several units of a file, and of many kinds."""
    rng = np.random.default_rng(salt)
    return {
        "wide": rng.standard_normal((700, 1000), np.float32),
        "mean": rng.standard_normal(9 * BLOCK + 3),
        "steps": rng.integers(0, 9, 5 * BLOCK, np.int64).astype(">i8"),
        "mask": rng.random(3 * BLOCK) < 0.5,
        "one": np.array(2.5, ">f8"),
        "none": np.zeros((0, 3)),
        "odd": rng.integers(0, 9, (3, 7), np.uint8),
    }


def dealt(of: Mapping[str, Any], seed: int) -> list[list[Segment]]:
    """Segments of each rank, all elements of the arrays once."""
    rng = Random(seed)
    every: list[list[Segment]] = [[] for _ in range(WORLD.size)]
    for name, array in of.items():
        blocks = -(-array.size // BLOCK)
        cuts = sorted({0, blocks, *(rng.randrange(blocks + 1) for _ in range(4))})
        flat = array.reshape(-1)
        for first, last in itertools.pairwise(cuts):
            every[rng.randrange(WORLD.size)].append(Segment(name, first * BLOCK, flat[first * BLOCK : last * BLOCK]))
    for own in every:
        rng.shuffle(own)
    return every


@contextmanager
def placed(nodes: str, directory: Path, other: Path) -> Iterator[tuple[Team, MPI.Intracomm, Path]]:
    """All ranks, those of this rank's node, and how they name a directory, which stands only on the first node if it is
    not seen elsewhere."""
    node = WORLD.Split(0 if nodes == "one" else WORLD.rank)
    before = Path.cwd()
    os.chdir(other if nodes == "unseen" and WORLD.rank else directory.parent)
    try:
        yield Team(WORLD, Clock()), node, Path(directory.name) if nodes == "unseen" else directory
    finally:
        os.chdir(before)
        node.Free()
