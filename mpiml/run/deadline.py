"""When a job has to be over, by --time-limit or by SLURM, and whether there is time for another step."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import MappingProxyType

MARGIN = 0.1  # of the whole time, kept for what cannot be foreseen,
MOST = 30.0  # but not more seconds than this
SLOWEST_DISK = 50e6  # bytes a second, assumed until a save has been timed


class Deadline:
    """Tells at every step whether there is time for another one, for the save after it and for the end of the run.

    Each rank goes by its own clock; they have to agree on what they do.

    Args:
        limit: seconds from now, of --time-limit.
        environment: may hold SLURM_JOB_END_TIME, in seconds since 1970.
    """

    def __init__(self, limit: float = math.inf, environment: Mapping[str, str] = MappingProxyType({})):
        now = time.monotonic()
        lengths = [limit]
        if environment.get("SLURM_JOB_END_TIME", "").isdigit():
            lengths.append(int(environment["SLURM_JOB_END_TIME"]) - time.time())
        length = min(lengths)
        self.end = now + length - min(MARGIN * max(length, 0.0), MOST)
        self._step, self._since = 0.0, math.inf  # seconds of the slowest step, and when this one began: none has yet
        self._guess, self._save = 0.0, 0.0  # seconds of a save

    def expect(self, size: int) -> None:
        """Say how many bytes a checkpoint has: until a save has been timed, its cost is guessed from that."""
        self._guess = size / SLOWEST_DISK

    def saved(self, duration: float) -> None:
        """Say how many seconds a save has taken; the slowest counts."""
        self._save = max(self._save, duration)

    def near(self) -> bool:
        """Whether the step that is under way has to be the last. Is asked before the first, and once in each step.

        What comes after it: as much again as the slowest step so far, with whatever else happened in that one, a
        save, and a digest of the weights, which is no more than another.
        """
        now = time.monotonic()
        self._step = max(self._step, now - self._since)
        self._since = now
        return self.passed()

    def up(self, slack: float = 0.0) -> bool:
        """Whether what is under way must be left: there is only time for a save and a digest, or will be in `slack`
        seconds. May be asked at any time."""
        return time.monotonic() + self._ending() + slack > self.end

    def passed(self, slack: float = 0.0) -> bool:
        """Whether it would have been too late for another step, `slack` seconds after the last was asked about."""
        return self._since + self._step + self._ending() + slack > self.end

    def _ending(self) -> float:
        return 2 * (self._save or self._guess)
