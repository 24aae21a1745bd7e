"""The data of a run: shards to train on and chunks to test on, looked at, as the settings want them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from mpiml.data.dataset import Dataset
from mpiml.data.fingerprint import Fingerprint
from mpiml.data.inputs import inputs_of
from mpiml.data.prefetch import ReadAhead, steps_ahead
from mpiml.data.preparation import Preparation, prepared
from mpiml.data.shards import Shards, rereads
from mpiml.parallel.grid import Grid
from mpiml.partition import part
from mpiml.training.data import Known, Seen, checked, declared, hold, look_at, look_for_starving, prepare, read_first
from mpiml.training.evaluation import Evaluation
from mpiml.training.resolve import Resolved, words_text
from mpiml.training.task import Task
from mpiml.training.transform import find_transform, try_transform


@dataclass(frozen=True)
class RunData:
    """The data of a run, looked at, and what they ask of a model.

    Attributes:
        ahead: the rows of `shards`, read some steps ahead.
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
    rows, test_rows, gaps = shards.rows(), deal(data.test).rows(), config.fill is not None
    hold(data, grid, rows, test_rows, both=shards.transform is not None)
    seen, train, test = known.seen, data.train, data.test
    if not seen and config.look != "first":
        doubt = config.ignore is None and not config.resume
        seen = look_at(data, grid, rows, test_rows, config.classes, ignore=ignore, gaps=gaps, doubt=doubt)
        seen.notes += look_for_starving(data, grid, cut(train.ignoring(ignore)), seen.outputs)
    needed = seen or declared(data, config.classes)
    if not seen or (known.seen and not data.sampled):
        train, test = grid.team.together(lambda: checked(data, needed, ignore, gaps))
        read_first(grid, (train, rows), (test, test_rows))
    train, test = (split.ignoring(ignore) for split in (train, test))
    shards, preparations = cut(train), known.preparations
    if preparations is None:
        preparations = prepare(config, data, grid, shards)
    train, test = (prepared(split, preparations, config.dtype) for split in (train, test))
    shards = cut(train)
    words = [f"labels are words: {len(data.words)} classes, {words_text(data.words)}"] if data.words else []
    notes = [*data.notes, *words, *needed.notes, *rereads(shards), *try_transform(config, shards, grid)]
    return RunData(
        shards=shards,
        ahead=_ahead(config, shards, grid),
        tests=deal(test),
        task=Task(
            data.train.x.shape,
            data.train.y.shape,
            data.classification,
            needed.outputs,
            needed.tokens,
            ignore,
            words=tuple(data.words),
            columns=tuple(data.names),
            inputs=inputs_of(data.train.x),
            bounds=tuple(needed.bounds),
        ),
        preparations=preparations,
        fingerprint=data.fingerprint,
        seen=seen,
        notes=notes,
    )


def _ahead(config: Resolved, shards: Shards, grid: Grid) -> ReadAhead:
    """What reads ahead as far as the settings say, or else as it is worth."""
    return ReadAhead(
        shards, steps_ahead(shards, config.prefetch), config.steps, grid.stage == 0, grid.stage == grid.stages - 1
    )
