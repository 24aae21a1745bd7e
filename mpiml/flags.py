"""Settings as the fields of a dataclass: their allowed values, and how flags and TOML files give them and show them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
import reprlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mpiml.errors import ConfigError

if TYPE_CHECKING:
    from argparse import ArgumentParser

FUNCTION = "package.module:function"
# A time limit as SLURM writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].
LIMIT = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")


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
    named: Callable[[str], bool] | None = None,
) -> Any:
    """A field that is a setting.

    It may be one of `choices`, or numbers from `low` to less than `below`; where it is given, a text that
    is `named`, the name of code, which is imported and called. With `on_resume` a resumed run may change it.
    """
    about = {"group": group, "help": help, "choices": tuple(choices), "low": low, "below": below, "named": named}
    return dataclasses.field(default=default, metadata={**about, "on_resume": on_resume, "metavar": metavar})


def fields(settings: type) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass that are settings."""
    return [field for field in dataclasses.fields(settings) if field.metadata]


@functools.cache
def kinds(settings: type) -> dict[str, Any]:
    """The type of each setting of a dataclass, by its name."""
    hints = typing.get_type_hints(settings)
    return {field.name: hints[field.name] for field in fields(settings)}


def flag(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def add_to(parser: ArgumentParser, settings: type) -> None:
    """Give a parser the flags of a dataclass' settings, in their groups, and --config FILE. The help marks those that a
    resumed run may change by [R]."""
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings, named as the flags, which override it")
    groups: dict[str, Any] = {}
    for field in fields(settings):
        about, group = field.metadata, field.metadata["group"]
        groups[group] = groups.get(group) or parser.add_argument_group(group)
        mark = " [R]" if about["on_resume"] else ""
        if field.default is False:
            groups[group].add_argument(flag(field.name), action="store_const", const="true", help=about["help"] + mark)
            continue
        shown = f" (default: {text(field.default)})" if field.default not in (None, ()) else ""
        value = about["metavar"] or "|".join(_choices(field)) or _metavar(kinds(settings)[field.name])
        groups[group].add_argument(flag(field.name), metavar=value, help=about["help"] + shown + mark)


def _choices(field: dataclasses.Field[Any]) -> list[str]:
    return [*field.metadata["choices"], *([FUNCTION] if field.metadata["named"] else [])]


def _metavar(kind: Any) -> str:
    """Stands for a value of a type in the help."""
    name = str(kind)
    return (
        "NAME,NAME"
        if "tuple[str" in name
        else "N,N"
        if "tuple" in name
        else "N"
        if "int" in name
        else "X"
        if "float" in name
        else "NAME"
    )


def from_arguments(
    settings: type, parser: ArgumentParser, arguments: Sequence[str]
) -> tuple[dict[str, Any], str | None]:
    """The values that a command line gives to a dataclass' settings, and the file that --config names, or None.

    Raises ConfigError for an unknown flag or a value of another type.
    """
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        names = [flag(field.name) for field in fields(settings)] + ["--config"]
        raise ConfigError(f"{unknown[0]} is not a setting{guess(unknown[0].split('=')[0], names)}; --help lists all")
    texts = vars(known)
    path: str | None = texts.pop("config", None)
    return {name: convert(kinds(settings)[name], raw, f"{flag(name)} {raw}") for name, raw in texts.items()}, path


def from_table(settings: type, table: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a table from TOML gives to a dataclass' settings. Raises ConfigError for an
    unknown key or a value of another type."""
    values = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in kinds(settings):
            known = [known.replace("_", "-") for known in kinds(settings)]
            shown = key if key.isprintable() else ascii(key)
            raise ConfigError(f"{shown} is not a setting{guess(key, known)}; --help lists all")
        values[name] = convert(kinds(settings)[name], value, f"{key} = {reprlib.repr(value)}")
    return values


def convert(kind: Any, raw: Any, what: str) -> Any:
    """A value of type `kind`, from the text of a flag or a value of a TOML file. Raises ConfigError, beginning with
    `what`, if it is of another type."""
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is tuple:
        items = listed(raw) if isinstance(raw, str) else raw if isinstance(raw, (list, tuple)) else [raw]
        return tuple(convert(typing.get_args(kind)[0], item, what) for item in items if item != "")
    if kind is str and isinstance(raw, str):
        if raw != raw.encode(errors="replace").decode():
            raise ConfigError(f"{what!a}: must be text in UTF-8")
        if not raw or "\0" in raw:
            raise ConfigError(f"{what}: must not be empty")
        return raw
    if kind is bool and (isinstance(raw, bool) or raw == "true"):
        return bool(raw)
    if kind in (int, float) and not isinstance(raw, bool) and isinstance(raw, (str, int, float)):
        with contextlib.suppress(ValueError, OverflowError):
            number = kind(raw)
            if (isinstance(raw, str) or number == raw) and (kind is float or number.bit_length() < 64):
                return number
    names = {int: "a whole number of at most 64 bits", float: "a number", bool: "true or false", str: "text"}
    raise ConfigError(f"{what}: must be {names[kind]}")


def check(field: dataclasses.Field[Any], value: Any) -> None:
    """Raise ConfigError if a value, of the right type, is not one that the setting may have."""
    about, what = field.metadata, f"{flag(field.name)} {text(value)}"
    if value is None and field.default is None:
        return
    if about["choices"] and value not in about["choices"] and not (about["named"] and about["named"](value)):
        raise ConfigError(f"{what}: choose from {', '.join(_choices(field))}{guess(str(value), about['choices'])}")
    if about["low"] is None:
        return
    for number in value if isinstance(value, tuple) else (value,):
        if not math.isfinite(number):
            raise ConfigError(f"{what}: must be a finite number")
        if not about["low"] <= number < about["below"]:
            limit = f" and less than {about['below']:g}" if about["below"] < math.inf else ""
            raise ConfigError(f"{what}: must be at least {about['low']:g}{limit}")


def guess(word: str, known: Sequence[str]) -> str:
    """The end of a message that proposes the known word most like a wrong one; empty if none is like it."""
    import difflib

    close = difflib.get_close_matches(word, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def text(value: Any) -> str:
    """A value as text that a flag accepts."""
    return ",".join(map(quoted, map(str, value))) if isinstance(value, tuple) else str(value)


def listed(text: str) -> list[str]:
    """The items of a list that commas separate; an item in quotation marks may hold commas."""
    import csv

    return [item.strip() for item in next(csv.reader([text], skipinitialspace=True), [])]


def quoted(item: str) -> str:
    """An item as a list that commas separate takes it."""
    return '"' + item.replace('"', '""') + '"' if set(item) & set(',"\n\r') else item


def toml(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml, value))}]"
    # TOML escapes as JSON does, but wants DEL escaped too.
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def is_finite(text: str) -> bool:
    """Whether a text is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def seconds(limit: str | None, what: str) -> float:
    """The seconds of a time limit as SLURM writes it; infinite for None. Raises ConfigError, beginning with `what`."""
    if limit is None:
        return math.inf
    match = LIMIT.fullmatch(limit)
    if not match:
        needed = "minutes, minutes:seconds, hours:minutes:seconds or days-hours:minutes:seconds"
        raise ConfigError(f"{what} {limit}: must be {needed}")
    parts = [int(part) for part in match["parts"].split(":")]
    units = (3600, 60, 1) if match["days"] or len(parts) == 3 else (60, 1)
    return 86400.0 * int(match["days"] or 0) + sum(a * b for a, b in zip(parts, units, strict=False))
