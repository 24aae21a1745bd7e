"""Settings that a run has stored: those in its directory are the user's, those in a checkpoint are data. What a run
that goes on may change of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mpiml import documents
from mpiml.config import FALLING, OF_THE_JOB, Config, from_toml, settings
from mpiml.errors import ConfigError, OutputError
from mpiml.flags import flag, from_table, text
from mpiml.nn.rates import history
from mpiml.run.checkpoint import Checkpoint
from mpiml.training.calendar import Calendar
from mpiml.usercode import is_name

T = TypeVar("T")
CODE = tuple(field.name for field in settings() if field.metadata["named"])  # the settings that may name some
HISTORY = ("lr_history", "averaged_at")  # which the run itself adds to, when it is extended


def settings_in(path: Path) -> Config:
    """The settings in the config.toml of a run directory that the user points at: these may name code.

    Raises OutputError or ConfigError, which begins with the path, for a file that cannot be used.
    """
    values = from_toml(path)
    try:
        return _checked(Config(**values))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def code_of(config: Config) -> dict[str, str]:
    """The settings of a config that name code."""
    return {name: getattr(config, name) for name in CODE if is_name(getattr(config, name) or "")}


def settings_of(saved: Checkpoint, follow: Collection[str], named: Mapping[str, Any]) -> Config:
    """The settings of the run that a checkpoint is of.

    Args:
        follow: which of CODE the caller will import and call, where they name code.
        named: what the user has named of CODE, in place of what the checkpoint says: text, or an object that the caller
            will use instead; None where nothing was.

    Raises OutputError if it holds no valid settings, ConfigError if code would be followed that the user has not named.
    """
    where = f"{saved.origin}: config"
    table = documents.from_toml(saved.config, where)
    try:
        config = _checked(Config(**from_table(Config, table)))
    except ConfigError as error:
        raise OutputError(f"{where}: {error}") from None
    given = {name: named[name] for name in CODE if named.get(name) is not None}
    unnamed = {name: text for name, text in code_of(config).items() if name in follow and name not in given}
    if unnamed:
        flags = " ".join(f"{flag(name)} {text}" for name, text in unnamed.items())
        raise ConfigError(f"{saved.origin} names code, which is run only if you name it: repeat {flags}")
    return config.replace(**{name: value for name, value in given.items() if isinstance(value, str)})


def step_of_weights(saved: Checkpoint, config: Config) -> int:
    """The step whose weights a checkpoint has as the model's, by its settings: within a round of workers, the last
    before it."""
    return Calendar(config).common(saved.step)


def averaged_weights(saved: Checkpoint, config: Config, arrays: Mapping[str, T]) -> dict[str, T]:
    """Something of a checkpoint's arrays, by name, with that of the average of each weight in the place of the weight.
    Raises OutputError if there are no averages."""
    if (step := step_of_weights(saved, config)) < saved.step:
        raise OutputError(
            f"{saved.origin} has no average of the weights: it was saved within a round of workers, and has the "
            f"weights themselves, as they were after step {step}; take these, or finish the round with --resume"
        )
    return documents.averaged(arrays, saved.origin)


def _checked(config: Config) -> Config:
    """The config. Raises ConfigError for a history of its learning rate that no run has written."""
    history(config.lr_history)
    return config


def resumed(asked: Config, stored: Config) -> Config:
    """The settings of a stored run, changed as is asked.

    Raises ConfigError for a change that would alter the run's arithmetic.
    """
    given = asked.given or frozenset()
    changes: dict[str, Any] = {name: getattr(asked, name) for name in OF_THE_JOB} | {"given": given}
    for field in settings():
        value, was = getattr(asked, field.name), getattr(stored, field.name)
        settled = value == "auto" and not field.metadata["on_resume"]  # by the first job
        if field.name not in given or value == was or settled:
            continue
        if field.name in HISTORY or not may_become(stored, field, value):
            raise refusal(asked, field.name, was)
        changes[field.name] = value
    if "epochs" in given:
        changes["steps"] = None
    if "pipe" in changes and "cuts" not in given:
        changes["cuts"] = ()
    if changes.get("cuts", stored.cuts):  # which nothing is measured for, if the command is repeated as it was
        changes["balance"] = "operations"
    return stored.replace(**changes)


def may_become(stored: Config, field: dataclasses.Field[Any], value: Any) -> bool:
    """Whether a stored run may be resumed with another value of a setting."""
    if field.name == "ignore":  # where it was not set, -1 was ignored, or did not occur
        return stored.ignore is None and value == -1
    if field.name in ("averaged_at", "workers"):
        return stored.average_every > 0
    if field.name in (*FALLING, *HISTORY):  # for more steps than before, which is checked when their number is known
        return stored.decay != "none"
    return bool(field.metadata["on_resume"])


def refusal(asked: Config, name: str, was: Any) -> ConfigError:
    """The error for a setting of a resumed run that must stay what it `was`."""
    has = "none" if was in (None, ()) else text(was)
    return ConfigError(
        f"{flag(name)} {text(getattr(asked, name))}: the run in {asked.out} has {has}, and another "
        "value would change its results; leave the flag out, or start a new run with --init"
    )
