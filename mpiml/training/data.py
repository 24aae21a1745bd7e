"""The data of a run: opened on all ranks, compared between them, and looked at before the first step."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI

from mpiml import documents
from mpiml.config import Config
from mpiml.data.dataset import Dataset, Split
from mpiml.data.fill import MEAN, Filling, present
from mpiml.data.fingerprint import Fingerprint, difference
from mpiml.data.inspection import CheckedSource, Findings, inspect, problem
from mpiml.data.labels import ValueSource
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
FIRST = 64  # rows of each column that a rank looks at with --look first


def open_data(
    config: Config, team: Team, data: Any = None, task: Task | None = None, tests_only: bool = False
) -> Dataset:
    """The data set that the settings name, or `data`, the same on all ranks; collective. Arguments as of
    `resolve.open_data`.

    Raises, on all ranks alike, DataError or ConfigError if there is none, or if some rank has another.
    """
    elsewhere = "; if the run's data lie elsewhere in this job, say where by --data"

    def opened() -> tuple[Dataset, Fingerprint]:
        try:
            opened = resolve.open_data(config, data, task, tests_only)
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
    return dataset


@dataclass
class Seen:
    """What the data set asks of a model.

    Attributes:
        outputs: the number of classes, or of values per label.
        tokens: one more than the highest integer input; 0 if inputs are not integers.
        notes: what a person should know.
        ignore: the label that does not count, if there is one.
        bounds: of each input, where a row has several, the lowest and the highest integer, 0 included.
    """

    outputs: int
    tokens: int
    notes: list[str]
    ignore: int | None = None
    bounds: list[int] = field(default_factory=list)

    @classmethod
    def of_json(cls, value: Any) -> Seen | None:
        """From what a run directory holds of it; None if that is damaged: then the rows are to be looked at again."""
        kinds = typing.get_type_hints(cls)
        if not isinstance(value, dict) or value.keys() != kinds.keys():
            return None
        whole = all(documents.fits(value[name], kind) for name, kind in kinds.items())
        return cls(**value) if whole and value["outputs"] > 0 and value["tokens"] >= 0 else None


def declared(data: Dataset, classes: int | None) -> Seen:
    """What a data set asks of a model as far as is known without a look at it: no outputs if only labels tell."""
    return Seen((classes or data.classes or 0) if data.classification else data.row_labels, 0, [])


@dataclass(frozen=True)
class Known:
    """What earlier jobs of a run have learned of its data; None: nothing.

    Attributes:
        seen: what all rows have shown.
        preparations: what is done to its model's inputs.
    """

    seen: Seen | None = None
    preparations: list[Preparation] | None = None


def hold(data: Dataset, grid: Grid, train: Indices | None, test: Indices, both: bool = False) -> None:
    """Tell the sources which rows this rank will use; collective.

    Inputs are for the first stage, labels for the last.

    Args:
        train, test: the numbers of this replica's rows; train is None if nobody trains.
        both: whether those who train on inputs need labels too, and the other way round.
    """
    team, ends = grid.team, columns_of(grid)

    def held() -> None:
        team.clock("data")
        more = "xy" if both and ends else ""
        for split_, rows, columns in ((data.train, train, ends + more), (data.test, test, ends)):
            for column in dict.fromkeys(columns):
                if rows is not None and has(split_, column):
                    getattr(split_, column).hold(rows)

    team.together(naming(team, held))


def has(split_: Split, column: str) -> bool:
    """Whether rows have that column: weights are not always there, nor are labels of rows to predict."""
    return getattr(split_, column) is not None and (column != "y" or split_.labelled)


def columns_of(grid: Grid) -> str:
    """The columns that this rank uses."""
    return "x" * (grid.stage == 0) + "yw" * (grid.stage == grid.stages - 1)


def look_at(
    data: Dataset,
    grid: Grid,
    train: Indices | None,
    test: Indices,
    classes: int | None,
    tokens: int | None = None,
    ignore: int | None = None,
    gaps: bool = False,
    doubt: bool = False,
) -> Seen:
    """Check all values of the data set, of which each rank reads the rows that it holds; collective.

    Args:
        train, test: the numbers of this replica's rows; train is None if nobody trains, and then its rows are not read.
        classes: how many there are, if that has been said; else the data set may know it, or the labels tell.
        tokens: how many token ids there are, if that has been said and is not the number of classes.
        ignore: the label that means no label, if there is one.
        gaps: whether inputs may be NaN, to be filled.
        doubt: whether to ask, of labels to train on, if one means no label: nobody has said so.
    """
    team, ends, classes = grid.team, columns_of(grid), classes or data.classes
    limits, ignored = {"x": tokens or classes, "y": classes}, {"y": ignore}
    seen = declared(data, classes)
    seen.ignore = ignore
    splits = [(split_, rows) for split_, rows in ((data.train, train), (data.test, test)) if rows is not None]
    columns = [(split_, rows, column) for split_, rows in splits for column in "xyw" if has(split_, column)]
    if data.check:
        team.on_rank_0(naming(team, data.check))

    def look(split_: Split, rows: Indices, column: str) -> Findings:
        own = rows if column in ends else rows[:0]
        return inspect(getattr(split_, column), own, ignored.get(column), team.clock.progress, gaps and column == "x")

    def read() -> list[Findings]:
        team.clock("data")
        return list(itertools.starmap(look, columns))

    everyones = team.allgather(team.together(naming(team, read)))
    for (split_, _, column), findings in zip(columns, zip(*everyones, strict=True), strict=True):
        source: Source = getattr(split_, column)
        wrong = functools.partial(
            problem, data, column, classes=limits.get(column), doubt=doubt and source is data.train.y
        )
        joined = _sound(grid, source, findings, wrong)
        highest = int(max(joined.highest[0], -1))
        if column == "x":
            seen.tokens = max(seen.tokens, highest + 1)
            seen.bounds = list((Findings(bounds=tuple(seen.bounds)) | joined).bounds)
        elif column == "y" and data.classification:
            seen.outputs = max(seen.outputs, highest + 1)
            if joined.masked:
                seen.notes.append(f"{source.name}: {joined.masked} labels are {ignore} and do not count")
        elif source is data.train.y and joined.binary and not isinstance(source, ValueSource):
            seen.notes.append(f"{source.name}: all labels are 0 or 1, but are taken for values; see --loss bce")
    return seen


def _sound(
    grid: Grid, source: Source, findings: Sequence[Findings], problem_of: Callable[[Findings], tuple[str, int] | None]
) -> Findings:
    """The findings of all ranks in a column, joined. Raises DataError, on all alike, for what cannot be used."""
    joined = functools.reduce(operator.or_, findings)
    if wrong := problem_of(joined):
        problems = [problem_of(one) for one in findings]
        reader = next((rank for rank, one in enumerate(problems) if one and one[1] == wrong[1]), None)
        if reader is None:  # no rank by itself sees it
            reader = next(r for r, one in enumerate(findings) if one.lowest == joined.lowest)
        error = DataError(f"{source.name}: {wrong[0]} {wrong[1]}")
        raise _of_rank(error, grid.team, reader).on_all_ranks(grid.team.launched[reader])
    return joined


def checked(data: Dataset, needed: Seen, ignore: int | None, gaps: bool) -> tuple[Split, Split]:
    """The training rows and the test rows of a data set that this job has not looked at, checked as they are read.

    Raises ConfigError if only all labels would tell how many classes are `needed`.
    """
    if not needed.outputs:
        raise ConfigError("--look first: only all labels would tell how many classes there are; say it with --classes")
    tokens, classes = (max(needed.tokens, needed.outputs), needed.outputs) if data.classification else (None, None)

    def with_checks(split_: Split) -> Split:
        x = CheckedSource(split_.x, data, "x", tokens, None, gaps)
        return dataclasses.replace(split_, x=x, y=CheckedSource(split_.y, data, "y", classes, ignore))

    return with_checks(data.train), with_checks(data.test)


def read_first(grid: Grid, *splits: tuple[Split, Indices]) -> None:
    """Read a few of the rows with these numbers, for the DataError that this may raise on all ranks; collective."""
    team = grid.team

    def read() -> None:
        team.clock("data")
        for (split_, rows), column in itertools.product(splits, columns_of(grid)):
            if has(split_, column):
                getattr(split_, column).rows(rows[:FIRST])

    team.together(naming(team, read))


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
            raise ConfigError(
                f"{flag}: the data set's inputs are tokens (save numbers that have a label each as floating-point)"
            )


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
    if not data.classification or data.row_labels > 1 or shards.strided:
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
