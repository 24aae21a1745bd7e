"""Every setting of a run: one frozen dataclass, filled from a TOML file and from flags, which win."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mpiml
from mpiml import documents
from mpiml.errors import ConfigError, OutputError
from mpiml.flags import check, convert, flag, guess, metavar, setting, text, toml
from mpiml.run import deadline

if TYPE_CHECKING:
    from argparse import ArgumentParser

GROUPS = ("data and model", "grid", "steps and batches", "optimizer", "arithmetic", "evaluation and output")


# Belong to one job and not to the run that it is part of.
OF_THE_JOB = ("out", "resume", "quiet", "time_limit", "trace")
# May be given anew where a run whose learning rate falls goes on for more steps.
FALLING = ("lr", "decay_steps")


@dataclass(frozen=True)
class Config:
    """The settings of a run; each is a flag, with dashes for underscores. None means: chosen when the run starts.

    Raises ConfigError for a value that cannot be.
    """

    data: str = setting(
        "digits",
        GROUPS[0],
        "digits, a file or directory, or package.module:function; a run that goes on may find the same data elsewhere",
        on_resume=True,
        metavar="SPEC",
        or_named=True,
    )
    label: str | None = setting(None, GROUPS[0], "column of a CSV or Parquet file that holds the labels")
    context: int | None = setting(None, GROUPS[0], "bytes of a text, or tokens, that make a row", low=1)
    held_out: float = setting(0.1, GROUPS[0], "part of a text to test on if it has no test file", low=0, below=1)
    token_dtype: str = setting("uint16", GROUPS[0], "of the tokens in .bin files", choices=["uint16", "uint32"])
    normalize: bool = setting(
        False, GROUPS[0], "inputs minus their mean over the training rows, divided by their standard deviation"
    )
    transform: str | None = setting(
        None,
        GROUPS[0],
        "function (x, y, rng) -> x, y that every micro-batch of training passes",
        metavar="package.module:function",
        or_named=True,
    )
    model: str = setting(
        "mlp",
        GROUPS[0],
        "what to train; a function (shape of an input row, number of outputs) that returns a list of layers",
        choices=["mlp", "cnn", "resnet", "gpt"],
        or_named=True,
    )
    hidden: tuple[int, ...] = setting((128, 128), GROUPS[0], "widths of the mlp's hidden layers", low=1)
    activation: str = setting("relu", GROUPS[0], "after each hidden layer", choices=["relu", "gelu", "tanh"])
    channels: int = setting(32, GROUPS[0], "of cnn's and resnet's first convolution; later ones have more", low=1)
    blocks: int = setting(
        2, GROUPS[0], "residual blocks of resnet, at each of three sizes, or of gpt", low=1, below=10_000
    )
    norm: str = setting(
        "group",
        GROUPS[0],
        "batch: of each channel over a micro-batch, whose size then matters; group: of groups of channels of a row, in "
        "resnet alone",
        choices=["group", "batch"],
    )
    width: int = setting(128, GROUPS[0], "of the vector that stands for a token in gpt", low=1)
    heads: int = setting(4, GROUPS[0], "of gpt's attention", low=1)
    dropout: float = setting(0.0, GROUPS[0], "probability of zeroing a hidden value", low=0, below=1)
    classes: int | None = setting(None, GROUPS[0], "how many (default: one more than the highest label)", low=1)
    ignore: int | None = setting(
        None, GROUPS[0], "label that means no label (default: -1 where a row has several, as in tokens and masks)"
    )
    loss: str = setting(
        "auto",
        GROUPS[0],
        "auto is cross_entropy for integer labels and mse for others; a function as in mpiml.nn.losses",
        choices=["auto", "cross_entropy", "mse"],
        or_named=True,
    )
    metric: str = setting(
        "auto",
        GROUPS[0],
        "auto is accuracy for integer labels and r2 for others; a function (number of outputs) that returns one",
        choices=["auto", "accuracy", "r2"],
        or_named=True,
    )
    init: str | None = setting(
        None, GROUPS[0], "begin with the weights of this checkpoint, at step 0", on_resume=True, metavar="FILE"
    )

    pipe: int = setting(1, GROUPS[1], "pipeline stages; ranks / stages replicas", low=1, on_resume=True)
    cuts: tuple[int, ...] = setting(
        (), GROUPS[1], "layers at which a stage begins (default: balanced by operations)", low=1, on_resume=True
    )
    schedule: str = setting("1f1b", GROUPS[1], "pipeline schedule", choices=["1f1b", "gpipe"], on_resume=True)

    batch: int = setting(128, GROUPS[2], "rows of a step, over all ranks", low=1)
    microbatches: int | None = setting(
        None, GROUPS[2], "parts of a step, over all ranks (default: replicas, or 2 x stages x replicas)", low=1
    )
    shuffle: str = setting(
        "rows",
        GROUPS[2],
        "of every epoch, within a shard: rows; blocks of consecutive rows, which big files give faster; none",
        choices=["none", "rows", "blocks"],
    )
    block_rows: int = setting(256, GROUPS[2], "rows of a block for --shuffle blocks", low=1)
    shards: str = setting(
        "contiguous",
        GROUPS[2],
        "of M micro-batches, the m-th reads the m-th part of all rows, or (strided) every M-th row from row m on",
        choices=["contiguous", "strided"],
    )
    prefetch: int | None = setting(
        None,
        GROUPS[2],
        "steps whose rows are read ahead (default: 2 if reading takes long, else 0)",
        low=0,
        on_resume=True,
    )
    epochs: int | None = setting(None, GROUPS[2], "passes over the data (default: 30)", low=1, on_resume=True)
    steps: int | None = setting(None, GROUPS[2], "steps, instead of epochs", low=1, on_resume=True)

    optimizer: str = setting(
        "adamw", GROUPS[3], "update rule", choices=["sgd", "momentum", "nesterov", "adam", "adamw"]
    )
    lr: float | None = setting(None, GROUPS[3], "peak learning rate (default: the optimizer's)", low=0)
    momentum: float = setting(0.9, GROUPS[3], "of momentum and nesterov", low=0, below=1)
    weight_decay: float | None = setting(None, GROUPS[3], "on matrices (default: 0.01 for adamw, else 0)", low=0)
    warmup_steps: int = setting(0, GROUPS[3], "steps in which the learning rate rises to its peak", low=0)
    decay: str = setting("none", GROUPS[3], "how the learning rate falls", choices=["none", "cosine", "step"])
    decay_steps: int | None = setting(None, GROUPS[3], "step at which it has fallen (default: the last)", low=1)
    clip: float = setting(0.0, GROUPS[3], "largest norm of the gradient; 0: any", low=0)

    seed: int = setting(0, GROUPS[4], "of first values, order and dropout", low=0)
    dtype: str = setting("float32", GROUPS[4], "of all numbers", choices=["float32", "float64"])
    allreduce: str = setting(
        "ordered",
        GROUPS[4],
        "ordered: the same bits on every layout; mpi: MPI_Allreduce in the library's order",
        choices=["ordered", "mpi"],
    )
    memory: str = setting(
        "auto",
        GROUPS[1],
        "shared: the ranks of a node hold one copy of the model; private: each its own; auto: shared if it can be",
        choices=["auto", "shared", "private"],
        on_resume=True,
    )
    bucket: float = setting(
        0.0,
        GROUPS[1],
        "megabytes of gradients that go to other nodes while backward still runs: 4, say, on a slow network; 0: off",
        low=0,
        on_resume=True,
        metavar="MB",
    )
    threads: int = setting(1, GROUPS[4], "BLAS threads of a rank", low=1)

    eval_every: int = setting(
        100, GROUPS[5], "steps between evaluations; 0: never, else also at the end", low=0, on_resume=True
    )
    eval_rows: int = setting(256, GROUPS[5], "rows of an evaluation that pass at once", low=1)
    out: str | None = setting(None, GROUPS[5], "run directory (default: runs/NAME-NNN)", on_resume=True, metavar="DIR")
    resume: bool = setting(False, GROUPS[5], "go on with the run in --out, on any grid", on_resume=True)
    save_every: int = setting(
        100, GROUPS[5], "steps between checkpoints; 0: never, else also at the end", low=0, on_resume=True
    )
    keep: int = setting(3, GROUPS[5], "checkpoints to keep", low=1, on_resume=True)
    log_every: int = setting(10, GROUPS[5], "steps between lines of metrics.jsonl", low=1, on_resume=True)
    stall_timeout: float = setting(
        600.0, GROUPS[5], "seconds without progress of a rank that end the job; 0: off", low=0, on_resume=True
    )
    time_limit: str | None = setting(
        None,
        GROUPS[5],
        "save and stop before this is over: minutes, h:mm:ss or d-hh:mm:ss, as for SLURM, whose own limit counts too",
        on_resume=True,
        metavar="TIME",
    )
    trace: str | None = setting(
        None,
        GROUPS[5],
        "write what every rank does when to this file (.json or .json.gz), for ui.perfetto.dev",
        on_resume=True,
        metavar="FILE",
    )
    quiet: bool = setting(False, GROUPS[5], "print nothing but errors", on_resume=True)

    given: frozenset[str] | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        types_of = _types()
        for field in settings():
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                value = convert(types_of[field.name], value, f"{flag(field.name)} {text(value)}")
                object.__setattr__(self, field.name, value)
            check(field, value)
        if self.given is None:
            changed = frozenset(f.name for f in settings() if getattr(self, f.name) != f.default)
            object.__setattr__(self, "given", changed)
        if self.time_limit:
            try:
                deadline.seconds(self.time_limit)
            except ValueError as error:
                raise ConfigError(f"--time-limit {self.time_limit}: {error}") from None
        if self.epochs and self.steps and {"epochs", "steps"} <= (self.given or frozenset()):
            raise ConfigError(f"--epochs {self.epochs} --steps {self.steps}: give one of the two")
        if self.shuffle == "blocks" and self.shards == "strided":
            raise ConfigError("--shuffle blocks --shards strided: strided shards have no consecutive rows")
        if self.bucket and self.allreduce == "mpi":
            raise ConfigError(f"--bucket {text(self.bucket)} --allreduce mpi: MPI_Allreduce sums all at once")
        if self.resume and not self.out:
            raise ConfigError("--resume: say which run with --out DIR")

    def replace(self, **changes: Any) -> Config:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)

    def resumed(self, stored: Config) -> Config:
        """The settings of a stored run, changed as this config asks.

        Raises ConfigError for a change that would alter the run's arithmetic.
        """
        given = self.given or frozenset()
        changes: dict[str, Any] = {name: getattr(self, name) for name in OF_THE_JOB} | {"given": given}
        for field in settings():
            value, was = getattr(self, field.name), getattr(stored, field.name)
            if field.name not in given or value == was or (value == "auto" and field.name != "memory"):
                continue
            if not stored.may_become(field, value):
                raise self.refusal(field.name, was)
            changes[field.name] = value
        if "epochs" in given:
            changes["steps"] = None
        if "pipe" in changes and "cuts" not in given:
            changes["cuts"] = ()
        return stored.replace(**changes)

    def may_become(self, field: dataclasses.Field[Any], value: Any) -> bool:
        """Whether this run may go on with another value of a setting."""
        if field.name == "ignore":  # a run that says nothing either has no label of -1, or has always ignored it
            return self.ignore is None and value == -1
        if field.name in FALLING:  # if it goes on for more steps, which is looked at when these are known
            return self.decay != "none"
        return bool(field.metadata["on_resume"])

    def refusal(self, name: str, was: Any) -> ConfigError:
        """The error for a value of a setting that a run which has another one cannot go on with."""
        return ConfigError(
            f"{flag(name)} {text(getattr(self, name))}: the run in {self.out} has {text(was)}, and another value would "
            "change its results; leave the flag out, or start a new run with --init"
        )

    def by_flag(self) -> dict[str, str]:
        """Every setting as text, under its flag."""
        return {flag(field.name): text(getattr(self, field.name)) for field in settings()}

    def to_toml(self) -> str:
        """The settings as TOML, with the flags' names; those that are None, or of one job alone, are left out."""
        values = ((f.name, getattr(self, f.name)) for f in settings() if f.name not in OF_THE_JOB)
        lines = [f"{name.replace('_', '-')} = {toml(value)}" for name, value in values if value is not None]
        return "\n".join(lines) + "\n"


def settings() -> list[dataclasses.Field[Any]]:
    """The fields of Config that are settings."""
    return [field for field in dataclasses.fields(Config) if field.metadata]


def parse(arguments: Sequence[str], program: str = "mpiml.train") -> Config:
    """The config that a command line asks for.

    Raises ConfigError for what cannot be understood. `--help` and `--version` print and raise SystemExit.
    """
    found, unknown = _parser(program).parse_known_args(arguments)
    if unknown:
        names = [flag(field.name) for field in settings()] + ["--config"]
        raise ConfigError(f"{unknown[0]} is not a setting{guess(unknown[0].split('=')[0], names)}; --help lists all")
    raw = vars(found)
    path = raw.pop("config", None)
    try:
        values = from_toml(Path(path)) if path else {}
    except OutputError as error:
        raise ConfigError(f"--config {error}") from None
    types_of = _types()
    for name, other in (("steps", "epochs"), ("epochs", "steps")):
        if name in raw:
            values.pop(other, None)
    for name, given in raw.items():
        values[name] = convert(types_of[name], given, f"{flag(name)} {given}")
    return Config(**values, given=frozenset(values))


def from_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, by name.

    Raises OutputError for a file that cannot be read, ConfigError for an unknown key or a value of another kind.
    """
    table = documents.from_toml(documents.read(path), str(path))
    try:
        return typed(table)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def typed(table: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under their flags' names as values of the right types. Raises ConfigError as `from_toml`."""
    values, types_of = {}, _types()
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in types_of:
            known = [known.replace("_", "-") for known in types_of]
            shown = key if key.isprintable() else ascii(key)
            raise ConfigError(f"{shown} is not a setting{guess(key, known)}; --help lists all")
        values[name] = convert(types_of[name], value, f"{key} = {documents.shown(value)}")
    return values


def _parser(program: str) -> ArgumentParser:
    from argparse import SUPPRESS  # only where a command line is parsed: not on every rank

    from mpiml.command import Parser

    parser = Parser(
        prog=f"python -m {program}",
        usage=f"[mpirun -n RANKS] python -m {program} [settings]",
        description="Train a model on the ranks of an MPI job: data-parallel, layer-split (--pipe), or both.",
        epilog="Example: mpirun -n 16 python -m mpiml.train --pipe 4",
        argument_default=SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mpiml {mpiml.__version__}")
    parser.add_argument("--config", metavar="FILE", help="settings from a TOML file, under the same names; flags win")
    types_of = _types()
    groups = {group: parser.add_argument_group(group) for group in GROUPS}
    for field in settings():
        about, group = field.metadata, groups[field.metadata["group"]]
        if field.default is False:
            group.add_argument(flag(field.name), action="store_const", const="true", help=about["help"])
            continue
        shown = f" (default: {text(field.default)})" if field.default not in (None, ()) else ""
        choices = "|".join([*about["choices"], *(["MODULE:FUNCTION"] if about["or_named"] else [])])
        value = about["metavar"] or choices or metavar(types_of[field.name])
        group.add_argument(flag(field.name), metavar=value, help=about["help"] + shown)
    return parser


@functools.cache
def _types() -> dict[str, Any]:
    hints = typing.get_type_hints(Config)
    return {field.name: hints[field.name] for field in settings()}
