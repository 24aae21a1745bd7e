"""Objects that a user names as package.module:name, as Python's entry points are named."""

import importlib
import re
from collections.abc import Callable
from typing import Any

from mpiml.errors import ConfigError

_FORM = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_entry_point(spec: str) -> bool:
    """Whether a text has the form package.module:name."""
    return bool(_FORM.fullmatch(spec))


def load(spec: str, setting: str) -> Callable[..., Any]:
    """The function that `spec` names. Raises ConfigError, naming the setting, if there is none.

    What the module itself raises while it is imported passes through.
    """
    module_name, _, name = spec.partition(":")
    if not is_entry_point(spec):
        raise ConfigError(f"{setting} {spec}: must be package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ConfigError(f"{setting} {spec}: no module {error.name} here or on PYTHONPATH") from None
        raise
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{setting} {spec}: {module.__file__} has no function {name}")
    return function  # type: ignore[no-any-return]
