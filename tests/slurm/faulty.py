"""A transform of rows that gets one bit wrong, once, on the node that FAULTY names: unnoticed, as faulty nodes do."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

WHEN = 40  # of the calls on each rank; the first are trials
_calls = iter(range(1_000_000))


def flip(x: Any, y: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    if next(_calls) == WHEN and os.environ.get("SLURMD_NODENAME") == os.environ.get("FAULTY"):
        x = x.copy()
        bits = x.reshape(-1).view(np.uint32)
        bits[np.flatnonzero(bits)[0]] ^= 1 << 20
    return x, y
