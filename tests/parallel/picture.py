"""A simulated schedule as text, for README.md and for tests."""

from mpiml.parallel.simulator import Pass, Simulation


def draw(simulation: Simulation) -> str:
    """A line per stage, a column per unit of time; forward passes as 0 1 2, backward passes as [0] [1] [2]."""
    width = max((len(_label(one)) for one in simulation.passes), default=1) + 1
    lines = []
    for stage in range(len(simulation.in_flight)):
        cells = [".".ljust(width)] * round(simulation.makespan)
        for one in simulation.passes:
            if one.stage == stage:
                for column in range(round(one.begin), round(one.end)):
                    cells[column] = _label(one).ljust(width)
        lines.append(f"stage {stage}  {''.join(cells)}".rstrip())
    return "\n".join(lines)


def _label(one: Pass) -> str:
    microbatch = str(one.action.microbatch)
    return microbatch if one.action.kind == "F" else f"[{microbatch}]"
