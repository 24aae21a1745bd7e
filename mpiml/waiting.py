"""Waiting for messages without keeping a core from the ranks that have work."""

import os
import time
from collections.abc import Sequence

from mpi4py import MPI

YIELDS = 50
NAP = 50e-6  # seconds


def wait(requests: Sequence[MPI.Request]) -> None:
    """Return when all requests are complete. Polls, then yields the core at every try, then sleeps between tries.

    Each poll drives the MPI library, so messages of other requests move meanwhile, and signals are handled.
    """
    if not requests:
        return
    pending, tries = list(requests), 0
    while not MPI.Request.Testall(pending):
        tries += 1
        if tries > YIELDS:
            time.sleep(NAP)
        else:
            os.sched_yield()
