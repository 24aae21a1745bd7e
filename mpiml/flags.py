"""One setting: what it may be, from text and to text, whether it comes from a flag or a TOML file."""

from __future__ import annotations

import dataclasses
import glob
import json
import math
import os
import types
import typing
from collections.abc import Sequence
from typing import Any

from mpiml.documents import INTEGERS
from mpiml.errors import ConfigError
from mpiml.usercode import is_name


def setting(
    default: Any,
    group: str,
    help: str,
    *,
    choices: Sequence[str] = (),
    low: float | None = None,
    below: float = math.inf,
    on_resume: bool = False,
    metavar: str | None = None,
    or_named: bool = False,
) -> Any:
    """A field of Config: its help, what it may be, and whether a resumed run may change it.

    `or_named`: it may also name code, as package.module:function; that is imported and called.
    """
    about = {"group": group, "help": help, "choices": tuple(choices), "low": low, "below": below, "or_named": or_named}
    return dataclasses.field(default=default, metadata={**about, "on_resume": on_resume, "metavar": metavar})


def flag(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def metavar(kind: Any) -> str:
    """What stands for a value of type `kind` in the help."""
    text = str(kind)
    return "N,N" if "tuple" in text else "N" if "int" in text else "X" if "float" in text else "NAME"


def convert(kind: Any, raw: Any, what: str) -> Any:
    """A raw value, text from a flag or something typed from TOML, as a value of type `kind`."""
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is tuple:
        items = raw.split(",") if isinstance(raw, str) else raw if isinstance(raw, (list, tuple)) else [raw]
        return tuple(convert(int, item, what) for item in items if item != "")
    if kind is str and isinstance(raw, str):
        if raw != raw.encode(errors="replace").decode():
            raise ConfigError(f"{what!a}: must be text in UTF-8")
        if not raw or "\0" in raw:
            raise ConfigError(f"{what}: must not be empty")
        return raw
    if kind is bool and (isinstance(raw, bool) or raw == "true"):
        return bool(raw)
    if kind in (int, float) and not isinstance(raw, bool) and isinstance(raw, (str, int, float)):
        try:
            number = kind(raw)
        except (ValueError, OverflowError):
            number = None
        if number is not None and (isinstance(raw, str) or number == raw) and (kind is float or number in INTEGERS):
            return number
    names = {int: "a whole number of at most 64 bits", float: "a number", bool: "true or false", str: "text"}
    raise ConfigError(f"{what}: must be {names[kind]}")


def check(field: dataclasses.Field[Any], value: Any) -> None:
    """Raise ConfigError for a value of the right type that a setting may not have."""
    about, what = field.metadata, f"{flag(field.name)} {text(value)}"
    if value is None and field.default is None:
        return
    if about["choices"] and value not in about["choices"] and not (about["or_named"] and is_name(value)):
        known = [*about["choices"], *(["package.module:function"] if about["or_named"] else [])]
        raise ConfigError(f"{what}: choose from {', '.join(known)}{guess(str(value), about['choices'])}")
    if about["low"] is None:
        return
    for number in value if isinstance(value, tuple) else (value,):
        if not (math.isfinite(number) and about["low"] <= number < about["below"]):
            limit = f" and less than {about['below']:g}" if about["below"] < math.inf else ""
            raise ConfigError(f"{what}: must be at least {about['low']:g}{limit}")


def guess(word: str, known: Sequence[str]) -> str:
    """The known word that was perhaps meant, as the end of a message."""
    import difflib

    close = difflib.get_close_matches(word, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def absolute(spec: str) -> str:
    """A path, which may be a pattern with *, as a job finds it from any directory; digits and package.module:function
    as they are."""
    if spec == "digits" or is_name(spec) or os.path.isabs(spec):
        return spec
    here = os.getcwd()
    pattern = glob.has_magic(spec) and not os.path.exists(spec)
    return os.path.join(glob.escape(here) if pattern else here, spec)


def text(value: Any) -> str:
    """A value as a flag has it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def toml(value: Any) -> str:
    """A value as TOML has it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml, value))}]"
    # TOML escapes as JSON does, but wants DEL escaped too.
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
