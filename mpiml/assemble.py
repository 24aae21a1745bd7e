"""From settings to the parts of a run: data, model, stages, gradient sum, update, each in its place on the grid."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiml import waiting
from mpiml.clock import Clock
from mpiml.config import Config
from mpiml.data.dataset import Batch, Dataset, Findings, inspect
from mpiml.data.shards import Shards, chunks
from mpiml.data.sources import Source
from mpiml.errors import ConfigError, DataError
from mpiml.nn import layers as nn
from mpiml.nn import optimizers
from mpiml.nn.losses import R2, Accuracy, Loss, Metric, mean_squared_error, softmax_cross_entropy
from mpiml.nn.models import mlp
from mpiml.nn.parameters import Gradients, Layout, Shape
from mpiml.nn.rates import learning_rate
from mpiml.parallel import split
from mpiml.parallel.allreduce import GradientSum, LibrarySum, OrderedSum
from mpiml.parallel.grid import Grid
from mpiml.parallel.memory import PrivateMemory, SharedMemory, bytes_of, share
from mpiml.parallel.record import Agreement, Record, agree
from mpiml.parallel.schedules import SCHEDULES
from mpiml.parallel.stage import Part, Stage
from mpiml.parallel.state import State
from mpiml.parallel.tree import aligned, depth
from mpiml.parallel.update import Update
from mpiml.partition import part
from mpiml.run.verdict import together

DEFAULT_EPOCHS = 30
Agree = Callable[[NDArray[np.float64], bool, bool], Record]
Model = Sequence[nn.Layer] | Callable[[Shape, int], Sequence[nn.Layer]]


@dataclass
class Run:
    """The parts of a run on this rank."""

    config: Config
    grid: Grid
    clock: Clock
    shards: Shards
    tests: list[Batch]
    test_chunks: int
    metric: Metric
    layouts: list[Layout]
    stage: Stage
    update: Update
    state: State
    agree: Agree
    notes: list[str]
    learning_rate: Callable[[int], float]

    @property
    def steps(self) -> int:
        """The number of the last step."""
        assert self.config.steps, "settings are resolved before a run is assembled"
        return self.config.steps

    def free(self) -> None:
        """Give back what the MPI library holds for the run; collective."""
        self.stage.sum.free()
        self.grid.free()

    def record(self, entries: int) -> NDArray[np.float64]:
        """An empty table for that many micro-batches or chunks."""
        return np.zeros((entries, 2 + self.metric.columns))


def resolve(config: Config, rows: int, classification: bool, replicas: int) -> Config:
    """The config with all that was left open decided, so that its text repeats the run on any grid.

    Raises ConfigError for micro-batches that the replicas or the rows cannot share.
    """
    default = replicas if config.pipe == 1 else min(2 * config.pipe * replicas, rows)
    microbatches = config.microbatches or default
    if microbatches < replicas:
        ranks = replicas * config.pipe
        fits = next(s for s in range(config.pipe, ranks + 1) if ranks % s == 0 and ranks // s <= microbatches)
        raise ConfigError(
            f"--microbatches {microbatches}: {replicas} replicas need at least one each; "
            f"at least {replicas}, or fewer replicas (--pipe {fits}, say)"
        )
    if microbatches > rows:
        raise ConfigError(f"--microbatches {microbatches}: the data set has only {rows} rows to share out")
    steps = config.steps or (config.epochs or DEFAULT_EPOCHS) * -(-rows // config.batch)
    loss = ("cross_entropy" if classification else "mse") if config.loss == "auto" else config.loss
    if (loss == "cross_entropy") != classification:
        kind = "integers" if classification else "not integers"
        raise ConfigError(f"--loss {loss}: the data set's labels are {kind}; leave it at auto")
    decay = config.weight_decay
    return config.replace(
        microbatches=microbatches,
        steps=steps,
        epochs=None,
        loss=loss,
        lr=optimizers.default_rate(config.optimizer) if config.lr is None else config.lr,
        weight_decay=(0.01 if config.optimizer == "adamw" else 0.0) if decay is None else decay,
        decay_steps=config.decay_steps or steps,
    )


def assemble(config: Config, data: Dataset, grid: Grid, clock: Clock, model: Model | None) -> Run:
    """Build everything; collective over the grid. `config` is resolved.

    Raises, on all ranks alike, DataError or ConfigError for data or a model that do not fit.
    """
    assert config.microbatches, "settings are resolved before a run is assembled"
    clock("joining")
    waiting.share_cores(grid.node.size * config.threads, grid.cores)
    block = part(grid.replica, grid.replicas, config.microbatches)
    shards = Shards(data.train, config.microbatches, config.batch, config.seed, *block, config.dtype)
    test_chunks = -(-len(data.test) // config.eval_rows)
    test_block = part(grid.replica, grid.replicas, test_chunks)
    outputs = look_at(data, grid, clock, shards.hold(), tuple(c * config.eval_rows for c in test_block))

    layers = together(grid.comm, clock, functools.partial(build_model, config, data.train.x.shape, outputs, model))
    shapes = nn.stack_shapes(layers, data.train.x.shape)
    cuts = together(grid.comm, clock, functools.partial(find_cuts, config, layers, data.train.x.shape))
    bounds = [0, *cuts, len(layers)]
    stages = [layers[a:b] for a, b in itertools.pairwise(bounds)]
    layouts = [Layout(nn.parameters(stage), config.dtype) for stage in stages]
    layout = layouts[grid.stage]

    loss: Loss = softmax_cross_entropy if config.loss == "cross_entropy" else mean_squared_error
    metric: Metric = Accuracy() if config.loss == "cross_entropy" else R2(outputs)
    sum_, agreement, notes = place(config, grid, layout, 2 + metric.columns, clock)
    layout.bind(sum_.values)
    layout.initialise(sum_.values, config.seed, *sum_.worker)
    here = Part(
        forward=functools.partial(nn.forward, stages[grid.stage]),
        at=lambda training, step, m: nn.At(training, config.seed, step, m),
        objective=objective(loss, metric),
        x_shape=shapes[bounds[grid.stage]],
        y_shape=shapes[bounds[grid.stage + 1]],
        dtype=config.dtype,
        learns=any(layout.size for layout in layouts[: grid.stage + 1]),
        learned=any(layout.size for layout in layouts[: grid.stage]),
        gradients=gradients(layout, sum_),
    )
    optimizer = optimizers.build(config.optimizer, config.momentum, config.weight_decay or 0.0)
    update = Update(grid.comm, grid.replica, sum_, optimizer, config.clip, clock)
    return Run(
        config=config,
        grid=grid,
        clock=clock,
        shards=shards,
        tests=chunks(data.test, config.eval_rows, *test_block, config.dtype),
        test_chunks=test_chunks,
        metric=metric,
        layouts=layouts,
        agree=agreement,
        notes=notes,
        stage=Stage(grid.pipe, here, sum_, SCHEDULES[config.schedule], clock),
        update=update,
        state=State(grid, sum_, update.states),
        learning_rate=learning_rate(config.lr or 0.0, config.warmup_steps, config.decay, config.decay_steps or 1),
    )


def gradients(layout: Layout, sum_: GradientSum) -> list[Gradients]:
    """For each of this replica's micro-batches what its backward pass writes into; the sum watches the last."""
    of_slot = [Gradients(layout, slot) for slot in sum_.slots]
    *slots, last = sum_.plan.slots
    return [*(of_slot[slot] for slot in slots), Gradients(layout, sum_.slots[last], sum_.complete)]


def place(
    config: Config, grid: Grid, layout: Layout, columns: int, clock: Clock
) -> tuple[GradientSum, Agree, list[str]]:
    """The stage's gradient sum and the agreement on the step record, in the memory that `config` asks for.

    Collective. `columns` are those of the record's table. Also returns what there is to say.
    """
    microbatches = config.microbatches or 1
    sum_arguments = (microbatches, layout.size, layout.blocks(), layout.dtype)
    private = functools.partial(agree, grid.comm)
    if config.allreduce == "mpi":
        return LibrarySum(grid.data, PrivateMemory(), [1] * grid.replicas, *sum_arguments), private, []
    slots = depth(grid.replica, grid.replicas, microbatches)
    vector_bytes = bytes_of(layout.size, layout.dtype)
    memory, problem = share(grid.comm, grid.local, slots * vector_bytes, vector_bytes, config.memory)
    board_bytes = Agreement.bytes_needed(grid.node.size, microbatches, columns)
    board, also = share(grid.comm, grid.node, 0, board_bytes, "private" if problem else config.memory)
    notes = [f"warning: {text}" for text in (problem, also) if text]
    nodes = [1] * grid.replicas if isinstance(memory, PrivateMemory) else grid.nodes
    bucket = math.ceil(config.bucket * 2**20 / layout.dtype.itemsize)
    sum_ = OrderedSum(grid.data, memory, nodes, *sum_arguments, bucket, clock)
    if isinstance(board, SharedMemory):
        return sum_, Agreement(grid, board, microbatches, columns), notes
    return sum_, private, notes


def objective(loss: Loss, metric: Metric) -> Callable[[Any, Any, bool], tuple[list[float], Any]]:
    """Score a micro-batch: its row of the step record, and the gradient by the model's output."""

    def score(y: Any, labels: Any, measured: bool) -> tuple[list[float], Any]:
        total, weight, dy = loss(y, labels)
        return [total, weight, *(metric.sums(y, labels) if measured else ())], dy

    return score


def build_model(config: Config, shape: Shape, outputs: int, model: Model | None) -> list[nn.Layer]:
    """The layers, named. `model` is a list of layers, or builds one from the shape of a row and the outputs."""
    if model is None:
        layers = mlp(shape, outputs, config.hidden, config.activation, config.dropout)
    else:
        layers = list(model(shape, outputs) if callable(model) else model)
    try:
        nn.name(layers)
        final = nn.stack_shapes(layers, shape)[-1]
    except ValueError as error:
        raise ConfigError(f"the model does not fit the data: {error}") from None
    if final != (outputs,):
        raise ConfigError(f"the model gives rows of shape {final}, but the labels need ({outputs},)")
    nn.skip_first_dx(layers)
    return layers


def find_cuts(config: Config, layers: Sequence[nn.Layer], shape: Shape) -> Sequence[int]:
    """Where stages begin: as --cuts says, or so that the slowest stage is as fast as it can be."""
    if config.cuts:
        split.check_cuts(config.cuts, len(layers), config.pipe)
        return config.cuts
    return split.balanced(nn.stack_flops(layers, shape), config.pipe)


def look_at(data: Dataset, grid: Grid, clock: Clock, train: tuple[int, int], test: tuple[int, ...]) -> int:
    """Read the rows that this rank will use, and check all values of the data set; collective.

    Inputs are read by the first stage, labels by the last, each row of the training set by one replica.

    Args:
        train, test: the (start, stop) of this replica's rows.

    Returns:
        How many outputs a model needs: the number of classes, or of values per label.
    """
    ends = {"x": grid.stage == 0, "y": grid.stage == grid.stages - 1}
    test_rows = (test[0], min(test[1], len(data.test)))
    classes = 0
    for which, split_, rows in (("train", data.train, train), ("test", data.test, test_rows)):
        for column, mine in ends.items():
            source: Source = getattr(split_, column)
            read = functools.partial(_read, clock, source, *rows) if mine else Findings
            found = functools.reduce(operator.or_, grid.comm.allgather(together(grid.comm, clock, read)))
            name = f"{data.name}: {column}_{which}"
            problem = None
            if found.first_bad is not None:
                problem = f"{found.bad_rows} rows hold values that are not finite, the first is row {found.first_bad}"
            elif column == "y" and data.classification:
                classes = max(classes, int(found.highest) + 1)
                if found.lowest < 0:
                    problem = f"a label is {found.lowest:g}; classes are counted from 0"
                elif found.highest >= len(data.train):
                    problem = (
                        f"a label is {found.highest:.0f}, which makes more classes than the {len(data.train)} rows"
                    )
                    problem += " of x_train; for a regression, save the labels as floating-point numbers"
            if problem:
                raise _alike(DataError(f"{name}: {problem}"))
    return classes if data.classification else int(np.prod(data.train.y.shape))


def _read(clock: Clock, source: Source, start: int, stop: int) -> Findings:
    clock("data")
    source.hold(start, stop)
    return inspect(source, start, stop)


def _alike(error: DataError) -> DataError:
    """An error that every rank comes to by itself from what all know."""
    error.everywhere = True
    return error


def grid_text(run: Run) -> str:
    """One line on the grid, with the flag that repeats the run's arithmetic on another."""
    grid, config = run.grid, run.config
    stages = f"{grid.stages} stage{'s' if grid.stages > 1 else ''}"
    replicas = f"{grid.replicas} replica{'s' if grid.replicas > 1 else ''}"
    ranks = f"{grid.comm.size} rank{'s' if grid.comm.size > 1 else ''}"
    text = f"{ranks} = {stages} x {replicas}; --microbatches {config.microbatches} repeats these bits on any grid"
    if not aligned(grid.replicas, config.microbatches or 1):
        power = 1 << ((config.microbatches or 1) // grid.replicas).bit_length() - 1
        text += f" (--microbatches {power * grid.replicas} would need the fewest messages on this one)"
    return text
