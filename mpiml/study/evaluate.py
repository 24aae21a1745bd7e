"""Scores a checkpoint on test rows, on any grid: `mpirun -n 3 python -m mpiml.evaluate --run runs/mine`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from mpiml import design, documents, load, restart, waiting
from mpiml.assemble import build_stage, normalized
from mpiml.build import Model, Task, check_constants
from mpiml.clock import Clock
from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.data.fingerprint import difference
from mpiml.data.normalize import Normalization
from mpiml.errors import ConfigError, DataError, OutputError, freed
from mpiml.evaluation import Evaluation
from mpiml.nn.parameters import Layout
from mpiml.parallel import grid as grids
from mpiml.parallel.grid import Grid
from mpiml.parallel.memory import share
from mpiml.parallel.split import check_ranks
from mpiml.parallel.stage import Stage
from mpiml.parallel.state import VALUES, State
from mpiml.parallel.values import Values
from mpiml.run import checkpoint as checkpoints
from mpiml.run import environment, launch
from mpiml.run.checkpoint import Checkpoint
from mpiml.run.directory import CHECKPOINTS, CONFIG
from mpiml.run.failure import Guard, exit_code
from mpiml.run.process import prepare_process
from mpiml.run.terminal import say
from mpiml.run.verdict import on_rank_0, together
from mpiml.run.watch import Watch
from mpiml.saved import code_of, settings_in, settings_of
from mpiml.study.command import ended
from mpiml.study.predictions import Predictions, check_path
from mpiml.vectors import bytes_of

PROGRAM = "mpiml.evaluate"


@dataclass
class Found:
    """What all ranks know of a checkpoint."""

    config: Config
    step: int
    task: Task
    normalization: Normalization | None
    run: Path
    notes: list[str]


def evaluate(
    run: str | None = None,
    *,
    checkpoint: str | None = None,
    data: str | Dataset | None = None,
    label: str | None = None,
    token_dtype: str | None = None,
    held_out: float | None = None,
    predictions: str | None = None,
    pipe: int = 1,
    comm: MPI.Intracomm | None = None,
    model: Model | None = None,
    loss: str | None = None,
    metric: str | None = None,
) -> dict[str, Any]:
    """Score a checkpoint as the command does; every rank of the communicator calls it alike. The run stays as it is.

    A checkpoint is data: code that it names is run only if the run directory's config.toml, or an argument, names it.

    Args:
        run: a run directory, whose newest whole checkpoint is scored; or, in its place, the file `checkpoint`.
        data: whose test rows, as the command takes it or as a data set; by default the run's own.
        label, token_dtype, held_out: how to read them, as Config has it; by default as the run did.
        predictions: a file to write to, .npy or .csv.
        pipe: stages.
        comm: the ranks; all of the job's by default.
        model: what the run was trained with, as `train` takes it, or its name, package.module:function.
        loss, metric: by name, as Config has them; by default as the run did.

    Returns:
        `test_loss` and the metric under its name, as a run logs them, with `step`, `rows`, `run` and `data`.

    Raises:
        RunError: as mpiml.train.train.
    """
    clock = Clock()
    comm = MPI.COMM_WORLD if comm is None else comm
    whole: list[Checkpoint] = []  # on rank 0
    asked = {"pipe": pipe, "label": label, "token_dtype": token_dtype, "held_out": held_out}
    named = {"data": data, "model": model, "loss": loss, "metric": metric}

    def look() -> Found:
        if predictions is not None:
            check_path(Path(predictions))
        found, saved = find(run, checkpoint, asked, named)
        whole.append(saved)
        return found

    with Guard(comm, clock, PROGRAM) as guard:
        launch.check_size(MPI.COMM_WORLD.size)
        launch.check_alike(comm, clock, launch.software())
        found = on_rank_0(comm, clock, look)
        together(comm, clock, lambda: check_ranks(comm.size, pipe))
        with Watch(comm.Dup(), clock, found.config.stall_timeout, guard.fail), np.errstate(all="ignore"):
            made = None if isinstance(model, str) else model
            return _evaluate(found, whole, data, predictions, comm, clock, made)


def find(
    run: str | None, file: str | None, asked: Mapping[str, Any], named: Mapping[str, Any]
) -> tuple[Found, Checkpoint]:
    """The checkpoint to score, without optimizer state, and what there is to know of it. Rank 0 calls it.

    Settings that are asked for, and not None, take the place of the run's; `named` are those that may name code.
    """
    own: dict[str, str] = {}

    def wanted(name: str) -> bool:
        return not name.startswith("optimizer.")

    problems: list[str] = []
    if file is not None:
        if Path(file).is_dir():
            raise ConfigError(f"--checkpoint {file}: is a directory, not a file; a run is scored with --run")
        saved, path = checkpoints.load(Path(file), wanted), Path(file).absolute().parent.parent
    else:
        path = Path(run or "")
        if not (path / CHECKPOINTS).is_dir():
            raise ConfigError(f"--run {run}: " + ("holds no run" if path.is_dir() else "there is no such directory"))
        saved, problems = _newest(path / CHECKPOINTS, wanted)
        if (path / CONFIG).exists():
            own = code_of(settings_in(path / CONFIG))
    given = {name: value for name, value in named.items() if value is not None}
    config, task = settings_of(saved, tuple(named), own | given), Task.of_checkpoint(saved)
    cuts = config.cuts if config.pipe == asked["pipe"] else ()
    config = design.scored(config, task.classification).replace(
        cuts=cuts, **{name: value for name, value in asked.items() if value is not None}
    )
    normalization = restart.normalization(saved, task) if config.normalize else None
    return Found(config, saved.step, task, normalization, path, [f"warning: skipped {p}" for p in problems]), saved


def _newest(directory: Path, wanted: Callable[[str], bool]) -> tuple[Checkpoint, list[str]]:
    """The newest whole checkpoint, and what is wrong with newer ones. The run may remove files meanwhile."""
    while True:
        there = checkpoints.listed(directory)
        try:
            saved, problems = checkpoints.newest(directory, wanted)
        except OutputError:
            if there == checkpoints.listed(directory):
                raise
            continue
        if saved:
            return saved, problems
        raise OutputError(f"{directory.parent} has no checkpoint yet")


def _evaluate(
    found: Found,
    whole: list[Checkpoint],
    data: str | Dataset | None,
    predictions: str | None,
    comm: MPI.Intracomm,
    clock: Clock,
    model: Model | None,
) -> dict[str, Any]:
    prepare_process(found.config.threads)
    config = found.config
    dataset = load.open_data(config, comm, clock, data if isinstance(data, Dataset) else None)
    together(comm, clock, lambda: check_data(found, dataset, others=data is not None))
    about = {"run": str(found.run), "step": found.step}
    about["data"] = dataset.name if isinstance(data, Dataset) else config.data
    with freed(grids.build(comm, config.pipe), comm.size) as grid:
        return about | _scored(found, whole, dataset, predictions, grid, clock, model)


def _scored(
    found: Found,
    whole: list[Checkpoint],
    dataset: Dataset,
    predictions: str | None,
    grid: Grid,
    clock: Clock,
    model: Model | None,
) -> dict[str, Any]:
    """The sums over the test rows; collective over the grid."""
    config, task = found.config, found.task
    waiting.share_cores(grid.node.size * config.threads, grid.cores)
    tests = Evaluation(dataset.test, config.eval_rows, grid, config.dtype)
    classes = task.outputs if task.classification else None
    seen = load.look_at(dataset, grid, clock, None, tests.rows(), classes, tokens=task.vocabulary, ignore=task.ignore)
    tests.split = dataset.test.ignoring(task.ignore)
    if found.normalization:
        tests.split = normalized(tests.split, found.normalization, config.dtype)
    layouts, metric, here, fixed = build_stage(config, task, grid, clock, model)
    on_rank_0(grid.comm, clock, lambda: _check_model(whole[0], fixed, layouts))
    values, problem = _placed(config, grid, layouts[grid.stage])
    with freed(values, grid.comm.size):
        _filled(values, grid, layouts, whole, clock)
        for note in [*found.notes, *seen.notes, *([f"warning: {problem}"] if problem else [])]:
            if grid.comm.rank == 0:
                say(note, sys.stderr)
        kept = Predictions(here, task) if predictions else None
        record = tests.score(Stage(grid.pipe, here, clock), metric, clock, found.step)
        assert record, "nobody asks it to leave off"
        if kept:
            kept.write(Path(predictions or ""), tests, clock)
        score = on_rank_0(grid.comm, clock, lambda: metric.value(record.metric))
    return {"rows": len(tests.split), "test_loss": record.mean_loss, metric.name: score}


def check_data(found: Found, data: Dataset, others: bool) -> None:
    """Raise DataError unless a data set is of the kind that the run's was, and unchanged if it is not `others`."""
    task = found.task
    for what, mine, its in (
        ("rows of x_test are", data.test.x.shape, task.shape),
        ("labels of a row are", data.test.y.shape, task.labels),
        ("labels are", *("classes" if kind else "values" for kind in (data.classification, task.classification))),
    ):
        if mine != its:
            raise DataError(f"{data.name}: {what} {mine}, but the run's {its}")
    before = None if others else environment.data(found.run)
    if before and (other := difference(data.fingerprint, before, "in the run")):
        raise DataError(
            f"{data.name} has changed since the run: {other}; to score it all the same, name it with --data"
        )


def _check_model(saved: Checkpoint, constants: str, layouts: Sequence[Layout]) -> None:
    """Raise OutputError if a checkpoint is of another model: before memory that only a forged one asks for is."""
    check_constants(constants, saved)
    needed = restart.needed_kinds(layouts, (VALUES,))
    checkpoints.check_kinds(saved.origin, checkpoints.kinds_of(saved.arrays), needed)


def _placed(config: Config, grid: Grid, layout: Layout) -> tuple[Values, str | None]:
    """Room for the values of this rank's stage, and why it is not shared; collective."""
    memory, problem = share(grid.comm, grid.local, 0, bytes_of(layout.size, layout.dtype), config.memory)
    values = Values(grid, memory, layout.size, layout.dtype)
    layout.bind(values.values)
    return values, problem


def _filled(values: Values, grid: Grid, layouts: Sequence[Layout], whole: list[Checkpoint], clock: Clock) -> None:
    """Hand out the values of the checkpoint on rank 0; collective."""
    stages: list[Mapping[str, Any]] = []
    clock("checkpoint")
    on_rank_0(grid.comm, clock, lambda: stages.extend(restart.vectors(layouts, whole.pop(), (VALUES,))))
    State(grid, values, {}, clock).distribute(stages, VALUES)


def text(result: Mapping[str, Any]) -> str:
    """The result as a line."""
    *_, (metric, score) = result.items()
    return (
        f"{result['run']}, step {result['step']}, {result['rows']} test rows of {result['data']}: "
        f"loss {result['test_loss']:.4f}, {metric} {score:.4f}"
    )


def main(parse: Callable[[], argparse.Namespace]) -> int:
    """The command, of which `parse` knows what it has been asked. Returns the exit code."""
    return ended(PROGRAM, lambda: _main(parse))


def _main(parse: Callable[[], argparse.Namespace]) -> int:
    comm, clock = MPI.COMM_WORLD, Clock()
    try:
        with Guard(comm, clock, PROGRAM):
            asked = on_rank_0(comm, clock, lambda: vars(parse()))
        as_json = asked.pop("json")
        result = evaluate(**asked)
    except BaseException as error:  # reported already, and in a job of several ranks known to all
        return exit_code(error)
    if comm.rank == 0:
        print(documents.to_json(result) if as_json else text(result), flush=True)
    return 0
