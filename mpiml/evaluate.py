"""Scores a checkpoint on test rows, on any grid: `mpirun -n 3 python -m mpiml.evaluate --run runs/mine`."""

from __future__ import annotations

if __name__ == "__main__":
    from mpiml.run import start

    start.begin("mpiml.evaluate")

import argparse
import dataclasses
import functools
import sys
from collections.abc import Sequence

from mpiml.command import Parser, run_command, whole
from mpiml.devices.choice import KINDS


def _text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The parsed command line. Raises ConfigError for what is wrong in it; `--help` prints and raises SystemExit."""
    parser = Parser(
        prog="python -m mpiml.evaluate",
        usage="[mpirun -n RANKS] python -m mpiml.evaluate (--run DIR | --checkpoint FILE) [settings]",
        description="Score a run's newest checkpoint on its test rows. The result is the same on any grid.",
        allow_abbrev=False,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=_text, metavar="DIR", help="run directory; the run may still be training")
    which.add_argument("--checkpoint", type=_text, metavar="FILE", help="a checkpoint, instead of a run's newest")
    function = "package.module:function"
    more = {
        "--data": (
            "SPEC",
            "score the test rows of this data set, given as for mpiml.train, where rows to test on are enough, and "
            "inputs alone if all that is wanted is --predictions (default: the run's)",
        ),
        "--arrays": ("NAME=ARRAY,..", "the names of its arrays, as for mpiml.train (default of the run's: the run's)"),
        "--label": ("NAME", "the data set's column of labels (default: as in the run)"),
        "--token-dtype": ("NAME", "the type of its tokens (default: as in the run)"),
        "--held-out": ("X", "the part of its training rows to test on if there are no others (default: as in the run)"),
        "--model": (function, "your own model; a function that only the checkpoint names is not called"),
        "--loss": (function, "your own loss; likewise"),
        "--metric": (function, "your own metric; likewise"),
        "--predictions": ("FILE", "write the predicted class, word or values of every test row to a .npy or .csv file"),
    }
    for flag, (metavar, help) in more.items():
        parser.add_argument(flag, type=_text, metavar=metavar, help=help)
    words = "write the probability of each class, or with --loss bce of 1, to --predictions"
    parser.add_argument("--probabilities", action="store_true", help=words)
    words = "score the weights themselves, of a run with --ema too, whose evaluations are of their average"
    parser.add_argument("--raw-weights", action="store_true", help=words)
    words = "score the rows that the run has set aside by --validation, in place of the test rows"
    parser.add_argument("--validation", action="store_true", help=words)
    words = "what computes a model of PyTorch modules, as for mpiml.train (default: cpu, whatever the run had)"
    parser.add_argument("--device", choices=KINDS, default="cpu", help=words)
    words = "let several ranks use one GPU"
    parser.add_argument("--share-devices", action="store_true", help=words)
    parser.add_argument("--pipe", type=whole(), default=1, metavar="N", help="pipeline stages (default: 1)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    start.answer_help(parse)
    start.start_mpi()


from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from mpiml import documents
from mpiml.clock import Clock
from mpiml.data.dataset import Dataset
from mpiml.data.preparation import prepared
from mpiml.devices.choice import check_sharing
from mpiml.errors import ConfigError, freed
from mpiml.parallel import grid as grids
from mpiml.parallel.grid import Grid
from mpiml.parallel.stage import Stage
from mpiml.parallel.state import VALUES
from mpiml.partition import check_ranks
from mpiml.run import one_job
from mpiml.run.console import say
from mpiml.run.failure import Guard, exit_code
from mpiml.run.process import prepare_process
from mpiml.run.watch import Watch
from mpiml.team import Team, share_cores
from mpiml.training.arrays import needed_kinds
from mpiml.training.data import hold, open_data
from mpiml.training.evaluation import Evaluation
from mpiml.training.look import look_at
from mpiml.training.model import Model
from mpiml.training.place import BuiltModel, build_stage, place_values
from mpiml.training.predictions import Predicted, Predictions, check_path
from mpiml.training.resolve import binary
from mpiml.training.stored import (
    StoredModel,
    check_data,
    check_validation,
    check_wanted,
    read_model,
    reading,
    stored_model,
    with_zeros,
)

if __name__ == "__main__":
    start.begun()

PROGRAM = "mpiml.evaluate"


def evaluate(
    run: str | None = None,
    *,
    checkpoint: str | None = None,
    data: Any = None,
    label: str | None = None,
    token_dtype: str | None = None,
    held_out: float | None = None,
    arrays: str | None = None,
    validation: bool = False,
    predictions: str | None = None,
    probabilities: bool = False,
    raw_weights: bool = False,
    device: str = "cpu",
    share_devices: bool = False,
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
        data: whose test rows, as the command takes it, or as an object, which may also be an array of inputs; by
            default the run's own.
        label, token_dtype, held_out, arrays: how to read them, as Config has it; by default as the run did.
        validation: whether to score, in place of test rows, those that the run has set aside by --validation; `data`
            then says where the run's data lie now.
        predictions: a file to write to, .npy or .csv.
        probabilities: whether to write the probabilities of all classes, (rows, *labels, classes), or with --loss bce
            that of 1, in the labels' shape.
        raw_weights: whether to score the weights themselves, not the average that a run with --ema keeps.
        device, share_devices: as Config has them, but on the processor by default, whatever the run had.
        pipe, comm: stages; the ranks, all of the job's by default.
        model: what the run was trained with, as `train` takes it, or its name, package.module:function.
        loss, metric: by name, as Config has them; by default as the run did.

    Returns `test_loss`, or `validation_loss`, and the metric under its name, as a run logs them, with `step`, `rows`,
    `run` and `data`; only these four for rows without labels.
    Raises RunError as mpiml.train.train does.
    """
    team = Team(MPI.COMM_WORLD if comm is None else comm, Clock())
    asked: dict[str, Any] = {"pipe": pipe, "device": device, "share_devices": share_devices}
    asked |= {"label": label, "token_dtype": token_dtype, "held_out": held_out, "arrays": arrays}
    asked["validation"] = None if validation else 0.0  # None: as in the run
    code = {"data": data, "model": model, "loss": loss, "metric": metric}
    load = functools.partial(stored_model, run, checkpoint, asked, code, raw_weights)
    predicted = Predicted(predictions, probabilities)
    with Guard(team, PROGRAM) as guard:
        one_job.check_size(MPI.COMM_WORLD.size)
        team.check_alike(one_job.software())
        check_sharing(device, share_devices)
        stored = team.on_rank_0(lambda: _stored(load, asked, predicted))
        team.together(lambda: check_ranks(team.size, pipe))
        with Watch(team.comm.Dup(), team.clock, stored.config.stall_timeout, guard.fail), np.errstate(all="ignore"):
            return _evaluate(stored, load, data, asked, model, predicted, team)


def _stored(load: Callable[..., StoredModel], asked: Mapping[str, Any], predicted: Predicted) -> StoredModel:
    """The model of a run or a file; on rank 0. Raises ConfigError for predictions that cannot be written, and for rows
    to validate on that the run has not."""
    check_path(predicted)
    stored = load()
    if predicted.probabilities and not (stored.task.classification or binary(stored.config, False)):
        raise ConfigError("--probabilities: the run is a regression, which has none")
    check_validation(stored.config, asked)
    return stored


def _evaluate(
    stored: StoredModel,
    load: Callable[..., StoredModel],
    data: Any,
    asked: Mapping[str, Any],
    model: Model | None,
    predictions: Predicted,
    team: Team,
) -> dict[str, Any]:
    prepare_process(stored.config.threads)
    others = data is not None and not stored.config.validation
    config, given = reading(stored.config, others, asked), None if isinstance(data, str) else data
    dataset = open_data(config, team, given, stored.task, tests_only=others and asked["held_out"] is None)
    team.together(lambda: check_data(stored, dataset, others))
    dataset = with_zeros(dataset, stored.task)
    team.together(lambda: check_wanted(dataset, predictions.file))
    name = dataset.name if given is not None else config.data
    made = None if isinstance(model, str) else model
    with freed(grids.build(team, config.pipe), team.size) as grid:
        step, scores = _scored(stored, load, dataset, made, predictions, grid)
    return {"run": str(stored.run), "step": step, "data": name} | scores


def _scored(
    stored: StoredModel,
    load: Callable[..., StoredModel],
    data: Dataset,
    model: Model | None,
    predictions: Predicted,
    grid: Grid,
) -> tuple[int, dict[str, Any]]:
    """The step of the checkpoint and the sums over the test rows; collective over the grid. `load`, on rank 0, is
    what is stored by now but for damaged files."""
    config, task, team = stored.config, stored.task, grid.team
    share_cores(grid.node.size * config.threads, grid.cores)
    tests = Evaluation(data.test, config.eval_rows, grid, config.dtype, config.evaluated)
    classes = task.outputs if task.classification else None
    tokens, ignore, gaps = task.vocabulary, task.ignore, config.fill is not None
    hold(data, grid, None, tests.rows())
    seen = look_at(data, grid, None, tests.rows(), classes, tokens=tokens, ignore=ignore, gaps=gaps)
    task = dataclasses.replace(task, bounds=tuple(seen.bounds))
    tests.split = data.test.ignoring(task.ignore)
    tests.split = prepared(tests.split, stored.preparations, config.dtype)
    built, computation = build_stage(config, task, grid, model, data.test.w is not None)
    layouts, metric = built.layouts, built.metric
    check = functools.partial(_checked, built)
    team.on_rank_0(lambda: check(stored))  # before memory that only a forged checkpoint asks for is
    values, problem = place_values(config, grid, layouts[grid.stage], built.device)
    with freed(built.device, 1), freed(values, grid.comm.size), built.device.named_memory("an evaluation"):
        stored = read_model(stored, lambda bad: check(load(damaged=bad)), built.constants, values, layouts, grid)
        for note in [*stored.notes, *data.notes, *seen.notes, *([f"warning: {problem}"] if problem else [])]:
            if grid.comm.rank == 0:
                say(note, sys.stderr)
        if not tests.split.labelled:
            computation.objective = lambda y, *others: ([0.0, 0.0], y)
        kinds = built.scoring.outputs, binary(config, task.classification), predictions.probabilities
        kept = team.together(lambda: Predictions(computation, task, *kinds) if predictions.file else None)
        record = tests.score(Stage(grid.pipe, computation, team.clock), metric, team.clock, stored.step)
        assert record, "nobody asks it to leave off"
        if kept:
            kept.write(Path(predictions.file or ""), tests)
        score = team.on_rank_0(lambda: metric.value(record.metric) if tests.split.labelled else 0.0)
    if not tests.split.labelled:
        return stored.step, {"rows": len(tests.split)}
    scores = {f"{config.evaluated}_loss": record.mean_loss, metric.name: score}
    return stored.step, {"rows": len(tests.split)} | scores


def _checked(built: BuiltModel, stored: StoredModel) -> StoredModel:
    """The stored model. Raises OutputError unless it is of the model that has been built."""
    built.constants.check(stored.header, needed_kinds(built.layouts, (VALUES,)))
    return stored


def text(result: Mapping[str, Any]) -> str:
    """The result as a line."""
    which = next((rows for rows in ("test", "validation") if f"{rows}_loss" in result), None)
    if not which:
        return f"{result['run']}, step {result['step']}: predicted {result['rows']} rows of {result['data']}"
    *_, (metric, score) = result.items()
    return (
        f"{result['run']}, step {result['step']}, {result['rows']} {which} rows of {result['data']}: "
        f"loss {result[f'{which}_loss']:.4f}, {metric} {score:.4f}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    return run_command(PROGRAM, lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> int:
    team = Team(MPI.COMM_WORLD, Clock())
    try:
        with Guard(team, PROGRAM):
            asked = team.on_rank_0(lambda: vars(parse(arguments)))
        as_json = asked.pop("json")
        result = evaluate(**asked)
    except BaseException as error:  # reported already, and in a job of several ranks known to all
        return exit_code(error)
    if team.rank == 0:
        print(documents.to_json(result) if as_json else text(result), flush=True)
    return 0


if __name__ == "__main__":
    start.end(main())
