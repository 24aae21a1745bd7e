"""First values from a file: rank 0 reads one array after the other, and each rank gets the parts that it needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from numpy.typing import NDArray

from mpiml.parallel.state import VALUES, Key, Source, of_rank_0
from mpiml.run.verified import Progress
from mpiml.training.run import Run

Array = NDArray[Any]


def take(run: Run, progress: Progress) -> tuple[dict[str, Array], list[str]]:
    """Put what --init gives in the place of first values; what it does not give stays. Collective.

    Returns, on rank 0, the constants that it gives, by name, and what a person should know. Raises, on all ranks alike,
    what `init.take` raises.
    """
    team, constants, read = run.grid.team, dict[str, Array](), list[Array]()
    places = dict[str, list[tuple[Key, int, int]]]()  # of each array on the stages that have it
    for stage, layout in enumerate(run.model.layouts):
        for parameter, start in layout.offsets.items():
            places.setdefault(parameter.first.name, []).append(((stage, VALUES), start, start + parameter.size))
    given: Iterator[tuple[str, Array]] = iter(())  # on rank 0
    notes: list[str] = []

    def begin() -> None:
        nonlocal given, notes
        from mpiml.training import init  # on one rank, of a few runs

        given, notes = init.take(run.config, run.model, progress)

    def advance() -> str | None:
        """Read the next parameter, if there is one; all constants before it are kept."""
        for name, value in given:
            if name in places:
                read.append(value.reshape(-1))
                return name
            constants[name] = value
        return None

    def sources() -> Iterator[Source]:
        while name := team.on_rank_0(advance):
            value = read.pop() if read else None
            yield from (of_rank_0(*place, value) for place in places[name])

    team.on_rank_0(begin)
    run.state.take(sources())
    return constants, notes
