"""What all commands share: a parser that raises ConfigError, types of arguments, exit codes and one-line errors, and
text for a person to read: tables, sizes, counts."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from mpiml.errors import ConfigError, RunError

INTERRUPTED, CLOSED = 130, 141  # exit codes as a shell gives them for SIGINT and SIGPIPE


class Parser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would print the usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def run_command(program: str, act: Callable[[], int]) -> int:
    """Call `act` and return its exit code. For an error, print one line and return the exit code that stands for it; an
    error in a user's own code is printed with its traceback."""
    try:
        code = act()
        sys.stdout.flush()
        return code
    except RunError as error:
        text, code = f"{program}: {error}", error.exit_code
    except KeyboardInterrupt:
        text, code = f"{program}: interrupted", INTERRUPTED
    except BrokenPipeError:  # the reader of the output has gone, as `head` does: that is not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
        return CLOSED
    except OSError as error:
        text, code = f"{program}: {error.filename or 'input or output'}: {error.strerror or error}", 74
    except Exception:  # from a user's own code: the traceback shows where
        text, code = traceback.format_exc().rstrip(), RunError.exit_code
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it is full or has no reader; is closed; is None
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    return code


def whole(low: int = 1) -> Callable[[str], int]:
    """The type of an argument that is a whole number, at least `low`."""

    def read(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"must be a whole number, at least {low}, not {text!r}")
        return int(text)

    return read


def wholes(text: str) -> list[int]:
    """The type of an argument that is a list of whole numbers above 0; returns them sorted, each once."""
    items = text.split(",")
    if not all(item.strip().isdecimal() and int(item) for item in items):
        raise argparse.ArgumentTypeError(f"must be whole numbers, each at least 1, as in 1,2,4, not {text!r}")
    return sorted(set(map(int, items)))


def finite(text: str) -> float:
    """The type of an argument that is a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}")
    return value


def positive(text: str) -> float:
    """The type of an argument that is a finite number above 0."""
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be more than 0, not {text!r}")
    return value


def fault_line(output: str, *patterns: str) -> str:
    """The line of a program's output that names the fault: the first line that matches the first regular expression
    which any line matches; else the first line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    matching = (line for pattern in patterns for line in lines if re.search(pattern, line))
    return next(matching, lines[0] if lines else "it printed no error")


def table(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Lines of aligned columns; `sides` has a letter for each column: "l" for left, "r" for right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    line = "  ".join(f"{{:{'<' if side == 'l' else '>'}{width}}}" for side, width in zip(sides, widths, strict=True))
    return [line.format(*row).rstrip() for row in rows]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of numbers; the first row has its heads."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---:|" * len(rows[0]), *lines[1:]]) + "\n"


def plural(number: int, thing: str) -> str:
    """A number of things: "1 rank", "2 ranks"."""
    return f"{number} {thing}" + ("s" if number != 1 else "")


def size(amount: float) -> str:
    """Bytes: "1.5 MiB"."""
    return _scaled(amount, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def count(amount: float) -> str:
    """A large number: "1.5 M"."""
    return _scaled(amount, 1000, ("", "k", "M", "G", "T", "P"))


def _scaled(amount: float, step: int, units: Sequence[str]) -> str:
    power = 0
    while amount >= 1000 and power < len(units) - 1:
        amount, power = amount / step, power + 1
    return f"{amount:,.{0 if power == 0 or amount >= 100 else 1}f} {units[power]}".rstrip()
