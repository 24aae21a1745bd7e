"""Settings that a run has stored: those in its directory are the user's, those in a checkpoint are data."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mpiml import documents
from mpiml.config import Config, from_toml, settings
from mpiml.errors import ConfigError, OutputError
from mpiml.flags import flag, from_table
from mpiml.run.checkpoint import Checkpoint
from mpiml.usercode import is_name

CODE = tuple(field.name for field in settings() if field.metadata["named"])  # the settings that may name some


def settings_in(path: Path) -> Config:
    """The settings in the config.toml of a run directory that the user points at: these may name code.

    Raises OutputError or ConfigError, which begins with the path, for a file that cannot be used.
    """
    values = from_toml(path)
    try:
        return Config(**values)
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
        config = Config(**from_table(Config, table))
    except ConfigError as error:
        raise OutputError(f"{where}: {error}") from None
    given = {name: named[name] for name in CODE if named.get(name) is not None}
    unnamed = {name: text for name, text in code_of(config).items() if name in follow and name not in given}
    if unnamed:
        flags = " ".join(f"{flag(name)} {text}" for name, text in unnamed.items())
        raise ConfigError(f"{saved.origin} names code, which is run only if you name it: repeat {flags}")
    return config.replace(**{name: value for name, value in given.items() if isinstance(value, str)})
