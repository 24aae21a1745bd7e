"""The time by which a job must end, by --time-limit or SLURM, and whether there is time for another step."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import MappingProxyType

MARGIN = 0.1  # of the whole time is kept in reserve,
MOST = 30.0  # but no more seconds than these
SLOWEST_DISK = 50e6  # bytes a second, assumed until a save has been timed


class Deadline:
    """Decides at every step whether there is time for another one, the save after it and the end of the run.

    Each rank uses its own clock, so ranks have to agree on what they do.

    Args:
        limit: seconds from now, of --time-limit.
        environment: variables, where SLURM_JOB_END_TIME is in seconds since 1970.
    """

    def __init__(self, limit: float = math.inf, environment: Mapping[str, str] = MappingProxyType({})):
        now = time.monotonic()
        if environment.get("SLURM_JOB_END_TIME", "").isdigit():
            limit = min(limit, int(environment["SLURM_JOB_END_TIME"]) - time.time())
        self.end = now + limit - min(MARGIN * max(limit, 0.0), MOST)
        self._step, self._since = 0.0, math.inf  # seconds of the slowest step; when this step began
        self._guess, self._save = 0.0, 0.0  # seconds of a save
        self._in_flight = 0  # saves that may have to be waited for before the last one

    def expect(self, size: int) -> None:
        """Set the bytes of a checkpoint: from them the time of a save is estimated until one has been timed."""
        self._guess = size / SLOWEST_DISK

    def expect_in_flight(self) -> None:
        """Keep time for the end of another save, too: from now on one may be in flight when training ends."""
        self._in_flight = 1

    def saving(self, duration: float) -> None:
        """Note the seconds that a save has taken that is not over."""
        self._guess = max(self._guess, duration)
        self._save = max(self._save, duration) if self._save else 0.0

    def saved(self, duration: float) -> None:
        """Note the seconds that a save took; the slowest counts."""
        self._save = max(self._save, duration)

    def near(self) -> bool:
        """Whether the current step has to be the last. To be called before the first step and once in each.

        Time is needed for one more step, as slow as the slowest so far with all that happened in it; for a save; for
        one in flight before it; and for a digest of the weights, which takes no longer than a save.
        """
        now = time.monotonic()
        self._step = max(self._step, now - self._since)
        self._since = now
        return self.passed()

    def up(self, slack: float = 0.0, copies: int = 1) -> bool:
        """Whether current work must be broken off because time is left only for a save of so many `copies` of the model
        and a digest, now or in `slack` seconds. May be called at any time."""
        return time.monotonic() + self._ending(copies) + slack > self.end

    def passed(self, slack: float = 0.0) -> bool:
        """Whether time had run out when `near` was last called, or `slack` seconds later."""
        return self._since + self._step + self._ending() + slack > self.end

    def _ending(self, copies: int = 1) -> float:
        return (1 + self._in_flight + copies) * (self._save or self._guess)
