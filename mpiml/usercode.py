"""A user's own functions, named on the command line as package.module:function."""

import functools
import importlib
import inspect
import re
from typing import Any, TypeVar

from mpiml.errors import ConfigError

T = TypeVar("T")
NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_name(text: str) -> bool:
    """Whether `text` has the form package.module:function."""
    return NAME.fullmatch(text) is not None


def named(text: str, flag: str) -> Any:
    """The object called `text`, package.module:function; imports the module from the current directory or sys.path.

    `flag` is the setting that names it, for messages. Raises ConfigError if `text` has another form, or if the module
    or the function does not exist. An exception that the module raises while it is imported passes through.
    """
    if not is_name(text):
        raise ConfigError(f"{flag} {text}: must be package.module:function")
    name, _, path = text.partition(":")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(f"{flag} {text}: no module {error.name} here or on PYTHONPATH") from None
        raise
    try:
        return functools.reduce(getattr, path.split("."), module)
    except AttributeError as error:
        raise ConfigError(f"{flag} {text}: {error}") from None


def called_with(function: T, what: str, *arguments: str) -> T:
    """`function`, unchanged. Raises ConfigError, in which it is called `what`, unless it takes as many `arguments`."""
    call = f"it is called with ({', '.join(arguments)})"
    if not callable(function):
        raise ConfigError(f"{what}: must be a function, but is {type(function).__name__}; {call}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C have no signature
        return function
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise ConfigError(f"{what}{signature}: {error}; {call}") from None
    return function
