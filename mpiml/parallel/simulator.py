"""A simulator for schedules: finds deadlocks, gives times and memory, draws the picture; no MPI."""

from collections.abc import Sequence
from dataclasses import dataclass

from mpiml.parallel.schedules import Action, Schedule


@dataclass(frozen=True)
class Slot:
    """An action on a stage, with its begin and end."""

    stage: int
    action: Action
    begin: float
    end: float


@dataclass
class Simulation:
    """What happened: every action's slot, the time of the whole step, and each stage's most micro-batches in flight."""

    slots: list[Slot]
    makespan: float
    in_flight: list[int]

    def bubble(self) -> float:
        """The idle fraction of all stages' time."""
        busy = sum(slot.end - slot.begin for slot in self.slots)
        return 1 - busy / (self.makespan * len(self.in_flight)) if self.makespan else 0.0


class Deadlock(Exception):
    """No stage can go on, but actions are left."""


def simulate(
    schedule: Schedule,
    stages: int,
    microbatches: int,
    forward: float | Sequence[float] = 1.0,
    backward: float | Sequence[float] = 1.0,
    message: float | Sequence[float] = 0.0,
) -> Simulation:
    """Run a schedule on all stages. An action begins when its stage is free and its message has arrived; sends
    take no time of their stage and block nobody, receives wait; nothing is buffered that a receive would not find.

    Args:
        forward, backward: time of a pass, of all stages or of each.
        message: time on the way, of all messages or of those between each stage and the next.

    Raises Deadlock, naming what each stage waits for.
    """
    passes = {"F": _of_each(forward, stages), "B": _of_each(backward, stages)}
    way = _of_each(message, stages - 1)
    ended: dict[tuple[int, Action], float] = {}
    todo = [list(schedule(stages, stage, microbatches)) for stage in range(stages)]
    place, clock = [0] * stages, [0.0] * stages
    flight, peak = [0] * stages, [0] * stages
    slots: list[Slot] = []
    moved = True
    while moved:
        moved = False
        for stage in range(stages):
            while place[stage] < len(todo[stage]):
                action = todo[stage][place[stage]]
                needs = _needs(stages, stage, action)
                if any(need not in ended for need in needs):
                    break
                arrived = (ended[need] + (way[min(stage, need[0])] if need[0] != stage else 0) for need in needs)
                begin = max([clock[stage], *arrived])
                end = begin + passes[action.kind][stage]
                ended[stage, action] = clock[stage] = end
                slots.append(Slot(stage, action, begin, end))
                flight[stage] += 1 if action.kind == "F" else -1
                peak[stage] = max(peak[stage], flight[stage])
                place[stage] += 1
                moved = True
    stuck = [f"stage {s} at {''.join(map(str, todo[s][place[s]]))}" for s in range(stages) if place[s] < len(todo[s])]
    if stuck:
        raise Deadlock("; ".join(stuck))
    return Simulation(slots, max(clock, default=0.0), peak)


def _of_each(times: float | Sequence[float], count: int) -> Sequence[float]:
    return times if isinstance(times, Sequence) else [times] * count


def _needs(stages: int, stage: int, action: Action) -> list[tuple[int, Action]]:
    """The actions that must have ended, and on which stage, before this one can begin."""
    if action.kind == "F":
        return [(stage - 1, action)] if stage > 0 else []
    own = (stage, Action("F", action.microbatch))
    return [own, (stage + 1, action)] if stage < stages - 1 else [own]


def draw(simulation: Simulation) -> str:
    """The schedule as text: a line per stage, a column per unit of time; forward 0 1 2, backward in brackets."""
    width = max((len(_label(slot)) for slot in simulation.slots), default=1) + 1
    lines = []
    for stage in range(len(simulation.in_flight)):
        cells = [".".ljust(width)] * round(simulation.makespan)
        for slot in simulation.slots:
            if slot.stage == stage:
                for column in range(round(slot.begin), round(slot.end)):
                    cells[column] = _label(slot).ljust(width)
        lines.append(f"stage {stage}  {''.join(cells)}".rstrip())
    return "\n".join(lines)


def _label(slot: Slot) -> str:
    microbatch = str(slot.action.microbatch)
    return microbatch if slot.action.kind == "F" else f"[{microbatch}]"
