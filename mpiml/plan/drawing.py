"""A schedule as text, in PyTorch's notation: 1F0 is the forward pass of micro-batch 0 on stage 1; no MPI."""

from __future__ import annotations

from mpiml.parallel.schedules import Schedule
from mpiml.parallel.simulator import simulate

WIDTH = 120  # letters of a line


def draw(schedule: Schedule, stages: int, microbatches: int) -> str:
    """A line for each stage, a column for each unit of time, dots where it is idle; in as many parts as fit below each
    other. F, I and W take a unit each, and B two."""
    made = simulate(schedule, stages, microbatches, 1, 2, weights=1)
    labels = [f"{one.stage}{one.action.kind}{one.action.microbatch}" for one in made.passes]
    wide = max(map(len, labels), default=0) + 1
    lines = [["."] * round(made.makespan) for _ in range(stages)]
    for label, one in zip(labels, made.passes, strict=True):
        begin, end = round(one.begin), round(one.end)
        lines[one.stage][begin:end] = [label] * (end - begin)
    each = WIDTH // wide
    parts = [
        "\n".join("".join(cell.ljust(wide) for cell in line[start : start + each]).rstrip() for line in lines)
        for start in range(0, round(made.makespan), each)
    ]
    idle = f"idle for {made.bubble():.0%} of the time, if F, I and W take equally long, and B twice as long"
    return "\n\n".join([*parts, idle])
