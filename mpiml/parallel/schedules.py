"""Pipeline schedules: the order in which a stage does the forward and backward passes of its micro-batches; no MPI.

A schedule is a generator of actions, computation only: the messages follow from the stage. Every schedule here writes
gradients (B, or W where backward passes have two parts) in the order of micro-batches, because the gradient sum relies
on it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple


class Action(NamedTuple):
    """The forward ("F") or backward ("B") pass of a micro-batch, which is counted from 0 on each replica; or a part of
    the backward pass: the gradient by the input ("I"), for which the stage before waits, or those by weights ("W")."""

    kind: Literal["F", "B", "I", "W"]
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


def zb_h1(stages: int, stage: int, microbatches: int) -> Iterator[Action]:
    """As 1F1B, but only I is done as soon as it can be. Stage s does W s micro-batches later, and what is left of W
    while it would be idle at the end: Qi et al., "Zero bubble pipeline parallelism", ICLR 2024.
    """
    ahead = min(stages - stage - 1, microbatches)
    for m in range(ahead):
        yield Action("F", m)
    for m in range(microbatches):
        if m + ahead < microbatches:
            yield Action("F", m + ahead)
        yield Action("I", m)
        if m >= stage:
            yield Action("W", m - stage)
    for m in range(max(microbatches - stage, 0), microbatches):
        yield Action("W", m)


def merged(schedule: Schedule) -> Schedule:
    """The schedule with whole backward passes in the place of their first parts."""

    def actions(stages: int, stage: int, microbatches: int) -> Iterator[Action]:
        for action in schedule(stages, stage, microbatches):
            if action.kind != "W":
                yield action._replace(kind="B") if action.kind == "I" else action

    return actions


def of_stages(schedule: Schedule, splits: Sequence[bool]) -> Schedule:
    """The schedule of a pipeline in which only some stages split their backward passes."""
    whole = merged(schedule)
    return lambda stages, stage, microbatches: (schedule if splits[stage] else whole)(stages, stage, microbatches)


SCHEDULES: dict[str, Schedule] = {"1f1b": one_f_one_b, "gpipe": gpipe, "zb-h1": zb_h1}
