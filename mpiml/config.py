"""Every setting of a run: one frozen dataclass, filled from a TOML file and from flags, which win."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mpiml
from mpiml import documents, flags
from mpiml.errors import ConfigError, OutputError
from mpiml.flags import FUNCTION, check, convert, flag, setting, text, toml
from mpiml.usercode import is_name

if TYPE_CHECKING:
    from argparse import ArgumentParser

# The groups of the help.
DATA, MODEL, GRID, STEPS, OPTIMIZER, ARITHMETIC, RUN = (
    *("data", "model", "grid and memory", "steps and micro-batches", "optimizer", "arithmetic"),
    "evaluation, run directory and limits",
)
# Settings of one job: the next job of the same run has its own.
OF_THE_JOB = ("out", "resume", "quiet", "time_limit", "trace", "rank_log")
# May change when a run whose learning rate falls continues for more steps.
FALLING = ("lr", "decay_steps", "lr_floor")


@dataclass(frozen=True)
class Config:
    """The settings of a run; each is a flag, with dashes for underscores. None means: chosen when the run starts.

    Attributes:
        given: names of the settings that were asked for, which alone change what a run that is resumed has; unless it
            is given, those that are not at their default. So patience=0 needs given={"resume", "out", "patience"}.

    Raises ConfigError for a value that a setting cannot have.
    """

    data: str = setting(
        "digits",
        DATA,
        "digits (an example), a file or directory, or package.module:function; a resumed run may find it elsewhere",
        on_resume=True,
        metavar="SPEC",
        named=is_name,
    )
    label: str | None = setting(None, DATA, "column of the labels in a CSV or Parquet file")
    drop_columns: tuple[str, ...] = setting((), DATA, "columns of a CSV or Parquet file that are left out")
    fill: str | None = setting(
        None, DATA, "what takes the place of missing inputs: mean (of the training rows) or a number", metavar="mean|X"
    )
    context: int | None = setting(None, DATA, "length of a row of text: bytes, or tokens", low=1)
    arrays: str | None = setting(
        None,
        DATA,
        "names of arrays in a file that has others: x_train=images,y_train=labels,...",
        metavar="NAME=ARRAY,..",
    )
    held_out: float = setting(
        0.1, DATA, "fraction of the training rows to test on if there are no test rows; 0: none", low=0, below=1
    )
    validation: float = setting(
        0.0,
        DATA,
        "fraction of the training rows, chosen by --seed, to evaluate on in place of the test rows, which are left to "
        "mpiml.evaluate",
        low=0,
        below=1,
    )
    token_dtype: str = setting("uint16", DATA, "type of the tokens in .bin files", choices=["uint16", "uint32"])
    normalize: bool = setting(
        False, DATA, "subtract from inputs their mean over the training rows, divide by their standard deviation"
    )
    look: str = setting(
        "once",
        DATA,
        "which jobs of a run read all rows before they train; once: the first; all: each; first: none, but each row is "
        "checked when it is used (see data/README.md)",
        choices=["once", "all", "first"],
        on_resume=True,
    )
    transform: str | None = setting(
        None, DATA, "function (x, y, rng) -> x, y for each micro-batch of training", metavar=FUNCTION, named=is_name
    )
    model: str = setting(
        "mlp",
        MODEL,
        "model to train; your own: a function (shape of an input row, number of outputs) -> list of layers",
        choices=["mlp", "cnn", "resnet", "gpt"],
        named=is_name,
    )
    hidden: tuple[int, ...] = setting((128, 128), MODEL, "widths of mlp's hidden layers", low=1)
    activation: str = setting("relu", MODEL, "function after mlp's hidden layers", choices=["relu", "gelu", "tanh"])
    channels: int = setting(32, MODEL, "channels of the first convolution in cnn and resnet", low=1)
    blocks: int = setting(2, MODEL, "residual blocks in gpt; in resnet, at each of three sizes", low=1, below=10_000)
    norm: str = setting(
        "group", MODEL, "normalisation: of groups in resnet only, of batches in cnn too", choices=["group", "batch"]
    )
    width: int = setting(128, MODEL, "length of the vector that represents a token in gpt", low=1)
    heads: int = setting(4, MODEL, "attention heads of gpt", low=1)
    tie: bool = setting(False, MODEL, "let gpt score tokens by the array of its token embedding: fewer parameters")
    dropout: float = setting(0.0, MODEL, "probability that a hidden value is set to zero in training", low=0, below=1)
    classes: int | None = setting(None, MODEL, "number of classes (default: one more than the highest label)", low=1)
    ignore: int | None = setting(
        None, MODEL, "label that does not count (default: -1 if a row has several labels, as tokens and masks have)"
    )
    loss: str = setting(
        "auto",
        MODEL,
        "auto: cross_entropy for integer labels, mse for others; bce: labels from 0 to 1, one or several a row; your "
        "own: a function like those in mpiml.nn.losses, or of PyTorch",
        choices=["auto", "cross_entropy", "mse", "bce"],
        named=is_name,
    )
    metric: str = setting(
        "auto",
        MODEL,
        "auto: accuracy for integer labels and bce, r2 for others; exact_match: how many rows have all labels right; "
        "your own: a function (number of outputs) -> metric",
        choices=["auto", "accuracy", "r2", "exact_match"],
        named=is_name,
    )
    init: str | None = setting(
        None,
        MODEL,
        "weights to begin with, at step 0: a checkpoint, a safetensors file with PyTorch's names and axes, or the "
        "directory of a run: the best checkpoint that it keeps, else the newest",
        on_resume=True,
        metavar="FILE|DIR",
    )
    init_partial: bool = setting(
        False, MODEL, "take from --init what fits by name and shape, and say what does not", on_resume=True
    )
    init_names: str | None = setting(
        None,
        MODEL,
        "what the model's arrays are called in --init: TOML, one model-name = name-in-the-file a line, * for any text",
        on_resume=True,
        metavar="FILE",
    )

    pipe: int = setting(1, GRID, "pipeline stages; the number of replicas is ranks / stages", low=1, on_resume=True)
    cuts: tuple[int, ...] = setting(
        (), GRID, "layers, from 0, that begin a new stage (default: stages of equal cost)", low=1, on_resume=True
    )
    balance: str = setting(
        "operations",
        GRID,
        "equal cost by operations, which are counted, or by time: that of each layer is measured at the start",
        choices=["operations", "measured"],
        on_resume=True,
    )
    schedule: str = setting(
        "1f1b",
        GRID,
        "order of forward and backward passes in a pipeline; zb-h1 leaves gradients by weights for when a rank is idle",
        choices=["1f1b", "gpipe", "zb-h1"],
        on_resume=True,
    )

    recompute: bool = setting(
        False,
        GRID,
        "keep only the inputs of gpt's or resnet's blocks, and compute their forward passes again for backward passes: "
        "less memory, a third more operations",
        on_resume=True,
    )

    batch: int = setting(128, STEPS, "rows per step, over all ranks", low=1)
    microbatches: int | None = setting(
        None, STEPS, "micro-batches per step, over all ranks (default: replicas, or 2 x stages x replicas)", low=1
    )
    leaf: int = setting(
        1,
        STEPS,
        "micro-batches that are added one after another, a leaf of the tree of the gradient sum; replicas have whole "
        "leaves; large ones need less memory",
        low=1,
    )
    average_every: int = setting(
        0,
        STEPS,
        "steps of a round: workers take them apart, each with its part of the micro-batches, and then average their "
        "models; 0: no workers, gradients are summed at every step",
        low=0,
    )
    workers: int | None = setting(
        None,
        STEPS,
        "copies of the model that learn apart in rounds (default: replicas)",
        low=1,
        on_resume=True,
    )
    average_from: int = setting(
        0, STEPS, "first step that workers take apart; before it, gradients are summed at every step", low=0
    )
    outer_lr: float = setting(
        1.0,
        STEPS,
        "learning rate of the outer step, from the model at the start of a round towards the average; with 1 and no "
        "momentum it ends there",
        low=0,
    )
    outer_momentum: float = setting(
        0.0,
        STEPS,
        "coefficient of the outer step's Nesterov momentum; DiLoCo has 0.9, with --outer-lr 0.7",
        low=0,
        below=1,
    )
    averaged_at: tuple[int, ...] = setting(
        (),
        STEPS,
        "steps with which the run was to end before it was given more; rounds end there too; written by the run itself",
        low=1,
    )
    noise_scale: bool = setting(
        False,
        STEPS,
        "measure, at logged steps, beyond which batch size more rows bring little; needs two or more micro-batches",
        on_resume=True,
    )
    shuffle: str = setting(
        "rows",
        STEPS,
        "shuffle a shard's rows in every epoch, or blocks of consecutive rows, which is faster for large files",
        choices=["none", "rows", "blocks"],
    )
    block_rows: int = setting(256, STEPS, "rows per block for --shuffle blocks", low=1)
    shards: str = setting(
        "contiguous",
        STEPS,
        "rows that micro-batch m of M reads; contiguous: the m-th part of all; strided: every M-th from row m on",
        choices=["contiguous", "strided"],
    )
    prefetch: int | None = setting(
        None, STEPS, "steps whose rows are read ahead (default: 2 if reading is slow, else 0)", low=0, on_resume=True
    )
    epochs: int | None = setting(None, STEPS, "passes over the data (default: 30)", low=1, on_resume=True)
    steps: int | None = setting(None, STEPS, "number of steps, in place of --epochs", low=1, on_resume=True)

    optimizer: str = setting(
        "adamw", OPTIMIZER, "update rule", choices=["sgd", "momentum", "nesterov", "adam", "adamw", "lars", "lamb"]
    )
    lr: float | None = setting(None, OPTIMIZER, "peak learning rate (default: depends on the optimizer)", low=0)
    lr_scaling: str = setting(
        "none",
        OPTIMIZER,
        "multiply the learning rate by batch / base batch (linear), or by the root of that (sqrt)",
        choices=["none", "linear", "sqrt"],
    )
    base_batch: int | None = setting(
        None, OPTIMIZER, "rows of a step for which the learning rate is right before it is scaled", low=1
    )
    momentum: float = setting(0.9, OPTIMIZER, "coefficient of momentum, nesterov and lars", low=0, below=1)
    betas: tuple[float, ...] = setting(
        (0.9, 0.999), OPTIMIZER, "coefficients of the moving averages of adam, adamw and lamb", low=0, below=1
    )
    weight_decay: float | None = setting(
        None, OPTIMIZER, "decay of matrices (default: 0.01 for adamw and lamb, else 0)", low=0
    )
    warmup_steps: int = setting(0, OPTIMIZER, "steps in which the learning rate rises to its peak", low=0)
    decay: str = setting(
        "none",
        OPTIMIZER,
        "how the rate falls after its peak; your own: a function (step, steps) -> factor (see run/GOING_ON.md)",
        choices=["none", "linear", "cosine", "step"],
        named=is_name,
    )
    decay_steps: int | None = setting(None, OPTIMIZER, "step at which the decay ends (default: the last)", low=1)
    lr_floor: float = setting(0.0, OPTIMIZER, "learning rate to which the decay falls", low=0)
    lr_history: tuple[str, ...] = setting(
        (), OPTIMIZER, "what a run that was extended has had before; is written by the run itself", metavar="TEXT,.."
    )
    rates: tuple[str, ...] = setting(
        (),
        OPTIMIZER,
        "factors of the learning rate for parameters by name, * for any text: *=0.1,head.*=1; 0: not trained",
        metavar="PATTERN=X,..",
    )
    ema: float = setting(
        0.0,
        OPTIMIZER,
        "evaluate an exponential moving average of the weights, of which a step keeps this part (0.999, say); 0: the "
        "weights themselves",
        low=0,
        below=1,
    )
    clip: float = setting(0.0, OPTIMIZER, "largest norm of the gradient; 0: no limit", low=0)

    seed: int = setting(0, ARITHMETIC, "seed of first weights, shuffling and dropout", low=0)
    dtype: str = setting("float32", ARITHMETIC, "type of weights and gradients", choices=["float32", "float64"])
    allreduce: str = setting(
        "ordered", ARITHMETIC, "mpi: MPI_Allreduce; bits then depend on the layout", choices=["ordered", "mpi"]
    )
    memory: str = setting(
        "auto",
        GRID,
        "shared: one copy of the model per node; private: one per rank; auto: shared where possible",
        choices=["auto", "shared", "private"],
        on_resume=True,
    )
    bucket: float = setting(
        0.0,
        GRID,
        "send gradients to other nodes, MB by MB, during backward; 0: after",
        low=0,
        on_resume=True,
        metavar="MB",
    )
    threads: int = setting(1, ARITHMETIC, "BLAS threads per rank", low=1)
    device: str = setting(
        "auto",
        ARITHMETIC,
        "what computes a model of PyTorch modules; auto: the processor, as cpu; cuda: the GPU of each rank; fake: a "
        "pretended one, for tests",
        choices=["auto", "cpu", "cuda", "fake"],
        on_resume=True,
    )
    share_devices: bool = setting(
        False, GRID, "let several ranks use one GPU; each keeps a copy of the model there", on_resume=True
    )
    tf32: bool = setting(False, ARITHMETIC, "let products on a GPU round their factors to TF32: faster, less exact")
    autocast: str = setting(
        "none",
        ARITHMETIC,
        "type in which PyTorch computes what is safe in it (torch.autocast); weights and sums keep theirs",
        choices=["none", "bfloat16"],
    )

    eval_every: int = setting(
        100, RUN, "steps between evaluations, also after the last; 0: never", low=0, on_resume=True
    )
    eval_rows: int = setting(256, RUN, "rows per forward pass in an evaluation", low=1)
    out: str | None = setting(
        None, RUN, "run directory (default: a new runs/DATA-MODEL-NNN)", on_resume=True, metavar="DIR"
    )
    resume: bool = setting(False, RUN, "continue the run in --out, on any grid", on_resume=True)
    save_every: int = setting(
        100, RUN, "steps between checkpoints, also after the last; 0: never", low=0, on_resume=True
    )
    save: str = setting(
        "auto",
        RUN,
        "async: training goes on while a checkpoint is written, from a copy; sync: it waits; auto: async where memory "
        "for copies is available",
        choices=["auto", "async", "sync"],
        on_resume=True,
    )
    keep: int = setting(3, RUN, "checkpoints that are kept, the newest", low=1, on_resume=True)
    keep_best: int = setting(
        0, RUN, "checkpoints that are kept besides, of the best evaluations", low=0, on_resume=True
    )
    best: str = setting(
        "loss",
        RUN,
        "what the best evaluations are chosen by: loss, or the metric's name",
        on_resume=True,
        metavar="NAME",
    )
    patience: int = setting(
        0, RUN, "end after so many evaluations in a row without a better one; 0: never", low=0, on_resume=True
    )
    log_every: int = setting(10, RUN, "steps between lines of metrics.jsonl", low=1, on_resume=True)
    log: str = setting(
        "none",
        RUN,
        "what is written of the metrics beside metrics.jsonl; tensorboard: event files, in RUN/tensorboard",
        choices=["none", "tensorboard"],
        on_resume=True,
    )
    stall_timeout: float = setting(
        600.0, RUN, "end the job if a rank makes no progress for X seconds; 0: never", low=0, on_resume=True
    )
    time_limit: str | None = setting(
        None,
        RUN,
        "save and stop within this time: minutes, h:mm:ss or d-hh:mm:ss; SLURM's limit always counts",
        on_resume=True,
        metavar="TIME",
    )
    stop_grace: float = setting(
        60.0,
        RUN,
        "most seconds that workers take to finish their round when the run is asked to stop; if that is not enough, "
        "they stop within it, and each worker's model is saved",
        low=0,
        on_resume=True,
    )
    trace: str | None = setting(
        None, RUN, "timeline file, .json or .json.gz, for ui.perfetto.dev", on_resume=True, metavar="FILE"
    )
    rank_log: bool = setting(
        False,
        RUN,
        "write what each rank prints to a file of its own, RUN/ranks/rank-00000.log and so on: many files",
        on_resume=True,
    )
    quiet: bool = setting(False, RUN, "print errors only", on_resume=True)

    given: frozenset[str] | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for field in settings():
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                value = convert(flags.kinds(Config)[field.name], value, f"{flag(field.name)} {text(value)}")
                object.__setattr__(self, field.name, value)
            check(field, value)
        if self.given is None:
            changed = frozenset(f.name for f in settings() if getattr(self, f.name) != f.default)
            object.__setattr__(self, "given", changed)
        if self.fill not in (None, "mean") and not flags.is_finite(self.fill or ""):
            raise ConfigError(f"--fill {self.fill}: must be mean or a finite number")
        flags.seconds(self.time_limit, "--time-limit")
        # What can only be said of settings that are all decided is checked by `check_together` (training/resolve.py).
        if self.epochs and self.steps and {"epochs", "steps"} <= (self.given or frozenset()):
            raise ConfigError(f"--epochs {self.epochs} --steps {self.steps}: give one of the two")
        if self.shuffle == "blocks" and self.shards == "strided":
            raise ConfigError("--shuffle blocks --shards strided: strided shards have no consecutive rows")
        if self.bucket and self.allreduce == "mpi":
            raise ConfigError(f"--bucket {text(self.bucket)} --allreduce mpi: MPI_Allreduce sums all at once")
        if self.balance == "measured" and self.cuts:
            raise ConfigError(f"--balance measured --cuts {text(self.cuts)}: cuts leave nothing to measure; give one")
        if self.resume and not self.out:
            raise ConfigError("--resume: say which run with --out DIR")
        if self.tie and self.model != "gpt":
            raise ConfigError(
                f"--tie --model {self.model}: is for gpt; layers of your own share a Parameter by themselves"
            )

    @property
    def evaluated(self) -> str:
        """What the rows are called that the run evaluates on: test or validation."""
        return "validation" if self.validation else "test"

    @property
    def outer_step(self) -> tuple[float, float] | None:
        """Learning rate and momentum of the workers' outer step; None if they end at their average."""
        outer = self.outer_lr, self.outer_momentum
        return outer if self.average_every and outer != (1, 0) else None

    def replace(self, **changes: Any) -> Config:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)

    def by_flag(self) -> dict[str, str]:
        """Every setting as text, under its flag."""
        return {flag(field.name): text(getattr(self, field.name)) for field in settings()}

    def to_toml(self) -> str:
        """The settings as TOML, named as the flags; without those that are None or OF_THE_JOB."""
        values = ((f.name, getattr(self, f.name)) for f in settings() if f.name not in OF_THE_JOB)
        lines = [f"{name.replace('_', '-')} = {toml(value)}" for name, value in values if value is not None]
        return "\n".join(lines) + "\n"


def settings() -> list[dataclasses.Field[Any]]:
    """The fields of Config that are settings."""
    return flags.fields(Config)


def parse(arguments: Sequence[str], program: str = "mpiml.train") -> Config:
    """The config that a command line asks for.

    Raises ConfigError for what cannot be understood. `--help` and `--version` print and raise SystemExit.
    """
    given, path = flags.from_arguments(Config, _parser(program), arguments)
    try:
        values = from_toml(Path(path)) if path else {}
    except OutputError as error:
        raise ConfigError(f"--config {error}") from None
    for name, other in (("steps", "epochs"), ("epochs", "steps")):
        if name in given:
            values.pop(other, None)
    values |= given
    return Config(**values, given=frozenset(values))


def from_toml(path: Path) -> dict[str, Any]:
    """The settings that a TOML file gives.

    Raises OutputError for a file that cannot be read, ConfigError for an unknown key or a value of another type.
    """
    try:
        return flags.from_table(Config, documents.from_toml(documents.read(path), str(path)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _parser(program: str) -> ArgumentParser:
    from argparse import SUPPRESS  # only where a command line is parsed: not on every rank

    from mpiml.command import Parser

    parser = Parser(
        prog=f"python -m {program}",
        usage=f"[mpirun -n RANKS] python -m {program} [settings]",
        description="Train a model on the ranks of an MPI job: data-parallel, layer-split (--pipe), or both.",
        epilog=f"[R]: a resumed run may have another value; also of {', '.join(map(flag, FALLING))} if its rate falls "
        "(--decay) and it is to have more steps. Example: mpirun -n 16 python -m mpiml.train --pipe 4",
        argument_default=SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mpiml {mpiml.__version__}")
    flags.add_to(parser, Config)
    return parser
