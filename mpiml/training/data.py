"""The data of a run: opened on all ranks, compared between them, held where they are used, and prepared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI

from mpiml.config import Config
from mpiml.data.dataset import Dataset, Split
from mpiml.data.fill import MEAN, Filling, present
from mpiml.data.fingerprint import Fingerprint, difference, properties
from mpiml.data.normalize import Normalization, moments
from mpiml.data.preparation import Preparation, prepared
from mpiml.data.shards import Shards
from mpiml.data.sources import Indices, Source
from mpiml.errors import ConfigError, DataError
from mpiml.parallel.grid import Grid
from mpiml.parallel.tree import Range, added
from mpiml.team import Team, reduced
from mpiml.training import resolve
from mpiml.training.task import Task
from mpiml.usercode import is_name

T = TypeVar("T")


def open_data(
    config: Config, team: Team, data: Any = None, task: Task | None = None, tests_only: bool = False
) -> Dataset:
    """The data set that the settings name, or `data`, the same on all ranks; collective. Arguments as of
    `resolve.open_data`.

    Raises, on all ranks alike, DataError or ConfigError if there is none, or if some rank has another.
    """
    elsewhere = "; if the run's data lie elsewhere in this job, say where by --data"

    def opened() -> Dataset:
        try:
            return resolve.open_data(config, data, task, tests_only)
        except DataError as error:
            stored = config.resume and "data" not in (config.given or ())
            raise DataError(f"{error}{elsewhere if stored else ''}") from error

    team.clock("data")
    dataset = team.together(naming(team, opened))
    fingerprint = _fingerprint(team, dataset)
    first = team.broadcast(fingerprint)

    def same() -> None:
        if other := difference(fingerprint, first, "on rank 0"):
            hint = f"; {config.data} must draw from generators with a seed" if is_name(config.data) else ""
            raise DataError(f"{dataset.name}: ranks have different data: {other}{hint}")

    team.together(naming(team, same))
    return dataset


def _fingerprint(team: Team, data: Dataset) -> Fingerprint:
    """The fingerprint of a data set; collective. The ranks of a node read its files in turn; those that are other files
    on some rank, it reads itself."""
    node, origin = Team(MPI.Intracomm(team.comm.Split_type(MPI.COMM_TYPE_SHARED)), team.clock), data.origin
    own = team.together(naming(team, lambda: properties(origin.files[node.rank :: node.size])))
    origin.known = {identity: text for read in node.allgather(own) for identity, text in read.items()}
    node.comm.Free()
    fingerprint = team.together(naming(team, lambda: data.fingerprint))
    origin.known = {}
    return fingerprint


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


def prepare(config: Config, data: Dataset, grid: Grid, shards: Shards) -> list[Preparation]:
    """What is done to inputs before the model sees them, as the settings say, in this order; collective.

    What is measured for it is measured over all training rows, each read by one rank.
    """
    team, done = grid.team, list[Preparation]()
    team.together(lambda: _check_numbers(config, data))
    if config.fill == MEAN:
        done.append(_of_all(grid, shards, shards.split, present, lambda total: Filling.of_means(total, data.names)))
    elif config.fill is not None:
        done.append(Filling(np.full(data.train.x.shape, float(config.fill))))
    if config.normalize:
        filled = prepared(shards.split, done, config.dtype)
        done.append(_of_all(grid, shards, filled, moments, Normalization.of))
    return done


def _check_numbers(config: Config, data: Dataset) -> None:
    for flag, asked in (("--fill", config.fill is not None), ("--normalize", config.normalize)):
        if asked and data.language_model:
            raise ConfigError(
                f"{flag}: the data set's inputs are tokens (save numbers that have a label each as floating-point)"
            )


def _of_all(
    grid: Grid,
    shards: Shards,
    split_: Split,
    measured: Callable[[Source, Indices, Callable[[], object]], T],
    made: Callable[[T], Preparation],
) -> Preparation:
    """What is `made` of what has been `measured` of the inputs of all shards; collective.

    The measurements are added up by the tree over the shards' numbers, which no layout changes, by each rank and then
    between pairs of replicas. So a rank has a few for each level of the tree, not one for each shard.
    """
    team, clock, microbatches = grid.team, grid.team.clock, shards.microbatches

    def here() -> tuple[list[Range], list[T]]:
        clock("data")
        block = range(shards.first, shards.last) if grid.stage == 0 else range(0)
        each = (measured(split_.x, shards.numbers(m), clock.progress) for m in block)
        return added([(m, m + 1) for m in block], each, microbatches)

    sums = team.together(here)
    if grid.stage == 0:
        with clock.doing("joining"):
            sums = reduced(
                grid.data, sums, lambda one, other: added(one[0] + other[0], one[1] + other[1], microbatches)
            )
    return team.on_rank_0(lambda: made(*sums[1]))


def naming(team: Team, action: Callable[[], T]) -> Callable[[], T]:
    """`action`, which names this rank in a DataError that it raises: a file may be bad on one node alone."""

    def named() -> T:
        try:
            return action()
        except DataError as error:
            raise with_rank(error, team, team.rank) from error

    return named


def with_rank(error: DataError, team: Team, rank: int) -> DataError:
    """The error with the name of a rank, where there are several."""
    return DataError(f"{error} (rank {team.launched[rank]})" if team.size > 1 else str(error))
