"""A simulator of pipeline schedules, which finds deadlocks, times, and micro-batches in flight; no MPI."""

from collections.abc import Sequence
from dataclasses import dataclass

from mpiml.parallel.schedules import Action, Schedule


@dataclass(frozen=True)
class Pass:
    """An action of a stage, with the times of its begin and end."""

    stage: int
    action: Action
    begin: float
    end: float


@dataclass
class Simulation:
    """A simulated step.

    Attributes:
        passes: of all stages, in the order in which they were simulated.
        makespan: the time of the whole step.
        in_flight: for each stage, the most micro-batches in flight.
    """

    passes: list[Pass]
    makespan: float
    in_flight: list[int]

    def bubble(self) -> float:
        """The fraction of the time in which stages are idle, over all stages."""
        busy = sum(one.end - one.begin for one in self.passes)
        return 1 - busy / (self.makespan * len(self.in_flight)) if self.makespan else 0.0


class Deadlock(Exception):
    """No stage can go on, and some are not done."""


def simulate(
    schedule: Schedule,
    stages: int,
    microbatches: int,
    forward: float | Sequence[float] = 1.0,
    backward: float | Sequence[float] = 1.0,
    message: float | Sequence[float] = 0.0,
) -> Simulation:
    """Run a schedule on all stages. An action begins when its stage is free and its message has arrived; sending takes
    no time of the stage and never blocks.

    Args:
        forward, backward: the time of a pass, for all stages or for each.
        message: the time that a message travels, for all stages or for each stage and the next.

    Raises Deadlock, naming the action at which each stage is stuck.
    """
    durations = {"F": _of_each(forward, stages), "B": _of_each(backward, stages)}
    travel = _of_each(message, stages - 1)
    ended: dict[tuple[int, Action], float] = {}
    todo = [list(schedule(stages, stage, microbatches)) for stage in range(stages)]
    place, clock = [0] * stages, [0.0] * stages
    flight, peak = [0] * stages, [0] * stages
    passes: list[Pass] = []
    progress = True
    while progress:
        progress = False
        for stage in range(stages):
            while place[stage] < len(todo[stage]):
                action = todo[stage][place[stage]]
                needs = _needs(stages, stage, action)
                if any(need not in ended for need in needs):
                    break
                arrived = (ended[need] + (travel[min(stage, need[0])] if need[0] != stage else 0) for need in needs)
                begin = max([clock[stage], *arrived])
                end = begin + durations[action.kind][stage]
                ended[stage, action] = clock[stage] = end
                passes.append(Pass(stage, action, begin, end))
                flight[stage] += 1 if action.kind == "F" else -1
                peak[stage] = max(peak[stage], flight[stage])
                place[stage] += 1
                progress = True
    stuck = [f"stage {s} at {''.join(map(str, todo[s][place[s]]))}" for s in range(stages) if place[s] < len(todo[s])]
    if stuck:
        raise Deadlock("; ".join(stuck))
    return Simulation(passes, max(clock, default=0.0), peak)


def _of_each(times: float | Sequence[float], count: int) -> Sequence[float]:
    return times if isinstance(times, Sequence) else [times] * count


def _needs(stages: int, stage: int, action: Action) -> list[tuple[int, Action]]:
    """The (stage, action) pairs that must have ended before this one can begin."""
    if action.kind == "F":
        return [(stage - 1, action)] if stage > 0 else []
    own = (stage, Action("F", action.microbatch))
    return [own, (stage + 1, action)] if stage < stages - 1 else [own]
