"""How long steps took on this rank; of long runs a sample, so that memory stays bounded; no MPI."""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray

WARM_UP = 10  # steps that are left out if there are others
KEPT = 1 << 14  # steps: the sample's median lies within 0.4 % of all steps from the true one (standard deviation)


class StepTimes:
    """Seconds of up to KEPT steps; of more steps, those of KEPT drawn at random, each equally likely (Vitter, "Random
    sampling with a reservoir", 1985). Every rank draws the same steps."""

    def __init__(self) -> None:
        self.steps = 0
        self._first = np.zeros(WARM_UP)
        self._kept = np.zeros(KEPT)
        self._random = random.Random(0)

    def add(self, seconds: float) -> None:
        """Note how long the next step took."""
        later, self.steps = self.steps - WARM_UP, self.steps + 1
        if later < 0:
            self._first[later] = seconds
            return
        place = later if later < KEPT else self._random.randrange(later + 1)
        if place < KEPT:
            self._kept[place] = seconds

    def sample(self) -> NDArray[np.float64]:
        """A copy of the times that are kept, in seconds. On all ranks the n-th is of the same step."""
        return (self._kept[: self.steps - WARM_UP] if self.steps > WARM_UP else self._first[: self.steps]).copy()


def median(seconds: NDArray[np.float64]) -> float:
    """The median; np.median would import half of NumPy."""
    rising = np.sort(seconds)
    return float(rising[(len(rising) - 1) // 2 : len(rising) // 2 + 1].mean())
