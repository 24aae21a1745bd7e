"""The data of a run: shards to train on and chunks to test on, looked at, as the settings want them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

from mpiml.data.dataset import Dataset, Split
from mpiml.data.fingerprint import Fingerprint
from mpiml.data.prefetch import ReadAhead, steps_ahead
from mpiml.data.preparation import Preparation, prepared
from mpiml.data.shards import Shards, rereads
from mpiml.data.sources import Indices
from mpiml.parallel.grid import Grid
from mpiml.partition import part
from mpiml.training.data import columns_of, hold, prepare
from mpiml.training.evaluation import Evaluation
from mpiml.training.look import Known, checked, look_at, look_for_starving, read_first
from mpiml.training.resolve import Resolved, words_text
from mpiml.training.task import Seen, Task, declared
from mpiml.training.transform import find_transform, try_transform


@dataclass(frozen=True)
class RunData:
    """The data of a run, looked at, and what they ask of a model.

    Attributes:
        ahead: the rows of `shards`, read some steps ahead once they are `tried`.
        preparations: what has been done to their inputs, in this order.
        seen: what a look at all rows has shown; None if nobody has looked.
        notes: what a person should know.
    """

    shards: Shards
    ahead: ReadAhead
    tests: Evaluation
    task: Task
    preparations: list[Preparation]
    fingerprint: Fingerprint
    seen: Seen | None
    notes: list[str]


def build_data(config: Resolved, data: Dataset, grid: Grid, known: Known = Known()) -> RunData:  # noqa: B008
    """Look at the rows that this rank will train and test on, and cut them as the settings say; collective. What is
    `known` is not read again.

    Raises, on all ranks alike, DataError or ConfigError for rows that cannot be used.
    """
    cut, ignore = _cutter(config, data, grid), data.ignored(config.ignore)
    deal = functools.partial(
        Evaluation, chunk_rows=config.eval_rows, grid=grid, dtype=config.dtype, evaluated=config.evaluated
    )
    rows, test_rows = cut(data.train).rows(), deal(data.test).rows()
    hold(data, grid, rows, test_rows, both=bool(config.transform))
    seen, splits = _looked_at(config, data, grid, cut, (rows, test_rows), known)
    train, test = (split.ignoring(ignore) for split in splits)
    preparations = known.preparations
    if preparations is None:
        preparations = prepare(config, data, grid, cut(train))
    train, test = (prepared(split, preparations, config.dtype) for split in (train, test))
    shards, needed = cut(train), seen or declared(data, config.classes)
    words = [f"labels are words: {len(data.words)} classes, {words_text(data.words)}"] if data.words else []
    return RunData(
        shards=shards,
        ahead=_ahead(config, shards, grid, 0),
        tests=deal(test),
        task=Task.of(data, needed, ignore),
        preparations=preparations,
        fingerprint=data.fingerprint,
        seen=seen,
        notes=[*data.notes, *words, *needed.notes, *rereads(shards)],
    )


def tried(config: Resolved, data: RunData, grid: Grid) -> RunData:
    """The data, with a transform tried as step 1 will call it, and read ahead as far as settings and transform allow;
    collective. Preparations are as the model wants them by now.

    Raises, on all ranks alike, DataError for a transform that cannot be used.
    """
    shards = data.shards
    notes = [*data.notes, *try_transform(config, shards, grid)]
    steps = steps_ahead(shards, config.prefetch, columns_of(grid))
    return dataclasses.replace(data, notes=notes, ahead=_ahead(config, shards, grid, steps))


def _cutter(config: Resolved, data: Dataset, grid: Grid) -> Callable[[Split], Shards]:
    """What cuts a split into the shards of this rank's replica; collective."""
    first, last = part(grid.replica, grid.replicas, config.microbatches, config.leaf)
    return functools.partial(
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


def _looked_at(
    config: Resolved,
    data: Dataset,
    grid: Grid,
    cut: Callable[[Split], Shards],
    rows: tuple[Indices, Indices],
    known: Known,
) -> tuple[Seen | None, tuple[Split, Split]]:
    """What a look at all rows has shown, in this job or before, and the rows to train and to test on, those with the
    numbers `rows` on this rank; collective. Rows that might not be those of a look are checked as they are read."""
    ignore, gaps = data.ignored(config.ignore), config.fill is not None
    if known.seen is None and config.look != "first":
        doubt = config.ignore is None and not config.resume
        seen = look_at(data, grid, *rows, config.classes, ignore=ignore, gaps=gaps, doubt=doubt)
        seen.notes += look_for_starving(data, grid, cut(data.train.ignoring(ignore)), seen.outputs)
        return seen, (data.train, data.test)
    splits, needed = (data.train, data.test), known.seen or declared(data, config.classes)
    if known.seen is None or not data.sampled:
        splits = grid.team.together(lambda: checked(data, needed, ignore, gaps))
        read_first(grid, *zip(splits, rows, strict=True))
    return known.seen, splits


def _ahead(config: Resolved, shards: Shards, grid: Grid, steps: int) -> ReadAhead:
    columns = columns_of(grid)
    return ReadAhead(shards, steps, config.steps, x="x" in columns, y="y" in columns)
