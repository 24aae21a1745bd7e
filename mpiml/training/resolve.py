"""What the settings leave open, decided before a run begins: steps, micro-batches, rates; no MPI."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from typing import Any

from mpiml.config import FALLING, Config
from mpiml.data import names
from mpiml.data.dataset import Dataset, open_dataset
from mpiml.data.formats import Options
from mpiml.data.objects import dataset_of
from mpiml.devices import choice
from mpiml.errors import ConfigError
from mpiml.flags import flag, text
from mpiml.nn import optimizers
from mpiml.nn.rates import DECAYS, Phase, batch_factor, history
from mpiml.training import factors
from mpiml.training.saved import refusal
from mpiml.training.sharing import shared_out
from mpiml.training.task import Task
from mpiml.usercode import is_name

DEFAULT_EPOCHS = 30


class Resolved(Config):
    """Settings of which none is left open, so that their text repeats the run on any grid, from anywhere."""

    microbatches: int
    workers: int | None  # None if gradients are summed at every step
    steps: int
    lr: float
    weight_decay: float
    decay_steps: int


def open_data(config: Config, given: Any = None, task: Task | None = None, tests_only: bool = False) -> Dataset:
    """The data set that the settings name, or `given`, a Dataset or what one can be made of, with rows to test on if
    the settings want any, or with rows to validate on in their place. Raises DataError or ConfigError if there is none.

    `task` is what a trained model takes, which tells the columns of a table and the classes of its words. With
    `tests_only`, only rows to test on are wanted, and they may be without labels.
    """
    options = Options(
        label=config.label,
        context=config.context,
        held_out=config.held_out,
        tokens=config.token_dtype,
        drop_columns=config.drop_columns,
        gaps=config.fill is not None,
        columns=task.columns if task else (),
        words=task.words if task else (),
        arrays=names.parsed(config.arrays),
        tests_only=tests_only,
        seed=config.seed,
        values=of_values(config),
    )
    dataset = open_dataset(config.data, options) if given is None else dataset_of(given, "data: must be", options)
    if task is None and given is None and config.drop_columns and not dataset.names:
        raise ConfigError(f"--drop-columns: {config.data} is not a table; leave it out")
    if dataset.words and of_values(config):
        flag = f"--loss {config.loss}" if config.loss in ("mse", "bce") else f"--metric {config.metric}"
        raise ConfigError(f"{flag}: labels are words ({words_text(dataset.words)}), not numbers; leave it at auto")
    if dataset.words and config.classes not in (None, len(dataset.words)):
        raise ConfigError(f"--classes {config.classes}: labels are {len(dataset.words)} words; leave it out")
    said = "held_out" in (config.given or ())
    evaluated = task is None and config.eval_every > 0 and not config.validation
    whole = dataset.with_tests(config.held_out, config.seed, said, evaluated)
    return with_labels(whole, config, task).with_validation(config.validation, config.seed)


def words_text(words: Sequence[str]) -> str:
    """Words and the classes that they stand for: all, or the first few and the last."""
    texts = [f"{word} = {number}" for number, word in enumerate(words)]
    return ", ".join(texts if len(texts) <= 10 else [*texts[:9], "...", texts[-1]])


def with_labels(data: Dataset, config: Config, task: Task | None = None) -> Dataset:
    """A data set with labels as loss and metric want them, and as a trained model's `task`: integers, or values."""
    if binary(config, data.classification and not of_values(config)):
        return data.with_probabilities()
    return data.with_values() if of_values(config) or (task and not task.classification) else data


def of_values(config: Config) -> bool:
    """Whether loss or metric take labels for values, integers too."""
    auto = config.loss == "auto" or is_name(config.loss)
    return config.loss in ("mse", "bce") or (auto and config.metric in ("r2", "exact_match"))


def binary(config: Config, classification: bool) -> bool:
    """Whether loss or metric take labels for 0 or 1, each by itself."""
    own = is_name(config.loss) and config.metric == "accuracy"
    return not classification and (config.loss == "bce" or config.metric == "exact_match" or own)


def absolute(spec: str) -> str:
    """A data set's path, or pattern of paths, made absolute; "digits" and package.module:function stay as they are."""
    if spec == "digits" or is_name(spec) or os.path.isabs(spec):
        return spec
    here = os.getcwd()
    pattern = glob.has_magic(spec) and not os.path.exists(spec)
    return os.path.join(glob.escape(here) if pattern else here, spec)


def resolve(config: Config, rows: int, classification: bool, replicas: int, before: Config | None = None) -> Resolved:
    """Decide what the settings leave open; `before` are those of the run that this one goes on with, if there is one.

    Raises ConfigError for micro-batches that the replicas or the rows cannot share, for settings that do not fit the
    labels, and for a run that would go on with a learning rate that has fallen already.
    """
    microbatches, workers = shared_out(config, rows, replicas, before is not None)
    if before:
        config = rounds_kept(extended(config, before, rows), before, rows)
    elif config.classes is not None and (not classification or of_values(config)):
        raise ConfigError(f"--classes {config.classes}: the labels are values, not classes; leave it out")
    decay = config.weight_decay
    decided = scored(config, classification).replace(
        data=absolute(config.data),
        init=config.init and os.path.join(os.getcwd(), config.init),
        init_names=config.init_names and os.path.join(os.getcwd(), config.init_names),
        microbatches=microbatches,
        workers=workers or config.workers,
        epochs=None,
        weight_decay=optimizers.default_decay(config.optimizer) if decay is None else decay,
        **last_and_rate(config, rows),
    )
    resolved = Resolved(**vars(decided))
    check_together(resolved)
    return resolved


def last_and_rate(config: Config, rows: int) -> dict[str, Any]:
    """The settings that say how long a run is, and how its learning rate falls, decided."""
    steps = config.steps or (config.epochs or DEFAULT_EPOCHS) * -(-rows // config.batch)
    lr = optimizers.default_rate(config.optimizer) if config.lr is None else config.lr
    return {"steps": steps, "lr": lr, "decay_steps": config.decay_steps or steps}


def phases_of(config: Resolved) -> list[Phase]:
    """How the learning rate of a run falls: before it was extended, each time, and now; with --lr-scaling."""
    factor = batch_factor(config.lr_scaling, config.batch, config.base_batch)
    return [p._replace(lr=p.lr * factor, lr_floor=p.lr_floor * factor) for p in _asked_phases(config)]


def _asked_phases(config: Resolved) -> list[Phase]:
    """The same for the base batch, as the settings say it."""
    now = Phase(config.steps, config.lr, config.lr_floor, config.decay_steps)
    return [*history(config.lr_history), now]


def check_together(config: Resolved) -> None:
    """Raise ConfigError for settings that do not go together, and for text in them that cannot be read."""
    factors.parsed(config.rates)
    if not config.init and (config.init_partial or config.init_names):
        name = "init_partial" if config.init_partial else "init_names"
        raise ConfigError(f"{flag(name)}: is of --init, which says whose weights; give that too")
    for name in ("workers", "average_from", "outer_lr", "outer_momentum", "averaged_at"):
        if not config.average_every and getattr(config, name) not in (None, getattr(Config, name)):
            given = text(getattr(config, name))
            raise ConfigError(f"{flag(name)} {given}: is of workers, of which there are none; give --average-every too")
    if config.average_every and config.noise_scale:
        raise ConfigError(
            f"--noise-scale --average-every {config.average_every}: is measured where gradients are summed at every "
            "step; give one of the two"
        )
    if config.tf32 and choice.is_host(config.device):
        raise ConfigError(f"--tf32 --device {config.device}: is of GPUs; give --device cuda, or leave --tf32 out")
    choice.check_sharing(config.device, config.share_devices)
    if config.recompute and config.model not in ("gpt", "resnet"):
        own = "; put mpiml.api.Recompute(...) around those of your own" if is_name(config.model) else ""
        raise ConfigError(f"--recompute --model {config.model}: gpt and resnet have blocks; leave it out{own}")
    for name in ("keep_best", "patience"):
        if (value := getattr(config, name)) and not config.eval_every:
            raise ConfigError(
                f"{flag(name)} {value} --eval-every 0: there are no evaluations; "
                f"give {flag(name)} 0, or --eval-every the steps between them"
            )
    if config.noise_scale and config.microbatches < 2:
        raise ConfigError(
            f"--noise-scale --microbatches {config.microbatches}: it is measured by how the gradients of micro-batches "
            "differ; give at least 2, or leave --noise-scale out"
        )
    if len(config.betas) != 2:
        raise ConfigError(f"--betas {text(config.betas)}: must be two numbers, as 0.9,0.999")
    if config.betas != Config.betas and config.optimizer not in ("adam", "adamw", "lamb"):
        others = "adam, adamw and lamb have"
        raise ConfigError(f"--betas {text(config.betas)}: --optimizer {config.optimizer} has none; {others}")
    if config.decay == "none" and (config.lr_floor or config.lr_history):
        name, value = ("lr-floor", config.lr_floor) if config.lr_floor else ("lr-history", text(config.lr_history))
        raise ConfigError(f"--{name} {value}: with --decay none the learning rate does not fall; choose a decay")
    if config.lr_floor > config.lr:
        raise ConfigError(f"--lr-floor {config.lr_floor}: is above --lr {config.lr}, from which the rate falls to it")
    *before, now = phases_of(config)
    if before and now.decay_steps <= before[-1].until:
        raise ConfigError(
            f"--decay-steps {now.decay_steps}: up to step {before[-1].until} the learning rate falls as it was to "
            f"before, and then anew; give a step after {before[-1].until}"
        )


METRICS = {"cross_entropy": ("accuracy",), "mse": ("r2",), "bce": ("accuracy", "exact_match")}  # the default first


def scored(config: Config, classification: bool) -> Config:
    """The config with loss and metric decided. Raises ConfigError for those that do not fit the labels.

    `classification`: whether labels are integers, which may still become values.
    """
    classification = classification and not of_values(config)
    loss, metric = config.loss, config.metric
    if loss == "auto":
        loss = "cross_entropy" if classification else "bce" if metric == "exact_match" else "mse"
    if loss == "cross_entropy" and not classification:
        raise ConfigError(
            "--loss cross_entropy: labels are not integers, as classes have to be; leave it at auto, or if "
            "they are probabilities of classes, take torch.nn:CrossEntropyLoss"
        )
    fitting = METRICS.get(loss) or (("accuracy",) if classification else ("r2", "accuracy", "exact_match"))
    if metric != "auto" and metric not in fitting and not is_name(metric):
        raise ConfigError(f"--metric {metric}: --loss {loss} needs {' or '.join(fitting)}")
    if config.ignore is not None and not classification:
        raise ConfigError(f"--ignore {config.ignore}: the labels are values, which all count; leave it out")
    return config.replace(loss=loss, metric=fitting[0] if metric == "auto" else metric)


def check_rows(config: Resolved, least: int, layer: str, smallest: int, rows: int, replicas: int) -> None:
    """Raise ConfigError if the smallest micro-batch has too few rows for a layer that needs `least` of them."""
    if smallest >= least:
        return
    most_steps, fewer = rows // config.microbatches // least, rows // -(-rows // config.batch) // least
    ways = [f"--batch {-(-rows // most_steps)}"] if most_steps else []
    fewer -= fewer % config.leaf
    ways += [f"--microbatches {fewer}"] if fewer >= replicas * config.leaf else []
    raise ConfigError(
        f"{layer} cannot be trained on micro-batches of fewer than {least} rows, but with --batch {config.batch} and "
        f"--microbatches {config.microbatches} some have {smallest}; "
        + (" or ".join(ways) + " would work" if ways else f"the data set has too few rows for {replicas} replicas")
    )


def extended(config: Config, before: Config, rows: int) -> Config:
    """The settings of a run that goes on, with the learning rate of `before` in its history if the rate falls anew.

    Up to the last step that the run was to have before, the rate is what it was to be, wherever the run has stopped.
    Raises ConfigError for a rate that has fallen unless it is said how it goes on, and for a change of what it was to
    be.
    """
    steps, was = last_and_rate(config, rows)["steps"], Resolved(**vars(before) | last_and_rate(before, rows))
    longer = config.decay != "none" and steps > max(was.steps, was.decay_steps)
    changed = [name for name in FALLING if getattr(config, name) != getattr(before, name)]
    if changed and not longer:
        raise refusal(config, changed[0], getattr(before, changed[0]))
    if longer and "decay_steps" not in (config.given or ()):
        raise ConfigError(
            f"{steps} steps: the learning rate of the run in {config.out} has fallen {_low(was)} by step "
            f"{was.decay_steps}; say how it goes on: with --decay-steps {steps} it falls until then, from --lr if that "
            f"is given too; with --decay-steps {was.decay_steps} it stays"
        )
    if not changed:
        return config
    if config.decay_steps == before.decay_steps:
        name = changed[0]
        raise ConfigError(
            f"{flag(name)} {getattr(config, name)}: by --decay-steps {was.decay_steps} the learning rate stays as it "
            f"is then; to let it fall anew, give a later step, --decay-steps {steps}"
        )
    past = _asked_phases(was)
    kept = [phase for phase in past[:-1] if phase.until < was.steps]
    ended = past[len(kept)]._replace(until=was.steps)
    return config.replace(lr_history=tuple(map(str, [*kept, ended])))


def _low(config: Resolved) -> str:
    """Where the learning rate of a run is after its decay."""
    if config.decay not in DECAYS:
        return f"as {config.decay} says"
    _, lr, floor, last = phases_of(config)[-1]
    return f"to {floor + (lr - floor) * DECAYS[config.decay](last, last):g}"


def rounds_kept(config: Config, before: Config, rows: int) -> Config:
    """The settings of a run that goes on, with the last step that it was to have before kept as the end of a round of
    workers: up to there nothing changes, wherever the run has stopped."""
    steps, was = (last_and_rate(one, rows)["steps"] for one in (config, before))
    if not config.average_every or steps <= was:
        return config
    return config.replace(averaged_at=(*(end for end in config.averaged_at if end < was), was))
