"""Finding the rank that the others wait for, from the times of all ranks at each line of the log; no MPI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpiml.clock import SHARES, Activity

WATCHED: tuple[Activity, ...] = ("compute", "data")  # the other SHARES are waiting, or depend on other ranks
SLOW = 1.5  # times the median of the others
LEAST = 0.002  # seconds per step: a delay of less is noise,
PART = 0.05  # and so is one of less than this part of the step
# A rank is named if it was the slowest in so many lines of the log in a row, over so many steps and seconds.
LINES, STEPS, SECONDS = 3, 10, 2.0


@dataclass
class Slow:
    """A rank that takes `times` as long as the median of the other replicas of its stage, and `behind` seconds per step
    longer. `place` is its rank in the grid, `rank` the one that the launcher gave it."""

    place: int
    rank: int
    activity: Activity
    times: float
    behind: float


class Pace:
    """Names a rank when it has been the slowest replica of its stage for a while.

    Only ranks of the same stage are compared, because stages differ, and by their times per micro-batch, because
    replicas may have different numbers of them.

    Args:
        stages: how many there are; ranks are numbered stage by stage.
        microbatches: of each replica in a step.
        launched: the rank that the launcher gave each rank.
        crowded: whether this rank's node has more threads than cores. If any node has, no rank is named: which rank
            gets a core is chance.
    """

    def __init__(self, stages: int, microbatches: Sequence[int], launched: Sequence[int], crowded: bool):
        self.stages, self.microbatches = stages, np.array(microbatches)
        self.launched, self.crowded = launched, crowded
        self._last: Slow | None = None
        self._lines = self._steps = 0
        self._seconds = 0.0

    def slowest(self, seconds: NDArray[np.float64], step_seconds: float, steps: int) -> Slow | None:
        """The rank that the others have been waiting for, or None; to be called at each line of the log.

        Args:
            seconds: by rank and clock.SHARES, since the last line.
            step_seconds: of the slowest rank, since then.
            steps: since then.
        """
        per_step = seconds / max(steps, 1)
        slow = [one for name in WATCHED for one in self._of_stages(name, per_step[:, SHARES.index(name)])]
        needed = max(LEAST, PART * step_seconds / max(steps, 1))
        worst = max(slow, key=lambda one: one.behind, default=None)
        if worst is None or worst.behind < needed:
            self._last = None
            return None
        if self._last is None or (worst.place, worst.activity) != (self._last.place, self._last.activity):
            self._lines, self._steps, self._seconds = 0, 0, 0.0
        self._last = worst
        self._lines += 1
        self._steps += steps
        self._seconds += step_seconds
        habit = self._lines >= LINES and self._steps >= STEPS and self._seconds >= SECONDS
        return worst if habit else None

    def _of_stages(self, activity: Activity, seconds: NDArray[np.float64]) -> list[Slow]:
        """The slowest replica of each stage in which it is much slower than the others."""
        slow = []
        replicas = len(self.microbatches)
        for stage, times in enumerate(seconds.reshape(self.stages, replicas) / self.microbatches):
            replica = int(times.argmax())
            slowest = float(times[replica])
            if replicas > 1 and slowest > SLOW * (usual := float(np.median(np.delete(times, replica)))):
                behind = (slowest - usual) * float(self.microbatches[replica])
                place = stage * replicas + replica
                slow.append(Slow(place, self.launched[place], activity, slowest / max(usual, 1e-9), behind))
        return slow
