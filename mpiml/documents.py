"""Reading small files of mpiml and what checkpoints hold as data, of whatever kind, size or depth they are.

An OutputError says what is wrong, in one line that begins with the file's name.
"""

from __future__ import annotations

import functools
import json
import math
import os
import reprlib
import stat
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mpiml.errors import OutputError

T = TypeVar("T")

LARGEST = 1 << 26  # bytes of a small file: environment.json of 100,000 ranks has a third of this
DEEPEST = 32  # levels of nesting: mpiml writes at most 5
AVERAGE = "ema."  # begins the names of a checkpoint's arrays that are averages of weights
INTEGERS = range(-(1 << 63), 1 << 63)  # of 64 bits, as in NumPy


def read(path: Path, largest: float = LARGEST) -> bytes:
    """The content of a file. Raises OutputError if it cannot be read, is not a regular file, or has too many bytes."""
    try:
        check_regular(path)
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if os.fstat(file.fileno()).st_size > largest:
                raise OutputError(f"{path}: has more than {largest:,} bytes")
            return file.read()
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}") from error


def check_regular(path: Path) -> None:
    """Raise OutputError unless a path is a regular file: opening a pipe would wait for its writer, and /dev/zero has no
    end. Raises OSError if it does not exist."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OutputError(f"{path}: is not a regular file")


def from_json(text: str | bytes, origin: str) -> Any:
    """The value of a JSON text. Raises OutputError, beginning with `origin`, if the text is not JSON."""
    # Of long logs each line is read: where nothing is escaped, no character is half; without brackets nothing nests.
    plain = isinstance(text, bytes) and b"\\u" not in text and text.count(b"[") + text.count(b"{") <= DEEPEST
    return _parsed(json.loads, text, origin, checked=plain)


def from_toml(text: str | bytes, origin: str) -> dict[str, Any]:
    """The table of a TOML text. Raises OutputError, beginning with `origin`, if the text is not TOML."""
    import tomllib

    table: dict[str, Any] = _parsed(tomllib.loads, text, origin)
    return table


def texts(text: str | bytes, origin: str) -> dict[str, str]:
    """Texts by name, from JSON. Raises OutputError, beginning with `origin`, if that is not what it holds."""
    value: dict[str, str] = from_json(text, origin)
    if not fits(value, dict[str, str]):
        raise OutputError(f"{origin} is damaged: it must hold texts by name, not {shown(value)}")
    return value


def averaged(arrays: Mapping[str, T], origin: str) -> dict[str, T]:
    """A checkpoint's arrays by name, with the average "ema.NAME" of a weight in the place of the weight NAME.

    Raises OutputError, beginning with `origin`, if there are no averages.
    """
    averages = {name.removeprefix(AVERAGE): array for name, array in arrays.items() if name.startswith(AVERAGE)}
    if not averages:
        raise OutputError(f"{origin} has no average of the weights, as a run with --ema keeps one")
    return {name: array for name, array in arrays.items() if not name.startswith(AVERAGE)} | averages


def to_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON, with null in place of numbers that are not finite."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def finite(value: Any) -> Any:
    """A value that JSON can hold: None in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_fields(value: Any, kinds: Mapping[str, Any], origin: str, needed: Iterable[str] = ()) -> dict[str, Any]:
    """Return an object from JSON that has the `needed` fields, and whose fields are of the types in `kinds`, if listed.

    Raises OutputError, beginning with `origin`, that names the first missing or wrong field.
    """
    if not isinstance(value, dict):
        raise OutputError(f"{origin} is damaged: it must hold an object with fields, not {shown(value)}")
    for name in needed:
        if name not in value:
            raise OutputError(f"{origin} is damaged: it has no {name}")
    for name, kind in kinds.items():
        if name in value and not fits(value[name], kind):
            text = getattr(kind, "__name__", kind) if isinstance(kind, type) else kind
            raise OutputError(f"{origin} is damaged: {name} is {shown(value[name])}, but must be of type {text}")
    return value


def fits(value: Any, kind: Any) -> bool:
    """Whether a value from JSON is of a type: a list may stand for a tuple, true is not an int, and an int has at most
    64 bits."""
    outer, inner = _parts(kind)
    if outer in (types.UnionType, typing.Union):
        return any(fits(value, one) for one in inner)
    if outer in (tuple, list):
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if outer is dict:
        return isinstance(value, dict) and all(fits(item, inner[1]) for item in value.values())
    if kind in (int, float) and isinstance(value, int):
        return not isinstance(value, bool) and value in INTEGERS
    return kind is Any or isinstance(value, kind)


@functools.cache
def _parts(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    return typing.get_origin(kind), typing.get_args(kind)


def shown(value: Any) -> str:
    """A value of any size, shortened for a message."""
    return reprlib.repr(value)


def _parsed(parse: Callable[[str], Any], text: str | bytes, origin: str, checked: bool = False) -> Any:
    try:
        value = parse(text.decode() if isinstance(text, bytes) else text)
        if not checked:
            _check_text_and_depth(value, DEEPEST)
    except RecursionError:
        raise OutputError(f"{origin} is damaged: it is nested too deeply") from None
    except ValueError as error:  # also a number with more digits than Python converts
        raise OutputError(f"{origin} is damaged: {error}") from None
    return value


def _check_text_and_depth(value: Any, left: int) -> None:
    """Raise ValueError if a value is nested too deeply or holds text that cannot be encoded."""
    if isinstance(value, str):
        value.encode()  # fails for half of a surrogate pair, which JSON can escape
    elif isinstance(value, (dict, list)):
        if not left:
            raise ValueError("it is nested too deeply")
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            _check_text_and_depth(item, left - 1)
