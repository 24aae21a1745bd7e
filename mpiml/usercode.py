"""What a user brings along, named on the command line as package.module:function."""

import functools
import importlib
import inspect
import re
from typing import Any, TypeVar

from mpiml.errors import ConfigError

T = TypeVar("T")
NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_name(text: str) -> bool:
    """Whether that is how something is named."""
    return NAME.fullmatch(text) is not None


def named(text: str, flag: str) -> Any:
    """What package.module:function names; the module is imported from the current directory or where Python looks.

    Raises ConfigError if the text is of another form, or if there is no such module or nothing of that name in it.
    What the module itself raises while it is imported passes through.
    """
    if not is_name(text):
        raise ConfigError(f"{flag} {text}: must be package.module:function")
    module, _, path = text.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(f"{flag} {text}: no module {error.name} here or on PYTHONPATH") from None
        raise
    try:
        return functools.reduce(getattr, path.split("."), found)
    except AttributeError as error:
        raise ConfigError(f"{flag} {text}: {error}") from None


def called_with(function: T, what: str, *arguments: str) -> T:
    """A user's function, which will be called with these arguments. Raises ConfigError if it does not take them."""
    call = f"it is called with ({', '.join(arguments)})"
    if not callable(function):
        raise ConfigError(f"{what}: is no function, but {type(function).__name__}; {call}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some of those that are written in C have none
        return function
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise ConfigError(f"{what}{signature}: {error}; {call}") from None
    return function
