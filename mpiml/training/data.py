"""The data of a run: opened on all ranks, compared between them, and looked at, every value, before the first step."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from mpi4py import MPI

from mpiml.clock import Clock
from mpiml.config import Config
from mpiml.data.dataset import Dataset, Split
from mpiml.data.fill import MEAN, Filling, present
from mpiml.data.fingerprint import Fingerprint, difference
from mpiml.data.inspection import Findings, inspect, problem
from mpiml.data.normalize import Normalization, moments
from mpiml.data.preparation import Preparation, prepared
from mpiml.data.shards import Shards, classes_seen, starved
from mpiml.data.sources import Indices, Source
from mpiml.errors import ConfigError, DataError
from mpiml.parallel.grid import Grid
from mpiml.team import Team
from mpiml.training import resolve
from mpiml.training.task import Task

T = TypeVar("T")


def open_data(config: Config, team: Team, data: Dataset | None, task: Task | None = None) -> Dataset:
    """The data set that the settings name, or `data`, the same on all ranks; collective. `task` is what a trained
    model takes.

    Raises, on all ranks alike, DataError or ConfigError if there is none, or if some rank has another.
    """
    elsewhere = "; if the run's data lie elsewhere in this job, say where by --data"

    def opened() -> tuple[Dataset, Fingerprint]:
        try:
            opened = data or resolve.open_data(config, task)
            return opened, opened.fingerprint
        except DataError as error:
            stored = config.resume and "data" not in (config.given or ())
            raise DataError(f"{error}{elsewhere if stored else ''}") from error

    team.clock("data")
    dataset, fingerprint = team.together(naming(team, opened))
    first = team.broadcast(fingerprint)

    def same() -> None:
        if other := difference(fingerprint, first, "on rank 0"):
            raise DataError(f"{dataset.name}: ranks have different data: {other}")

    team.together(naming(team, same))
    if dataset.check:
        team.on_rank_0(naming(team, dataset.check))
    return dataset


@dataclass
class Seen:
    """What the data set asks of a model.

    Attributes:
        outputs: the number of classes, or of values per label.
        tokens: one more than the highest integer input; 0 if inputs are not integers.
        notes: what a person should know.
    """

    outputs: int
    tokens: int
    notes: list[str]


def look_at(
    data: Dataset,
    grid: Grid,
    train: Indices | None,
    test: Indices,
    classes: int | None,
    both: bool = False,
    tokens: int | None = None,
    ignore: int | None = None,
    gaps: bool = False,
) -> Seen:
    """Read the rows that this rank will use, and check all values of the data set; collective.

    Inputs are read by the first stage, labels by the last, each row of the training set by one replica.

    Args:
        train, test: the numbers of this replica's rows; train is None if nobody trains, and then its rows are not read.
        classes: how many there are, if that has been said; else the data set may know it, or the labels tell.
        both: whether those who train on inputs need labels too, and the other way round.
        tokens: how many token ids there are, if that has been said and is not the number of classes.
        ignore: the label that means no label, if there is one.
        gaps: whether inputs may be NaN, to be filled.
    """
    team = grid.team
    ends = {"x": grid.stage == 0, "y": grid.stage == grid.stages - 1}
    also = both and any(ends.values())
    classes = classes or data.classes
    limits, ignored = {"x": tokens or classes, "y": classes}, {"x": None, "y": ignore}
    seen = Seen((classes or 0) if data.classification else math.prod(data.train.y.shape), 0, [])
    splits = [(split_, rows) for split_, rows in ((data.train, train), (data.test, test)) if rows is not None]
    columns = [(split_, rows, column) for split_, rows in splits for column in ends]

    def read() -> list[Findings]:
        findings = []
        for split_, rows, column in columns:
            hold = ends[column] or (also and split_ is data.train)
            source, missing = getattr(split_, column), gaps and column == "x"
            findings.append(_read(team.clock, source, rows, hold, ends[column], ignored[column], missing))
        return findings

    everyones = team.allgather(team.together(naming(team, read)))
    for (split_, _, column), findings in zip(columns, zip(*everyones, strict=True), strict=True):
        source: Source = getattr(split_, column)
        joined = _sound(data, grid, source, column, findings, limits[column])
        highest = int(max(joined.highest[0], -1))
        if column == "x":
            seen.tokens = max(seen.tokens, highest + 1)
        elif data.classification:
            seen.outputs = max(seen.outputs, highest + 1)
            if joined.masked:
                seen.notes.append(f"{source.name}: {joined.masked} labels are {ignore} and do not count")
    return seen


def _sound(
    data: Dataset, grid: Grid, source: Source, column: str, findings: Sequence[Findings], limit: int | None
) -> Findings:
    """The findings of all ranks in a column, joined. Raises DataError, on all alike, for what cannot be used."""
    joined = functools.reduce(operator.or_, findings)
    if wrong := problem(data, column, joined, limit):
        problems = [problem(data, column, one, limit) for one in findings]
        reader = next(rank for rank, one in enumerate(problems) if one and one[1] == wrong[1])
        error = DataError(f"{source.name}: {wrong[0]} {wrong[1]}")
        raise _of_rank(error, grid.team, reader).on_all_ranks(grid.team.launched[reader])
    return joined


def prepare(config: Config, data: Dataset, grid: Grid, shards: Shards) -> list[Preparation]:
    """What is done to inputs before the model sees them, as the settings say, in this order; collective.

    What is measured for it is measured over all training rows, each read by one rank.
    """
    team, done = grid.team, list[Preparation]()
    team.together(lambda: _check_numbers(config, data))
    if config.fill == MEAN:
        sums = _of_shards(grid, shards, shards.split, present)
        done.append(team.on_rank_0(lambda: Filling.of_means(sums, data.names)))
    elif config.fill is not None:
        done.append(Filling(np.full(data.train.x.shape, float(config.fill))))
    if config.normalize:
        all_moments = _of_shards(grid, shards, prepared(shards.split, done, config.dtype), moments)
        done.append(team.on_rank_0(lambda: Normalization.of(all_moments)))
    return done


def _check_numbers(config: Config, data: Dataset) -> None:
    for flag, asked in (("--fill", config.fill is not None), ("--normalize", config.normalize)):
        if asked and data.language_model:
            raise ConfigError(f"{flag}: the data set's inputs are tokens, not numbers")


def _of_shards(
    grid: Grid, shards: Shards, split_: Split, measured: Callable[[Source, Indices, Callable[[], object]], T]
) -> list[T]:
    """On rank 0, what has been measured of the inputs of each shard, in the order of the shards; collective."""
    team, clock = grid.team, grid.team.clock

    def here() -> list[T]:
        clock("data")
        block = range(shards.first, shards.last) if grid.stage == 0 else ()
        return [measured(split_.x, shards.numbers(m), clock.progress) for m in block]

    return list(itertools.chain(*(team.comm.gather(team.together(here)) or [])))


def look_for_starving(data: Dataset, grid: Grid, shards: Shards, classes: int) -> list[str]:
    """A warning if the shards of sorted labels have only some of the classes each; collective."""
    if not data.classification or data.language_model or shards.strided:
        return []
    both = np.zeros(classes + shards.microbatches, np.int64)
    counts, seen = both[:classes], both[classes:]
    team, clock = grid.team, grid.team.clock
    if grid.stage == grid.stages - 1:
        clock("data")
        counts[:], seen[:] = classes_seen(shards, classes, clock.progress)
    team.wait([team.comm.Iallreduce(MPI.IN_PLACE, both)])
    warning = starved(counts, seen)
    return [f"warning: {warning}"] if warning else []


def _read(
    clock: Clock, source: Source, rows: Indices, hold: bool, look: bool, ignore: int | None, gaps: bool
) -> Findings:
    clock("data")
    if hold:
        source.hold(rows)
    return inspect(source, rows, ignore, clock.progress, gaps) if look else Findings()


def naming(team: Team, action: Callable[[], T]) -> Callable[[], T]:
    """`action`, which names this rank in a DataError that it raises: a file may be bad on one node alone."""

    def named() -> T:
        try:
            return action()
        except DataError as error:
            raise _of_rank(error, team, team.rank) from error

    return named


def _of_rank(error: DataError, team: Team, rank: int) -> DataError:
    return DataError(f"{error} (rank {team.launched[rank]})" if team.size > 1 else str(error))
