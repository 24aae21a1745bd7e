"""Pipeline schedules: the order in which a stage does the forward and backward passes of its micro-batches; no MPI.

A schedule is a generator of actions, computation only: the messages follow from the stage. Every schedule here does the
backward passes in the order of micro-batches, because the gradient sum relies on it.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple


class Action(NamedTuple):
    """The forward ("F") or backward ("B") pass of a micro-batch, which is counted from 0 on each replica."""

    kind: Literal["F", "B"]
    microbatch: int


Schedule = Callable[[int, int, int], Iterator[Action]]


def gpipe(stages: int, stage: int, microbatches: int) -> Iterator[Action]:
    """All forward passes, then all backward passes: Huang et al., "GPipe", NeurIPS 2019."""
    for m in range(microbatches):
        yield Action("F", m)
    for m in range(microbatches):
        yield Action("B", m)


def one_f_one_b(stages: int, stage: int, microbatches: int) -> Iterator[Action]:
    """Forward passes until the pipeline is full, then a backward pass after each forward pass, so that at most
    `stages - stage` micro-batches are in flight: Narayanan et al., "PipeDream", SOSP 2019, with a flush per step.
    """
    ahead = min(stages - stage - 1, microbatches)
    for m in range(ahead):
        yield Action("F", m)
    for m in range(ahead, microbatches):
        yield Action("F", m)
        yield Action("B", m - ahead)
    for m in range(microbatches - ahead, microbatches):
        yield Action("B", m)


SCHEDULES: dict[str, Schedule] = {"1f1b": one_f_one_b, "gpipe": gpipe}
