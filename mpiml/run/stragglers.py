"""Finding the rank that the others wait for, from the times of all ranks at each line of the log; no MPI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpiml.clock import SHARES

WATCHED = [(name, SHARES.index(name)) for name in ("compute", "data")]  # the rest is waiting, or depends on others
SLOW = 1.5  # times the median of the others
LEAST = 0.002  # seconds of a step by which a rank is behind: less is noise,
PART = 0.05  # and so is less than this part of the step
LINES, STEPS = 3, 10  # of the log, and steps in them, that make it a habit,
SECONDS = 2.0  # if they take so long: a busy machine has hiccups


@dataclass
class Slow:
    """A rank that takes `times` the median of the other replicas of its stage, and `behind` seconds a step more.

    `place` is the rank in the grid, `rank` the one that the launcher gave it.
    """

    place: int
    rank: int
    activity: str
    times: float
    behind: float


class Pace:
    """Names a rank when it has been the slowest of its kind for a while.

    Ranks of one stage are compared, for stages differ, by their times for a micro-batch, for replicas may have
    unequal numbers of them.

    Args:
        stages: how many there are; the ranks are numbered stage by stage.
        microbatches: of a step, of each replica.
        launched: the rank that the launcher gave each rank.
        crowded: whether this rank's node has more threads than cores. If any has, no rank is named: there, who gets
            a core and when is chance.
    """

    def __init__(self, stages: int, microbatches: Sequence[int], launched: Sequence[int], crowded: bool):
        self.stages, self.microbatches = stages, np.array(microbatches)
        self.launched, self.crowded = launched, crowded
        self._last: Slow | None = None
        self._lines = self._steps = 0
        self._seconds = 0.0

    def slowest(self, seconds: NDArray[np.float64], step_seconds: float, steps: int) -> Slow | None:
        """The rank that the others have been waiting for, if there is one, after another line of the log.

        Args:
            seconds: by rank and clock.SHARES, since the last line.
            step_seconds: of the slowest rank, since then.
            steps: since then.
        """
        found = [slow for name, column in WATCHED for slow in self._of_stages(name, seconds[:, column] / max(steps, 1))]
        needed = max(LEAST, PART * step_seconds / max(steps, 1))
        worst = max(found, key=lambda slow: slow.behind, default=None)
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

    def _of_stages(self, activity: str, seconds: NDArray[np.float64]) -> list[Slow]:
        """The slowest replica of each stage in which it is much slower than the others."""
        found = []
        replicas = len(self.microbatches)
        for stage, times in enumerate((seconds.reshape(self.stages, replicas) / self.microbatches).tolist()):
            replica = max(range(replicas), key=times.__getitem__)
            slowest = times.pop(replica)
            if times and slowest > SLOW * (usual := float(np.median(times))):
                behind = (slowest - usual) * float(self.microbatches[replica])
                place = stage * replicas + replica
                found.append(Slow(place, self.launched[place], activity, slowest / max(usual, 1e-9), behind))
        return found
