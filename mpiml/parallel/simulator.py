"""A simulator for schedules: finds deadlocks, gives times and memory, draws the picture; no MPI."""

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
    schedule: Schedule, stages: int, microbatches: int, forward: float = 1.0, backward: float = 1.0
) -> Simulation:
    """Run a schedule on all stages. An action begins when its stage is free and its message has been sent; sends
    take no time and block nobody, receives wait; nothing is buffered that a receive would not find.

    Raises Deadlock, naming what each stage waits for.
    """
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
                begin = max([clock[stage], *(ended[need] for need in needs)])
                end = begin + (forward if action.kind == "F" else backward)
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
