"""A look at the rows of a run: at all of them before the first step, on all ranks, or at each when it is used."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from mpiml.data.dataset import Dataset, Split
from mpiml.data.inspection import CheckedSource, Findings, inspect, problem, taken_for_values
from mpiml.data.labels import ValueSource
from mpiml.data.preparation import Preparation
from mpiml.data.shards import Shards, classes_seen, starved
from mpiml.data.sources import Indices, Source
from mpiml.errors import ConfigError, DataError
from mpiml.parallel.grid import Grid
from mpiml.team import reduced
from mpiml.training.data import columns_of, has, naming, with_rank
from mpiml.training.task import Seen, declared

FIRST = 64  # rows of each column that a rank looks at with --look first


@dataclass(frozen=True)
class Known:
    """What earlier jobs of a run have learned of its data; None: nothing.

    Attributes:
        seen: what all rows have shown.
        preparations: what is done to its model's inputs.
    """

    seen: Seen | None = None
    preparations: list[Preparation] | None = None


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

    own = team.together(naming(team, read))
    with team.clock.doing("joining"):
        everyones = reduced(team.comm, own, lambda *two: list(itertools.starmap(operator.or_, zip(*two, strict=True))))
    for (split_, _, column), findings, joined in zip(columns, own, team.broadcast(everyones), strict=True):
        source: Source = getattr(split_, column)
        limit, ask = limits.get(column), doubt and source is data.train.y
        wrong = functools.partial(problem, data, column, classes=limit, doubt=ask, trained_on=train is not None)
        _check(grid, source, findings, joined, wrong)
        _add(seen, data, column, source, joined)
    return seen


def _add(seen: Seen, data: Dataset, column: str, source: Source, joined: Findings) -> None:
    """Add to what has been `seen` what all rows of a column have shown."""
    highest = int(max(joined.highest[0], -1))
    if column == "x":
        seen.tokens = max(seen.tokens, highest + 1)
        seen.bounds = list((Findings(bounds=tuple(seen.bounds)) | joined).bounds)
    elif column == "y" and data.classification:
        seen.outputs = max(seen.outputs, highest + 1)
        if source is data.train.y and joined.lowest[0] == highest:
            seen.notes.append(f"warning: {source.name}: all labels are {highest}, so that there is nothing to learn")
        if joined.masked:
            seen.notes.append(f"{source.name}: {joined.masked} labels are {seen.ignore} and do not count")
    elif source is data.train.y and not isinstance(source, ValueSource) and (note := taken_for_values(joined)):
        seen.notes.append(f"{source.name}: {note}")


def _check(
    grid: Grid,
    source: Source,
    own: Findings,
    joined: Findings,
    problem_of: Callable[[Findings], tuple[str, int] | None],
) -> None:
    """Raise DataError, on all ranks alike, if what all have found in a column, `joined`, cannot be used; collective."""
    if wrong := problem_of(joined):
        findings = grid.team.allgather(own)
        problems = [problem_of(one) for one in findings]
        reader = next((rank for rank, one in enumerate(problems) if one and one[1] == wrong[1]), None)
        if reader is None:  # no rank by itself sees it
            reader = next(r for r, one in enumerate(findings) if one.lowest == joined.lowest)
        error = DataError(f"{source.name}: {wrong[0]} {wrong[1]}")
        raise with_rank(error, grid.team, reader).on_all_ranks(grid.team.launched[reader])


def checked(data: Dataset, needed: Seen, ignore: int | None, gaps: bool) -> tuple[Split, Split]:
    """The training rows and the test rows of a data set that this job has not looked at, checked as they are read.

    Raises ConfigError if the number of classes that are `needed` is not known.
    """
    if not needed.outputs:
        raise ConfigError(
            "--look first: the number of classes is not known without a look at all labels; say it with --classes"
        )
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
