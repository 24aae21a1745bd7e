"""Pipeline schedules: in which order a stage does the forward and backward passes of its micro-batches; no MPI.

A schedule is a generator of actions, compute only: messages follow from an action's position in the pipeline.
Every schedule here takes backward passes in micro-batch order, which the gradient sum counts on.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple


class Action(NamedTuple):
    """Forward ("F") or backward ("B") of one micro-batch of a stage, counted from 0."""

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
    """Forward passes until the pipeline is full, then one backward after each forward, so that no more than
    `stages - stage` micro-batches are in flight: Narayanan et al., "PipeDream", SOSP 2019 (the flushing variant).
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
