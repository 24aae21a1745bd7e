"""The user's function for rows to train on: called, and tried before the first step."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.data.shards import Shards
from mpiml.errors import DataError, RunError
from mpiml.parallel.grid import Grid
from mpiml.random import Draws, global_generators
from mpiml.training.data import columns_of, naming
from mpiml.usercode import called_with, named

Arrays = list[NDArray[Any]]


def find_transform(config: Config, data: Dataset) -> Callable[..., Any] | None:
    """The user's function for rows to train on, if there is one.

    Raises ConfigError if what is named cannot be called so; when called, DataError for what it returns if that is not
    (x, y), or labels that are not classes.
    """
    if not config.transform:
        return None
    flag = f"--transform {config.transform}"
    function: Callable[..., Any] = named(config.transform, "--transform")
    called_with(function, flag, "x", "y", "rng")
    lowest = (0 if data.ignored(config.ignore) is None else -1) if data.classification else -math.inf

    def transform(x: Any, y: Any, rng: np.random.Generator) -> tuple[Any, Any]:
        result = function(x, y, rng)
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            length = f" of length {len(result)}" if isinstance(result, (tuple, list)) else ""
            raise DataError(f"{flag} returned {type(result).__name__}{length}; a pair (x, y) is needed")
        x, y = result
        if np.min(y, initial=0) < lowest:
            hint = "classes are numbered from 0 (-1 may mean no label if --ignore says that there are such rows)"
            raise DataError(f"{flag} gave a label of {np.min(y)}, but {hint}")
        return x, y

    return transform


def try_transform(config: Config, shards: Shards, grid: Grid) -> list[str]:
    """Call the user's function, if there is one, as step 1 will, and let `shards` know from which generators of the
    process it draws; collective. Returns what a person should know.

    All ranks together call it on the same rows on every grid, so they all learn the same.

    Raises DataError, on all ranks alike, if the function raises an error or returns what cannot be used.
    """
    if not shards.transform:
        return []
    flag, team = f"--transform {config.transform}", grid.team

    def tried() -> tuple[frozenset[str], bool]:
        if not columns_of(grid):
            return frozenset(), True
        team.clock("data")
        imported = global_generators().keys()
        first, drawn = _step_1(shards, flag)
        again, more = _step_1(shards, flag)  # for PyTorch's generator, if only the first call has imported it
        same = all(np.array_equal(one, other, equal_nan=True) for one, other in zip(first, again, strict=True))
        return drawn | more, same or imported != global_generators().keys()

    everyones = team.allgather(team.together(naming(team, tried)))
    shards.draws = frozenset[str]().union(*(drawn for drawn, _ in everyones))
    notes = []
    if not all(same for _, same in everyones):
        notes.append(f"warning: {flag} gives other rows when called again: results depend on the grid; draw from rng")
    if shards.draws and config.prefetch:
        why = f"{flag} draws from generators of the whole process ({', '.join(sorted(shards.draws))})"
        notes.append(f"--prefetch {config.prefetch}: nothing is read ahead, because {why}")
    return notes


def _step_1(shards: Shards, flag: str) -> tuple[Arrays, frozenset[str]]:
    """The rows of this rank's micro-batches of step 1, and from which generators of the process they were drawn."""
    arrays, drawn = Arrays(), frozenset[str]()
    for batch in shards.batches(1):
        with Draws(shards.seed, "transform", 1, batch.index) as draws:
            try:
                arrays += (batch.x(), batch.y()) if batch.rows else ()
            except RunError:
                raise
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{place.filename}, line {place.lineno}"
                raise DataError(f"{flag} raises {type(error).__name__}: {error} ({where})") from error
        drawn |= draws.which
    return arrays, drawn
