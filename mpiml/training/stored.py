"""A stored model: a checkpoint, the run that it is of, and the data to score it on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.data.fingerprint import difference
from mpiml.data.inputs import inputs_of, shapes
from mpiml.data.preparation import Preparation
from mpiml.data.sources import Zeros
from mpiml.documents import AVERAGE
from mpiml.errors import ConfigError, DataError, OutputError
from mpiml.nn.parameters import Layout
from mpiml.parallel.grid import Grid
from mpiml.parallel.state import VALUES, parts
from mpiml.parallel.values import Values
from mpiml.run import checkpoint as checkpoints
from mpiml.run import environment, shared_file, step_files
from mpiml.run.checkpoint import Checkpoint, Header
from mpiml.run.contents import Contents
from mpiml.run.directory import CHECKPOINTS, CONFIG
from mpiml.training import resolve
from mpiml.training.arrays import needed_kinds, preparations, restore_constants, segments
from mpiml.training.constants import Constants
from mpiml.training.saved import averaged_weights, code_of, settings_in, settings_of, step_of_weights
from mpiml.training.task import Task


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint's model without its weights; the same on all ranks.

    Attributes:
        run: the directory that it is of.
        contents, header: of the checkpoint; of the header those arrays that are taken.
        averaged: whether averages of weights are taken in their place.
    """

    config: Config
    step: int
    task: Task
    preparations: list[Preparation]
    run: Path
    notes: list[str]
    contents: Contents
    header: Header
    averaged: bool

    def name_of(self, weight: str) -> str:
        """The name of the array that is taken for a weight."""
        average = AVERAGE + weight
        return average if self.averaged and average in self.contents.kinds else weight


def stored_model(
    run: str | None,
    file: str | None,
    asked: Mapping[str, Any],
    named: Mapping[str, Any],
    raw: bool,
    damaged: Mapping[Path, str] = MappingProxyType({}),
) -> StoredModel:
    """The model of a run's newest checkpoint or of `file`; on rank 0. If the run keeps an average of its weights, that
    is in their place, unless the `raw` weights are asked for.

    Settings that are asked for, and not None, take the place of the run's; `named` are those that may name code. Of
    files that are `damaged` it is known what is wrong with them.
    """
    own: dict[str, str] = {}
    problems: list[str] = []
    if file is not None:
        if Path(file).is_dir():
            raise ConfigError(f"--checkpoint {file}: is a directory, not a file; a run is scored with --run")
        saved, path = _loaded(Path(file), damaged), Path(file).absolute().parent.parent
    else:
        path = Path(run or "")
        if not (path / CHECKPOINTS).is_dir():
            raise ConfigError(f"--run {run}: " + ("holds no run" if path.is_dir() else "there is no such directory"))
        saved, problems = _newest(path / CHECKPOINTS, damaged)
        if (path / CONFIG).exists():
            own = code_of(settings_in(path / CONFIG))
    given = {name: value for name, value in named.items() if value is not None}
    config, task = settings_of(saved, tuple(named), own | given), Task.of_checkpoint(saved)
    if task.classification and resolve.of_values(config):
        raise ConfigError(
            f"--loss {config.loss} --metric {config.metric}: for values, but the run's labels are classes"
        )
    cuts = config.cuts if config.pipe == asked["pipe"] else ()
    config = resolve.scored(config, task.classification).replace(
        cuts=cuts, balance="operations", **{name: value for name, value in asked.items() if value is not None}
    )
    prepared = preparations(saved, config, task.shape)
    notes = [f"warning: skipped {problem}" for problem in problems]
    step = step_of_weights(saved, config)
    averaged, header = bool(config.ema) and not raw, saved.header
    if averaged:
        header = header._replace(kinds=averaged_weights(saved, config, header.kinds))
        notes.append(f"the average of the weights is scored, as in the run (--ema {config.ema}; see --raw-weights)")
    elif step < saved.step:
        notes.append(f"{saved.origin} was saved within a round of workers: the weights are those after step {step}")
    return StoredModel(config, step, task, prepared, path, notes, saved.contents, header, averaged)


def _loaded(path: Path, damaged: Mapping[Path, str]) -> Checkpoint:
    """A checkpoint with those arrays that say what is done to inputs."""
    if path in damaged:
        raise OutputError(damaged[path])
    return checkpoints.load(path, lambda name: name.startswith("data."))


def _newest(directory: Path, damaged: Mapping[Path, str]) -> tuple[Checkpoint, list[str]]:
    """The newest whole checkpoint, and what is wrong with newer ones. The run may remove files meanwhile."""
    while True:
        files = step_files.listed(directory)
        try:
            saved, problems = step_files.newest(directory, lambda path: _loaded(path, damaged))
        except OutputError:
            if files == step_files.listed(directory):
                raise
            continue
        if saved:
            return saved, problems
        raise OutputError(f"{directory.parent} has no checkpoint yet")


def check_validation(config: Config, asked: Mapping[str, Any]) -> None:
    """Raise ConfigError if the rows that a run with this config has set aside to validate on are asked for, and there
    are none, or they would be others."""
    if asked["validation"] is None and not config.validation:
        raise ConfigError("--validation: the run was trained without, so it has no rows set aside; leave it out")
    if asked["validation"] is None and asked["held_out"] is not None:
        raise ConfigError(f"--validation --held-out {asked['held_out']}: these rows are chosen as in the run; give one")


def reading(config: Config, others: bool, asked: Mapping[str, Any]) -> Config:
    """The settings with which the data are read: arrays of `others` than the run's have the names asked for."""
    arrays = asked["arrays"] if others else config.arrays
    return config.replace(arrays=arrays, given=frozenset())


def check_data(stored: StoredModel, data: Dataset, others: bool) -> None:
    """Raise DataError unless a data set is of the kind that the run's was, and unchanged if it is not `others`."""
    task = stored.task
    inputs = inputs_of(data.test.x)
    for what, given, trained in (
        ("inputs are", inputs and shapes(inputs), task.inputs and shapes(task.inputs)),
        ("rows of x_test are", data.test.x.shape, task.shape),
        ("labels of a row are", data.test.y.shape, task.labels),
        ("labels are", *("classes" if kind else "values" for kind in (data.classification, task.classification))),
    ):
        if given != trained and (data.test.labelled or not what.startswith("labels")):
            raise DataError(f"{data.name}: {what} {given}, but the run's {trained}")
    numbered = data.test.y.dtype.kind == "b"  # false and true are 0 and 1, whether words or not
    if data.words and tuple(data.words) != task.words and not numbered:
        raise DataError(f"{data.name}: labels are words, but the run's are numbers")
    before = None if others else environment.data(stored.run)
    if before and (other := difference(data.fingerprint, before, "in the run")):
        raise DataError(
            f"{data.name} has changed since the run: {other}; to score it all the same, name it with --data"
        )


def with_zeros(data: Dataset, task: Task) -> Dataset:
    """A data set whose test rows, if they have no labels, have zeros of the kind that a model was trained on."""
    if data.test.labelled:
        return data
    zeros = Zeros(len(data.test), data.test.y.name, task.labels, np.int64 if task.classification else np.float64)
    return Dataset.of_splits(None, dataclasses.replace(data.test, y=zeros), name=data.name, files=data.files)


def check_wanted(data: Dataset, predictions: str | None) -> None:
    """Raise DataError if there is nothing to score, and ConfigError if rows without labels are not to be predicted."""
    if not len(data.test):
        raise DataError(
            f"{data.name}: there are no test rows; name others with --data, or hold some out (--held-out); the rows "
            "that a run has set aside by --validation are scored with --validation"
        )
    if not data.test.labelled and not predictions:
        raise ConfigError(
            f"{data.name}: the rows have no labels, so that there is nothing to score; write predictions with "
            "--predictions FILE, or say which are the labels (y_test; in a table, --label NAME)"
        )


def _add_constants(path: Path, constants: Constants, given: dict[str, Any]) -> None:
    given.update(checkpoints.load(path, lambda name: name in constants.arrays).arrays)


def read_model(
    stored: StoredModel,
    again: Callable[[Mapping[Path, str]], StoredModel],
    constants: Constants,
    values: Values,
    layouts: Sequence[Layout],
    grid: Grid,
) -> StoredModel:
    """Read weights and constants of a stored model, each rank what it needs; collective.

    If the file is damaged, or gone because the run goes on, `again` is called on rank 0 with what is wrong with damaged
    ones; it returns the model to read in its place. Returns the model that has been read. Raises OutputError, on all
    ranks alike, if there is none.
    """
    team, given, damaged = grid.team, dict[str, Any](), dict[Path, str]()  # the last two on rank 0
    team.clock("checkpoint")
    first_node, of_values = team.broadcast(grid.node.size), parts(values, {})[VALUES]
    while True:
        path = Path(stored.header.origin)
        names, layout = map(stored.name_of, needed_kinds(layouts, (VALUES,))), layouts[grid.stage]
        into = segments(layout, VALUES, of_values.held, stored.name_of)
        counted = segments(layout, VALUES, of_values.collected, stored.name_of, once=True)
        try:
            team.on_rank_0(functools.partial(_add_constants, path, constants, given))
            shared_file.load(team, first_node, path, stored.contents, names, into, counted)
            break
        except OutputError as error:
            problem = str(error)

            def older(path: Path = path, problem: str = problem) -> StoredModel:
                if path.exists():
                    damaged[path] = problem
                return again(damaged)

            stored = team.on_rank_0(older)
    restore_constants(constants, team, given)
    with team.clock.doing("joining"):
        values.publish()
    return stored
