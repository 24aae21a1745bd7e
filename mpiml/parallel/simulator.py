"""A simulator of pipeline schedules, which finds deadlocks, times, and micro-batches in flight; no MPI."""

from collections.abc import Container, Iterable, Iterator, Sequence
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
        stages: how many there are.
    """

    passes: list[Pass]
    makespan: float
    stages: int

    def bubble(self) -> float:
        """The fraction of the time in which stages are idle, over all stages."""
        busy = sum(one.end - one.begin for one in self.passes)
        return 1 - busy / (self.makespan * self.stages) if self.makespan else 0.0


class Deadlock(Exception):
    """No stage can go on, and some are not done."""


def simulate(
    schedule: Schedule,
    stages: int,
    microbatches: int,
    forward: float | Sequence[float] = 1.0,
    backward: float | Sequence[float] = 1.0,
    message: float | Sequence[float] = 0.0,
    weights: float | Sequence[float] = 0.0,
) -> Simulation:
    """Run a schedule on all stages. An action begins when its stage is free and its message has arrived; sending takes
    no time of the stage and never blocks.

    Args:
        forward, backward: the time of a pass, for all stages or for each.
        weights: the part of the backward pass that is W where it has two parts.
        message: the time that a message travels, for all stages or for each stage and the next.

    Raises Deadlock, naming the action at which each stage is stuck.
    """
    durations = {"F": _of_each(forward, stages), "B": _of_each(backward, stages), "W": _of_each(weights, stages)}
    durations["I"] = [whole - part for whole, part in zip(durations["B"], durations["W"], strict=True)]
    travel = _of_each(message, stages - 1)
    ended: dict[tuple[int, Action], float] = {}
    todo = [list(schedule(stages, stage, microbatches)) for stage in range(stages)]
    place, clock = [0] * stages, [0.0] * stages
    passes: list[Pass] = []
    progress = True
    while progress:
        progress = False
        for stage in range(stages):
            while place[stage] < len(todo[stage]):
                action = todo[stage][place[stage]]
                needs = [_done(any_of, ended) for any_of in _needs(stages, stage, action)]
                if None in needs:
                    break
                arrived = (
                    ended[need] + (travel[min(stage, need[0])] if need[0] != stage else 0) for need in needs if need
                )
                begin = max([clock[stage], *arrived])
                end = begin + durations[action.kind][stage]
                ended[stage, action] = clock[stage] = end
                passes.append(Pass(stage, action, begin, end))
                place[stage] += 1
                progress = True
    stuck = [f"stage {s} at {''.join(map(str, todo[s][place[s]]))}" for s in range(stages) if place[s] < len(todo[s])]
    if stuck:
        raise Deadlock("; ".join(stuck))
    return Simulation(passes, max(clock, default=0.0), stages)


def held(actions: Iterable[Action]) -> Iterator[tuple[int, int]]:
    """After each action of a stage: the micro-batches in flight, whose backward pass or its first part is not done, and
    those that wait for W."""
    flight = waiting = 0
    for kind, _ in actions:
        flight += {"F": 1, "B": -1, "I": -1}.get(kind, 0)
        waiting += {"I": 1, "W": -1}.get(kind, 0)
        yield flight, waiting


def _of_each(times: float | Sequence[float], count: int) -> Sequence[float]:
    return times if isinstance(times, Sequence) else [times] * count


def _needs(stages: int, stage: int, action: Action) -> list[list[tuple[int, Action]]]:
    """What must have ended before an action can begin: of each list one (stage, action)."""
    kind, m = action
    if kind == "F":
        return [[(stage - 1, action)]] if stage > 0 else []
    if kind == "W":
        return [[(stage, Action("I", m))]]
    own = [(stage, Action("F", m))]
    return [own, [(stage + 1, Action("B", m)), (stage + 1, Action("I", m))]] if stage < stages - 1 else [own]


def _done(actions: Sequence[tuple[int, Action]], ended: Container[tuple[int, Action]]) -> tuple[int, Action] | None:
    """The first that has ended."""
    return next((action for action in actions if action in ended), None)
