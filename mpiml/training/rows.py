"""The data of a run: shards to train on and chunks to test on, looked at, as the settings want them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from mpiml.config import Config
from mpiml.data.dataset import Dataset, Split
from mpiml.data.fingerprint import Fingerprint
from mpiml.data.normalize import Normalization, NormalizedSource
from mpiml.data.prefetch import ReadAhead, steps_ahead
from mpiml.data.shards import Shards
from mpiml.errors import DataError
from mpiml.parallel.grid import Grid
from mpiml.partition import part
from mpiml.training.data import Known, Seen, checked, hold, look_at, look_for_starving, measure, read_first, said
from mpiml.training.evaluation import Evaluation
from mpiml.training.resolve import Resolved
from mpiml.training.task import Task
from mpiml.usercode import called_with, named


@dataclass(frozen=True)
class RunData:
    """The data of a run, looked at, and what they ask of a model.

    Attributes:
        ahead: the rows of `shards`, read some steps ahead.
        seen: what a look at all rows has shown; None if nobody has looked.
        notes: what a person should know.
    """

    shards: Shards
    ahead: ReadAhead
    tests: Evaluation
    task: Task
    normalization: Normalization | None
    fingerprint: Fingerprint
    seen: Seen | None
    notes: list[str]


def build_data(config: Resolved, data: Dataset, grid: Grid, known: Known = Known()) -> RunData:  # noqa: B008
    """Look at the rows that this rank will train and test on, and cut them as the settings say; collective. What is
    `known` is not read again.

    Raises, on all ranks alike, DataError or ConfigError for rows that cannot be used.
    """
    first, last = part(grid.replica, grid.replicas, config.microbatches)
    cut = functools.partial(
        Shards,
        microbatches=config.microbatches,
        batch=config.batch,
        seed=config.seed,
        first=first,
        last=last,
        dtype=config.dtype,
        shuffle=config.shuffle,
        block_rows=config.block_rows,
        strided=config.shards == "strided",
        transform=grid.team.together(functools.partial(find_transform, config, data)),
    )
    deal = functools.partial(Evaluation, chunk_rows=config.eval_rows, grid=grid, dtype=config.dtype)
    shards, ignore = cut(data.train), data.ignored(config.ignore)
    rows, test_rows = shards.rows(), deal(data.test).rows()
    hold(data, grid, rows, test_rows, both=shards.transform is not None)
    seen, train, test = known.seen, data.train, data.test
    if not seen and config.look == "first":
        train, test = grid.team.together(lambda: checked(data, config.classes, ignore))
        read_first(grid, (train, rows), (test, test_rows))
    elif not seen:
        seen = look_at(data, grid, rows, test_rows, config.classes, ignore=ignore)
        seen.notes += look_for_starving(data, grid, cut(train.ignoring(ignore)), seen.outputs)
    asked = seen or said(data, config.classes)
    train, test = (split.ignoring(ignore) for split in (train, test))
    shards = cut(train)
    normalization = (known.normalization or measure(data, grid, shards)) if config.normalize else None
    if normalization:
        train, test = (normalized(split, normalization, config.dtype) for split in (train, test))
        shards = cut(train)
    ahead = steps_ahead(shards) if config.prefetch is None else config.prefetch
    return RunData(
        shards=shards,
        ahead=ReadAhead(shards, ahead, config.steps, grid.stage == 0, grid.stage == grid.stages - 1),
        tests=deal(test),
        task=Task(data.train.x.shape, data.train.y.shape, data.classification, asked.outputs, asked.tokens, ignore),
        normalization=normalization,
        fingerprint=data.fingerprint,
        seen=seen,
        notes=asked.notes,
    )


def normalized(split_: Split, by: Normalization, dtype: DTypeLike) -> Split:
    """A split whose inputs are normalised."""
    return dataclasses.replace(split_, x=NormalizedSource(split_.x, by, dtype))


def find_transform(config: Config, data: Dataset) -> Callable[..., Any] | None:
    """The user's function for rows to train on, if there is one.

    Raises ConfigError if what is named cannot be called so; when called, DataError for labels that are not classes.
    """
    if not config.transform:
        return None
    function: Callable[..., Any] = named(config.transform, "--transform")
    called_with(function, f"--transform {config.transform}", "x", "y", "rng")
    lowest = (0 if data.ignored(config.ignore) is None else -1) if data.classification else -math.inf

    def transform(x: Any, y: Any, rng: np.random.Generator) -> tuple[Any, Any]:
        x, y = function(x, y, rng)
        if np.min(y, initial=0) < lowest:
            hint = "classes are numbered from 0 (-1 may mean no label if --ignore says that there are such rows)"
            raise DataError(f"--transform {config.transform} gave a label of {np.min(y)}, but {hint}")
        return x, y

    return transform
