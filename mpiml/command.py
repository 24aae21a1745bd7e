"""What all commands share: flags that are refused with what would work, an end in one line, and tables and quantities
as a person reads them; no MPI.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from mpiml.errors import ConfigError, RunError
from mpiml.run.console import say

INTERRUPTED, CLOSED = 130, 141  # exit codes: what a shell says of a program that SIGINT, or SIGPIPE, has ended


class Parser(argparse.ArgumentParser):
    """Raises ConfigError for what cannot be understood."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def ended(program: str, act: Callable[[], int]) -> int:
    """Do what a command is for. Returns its exit code, also of what can go wrong for reasons outside the program, of
    which one line tells."""
    try:
        code = act()
        sys.stdout.flush()
        return code
    except RunError as error:
        text, code = f"{program}: {error}", error.exit_code
    except KeyboardInterrupt:
        text, code = f"{program}: interrupted", INTERRUPTED
    except BrokenPipeError:  # who read what it prints has gone, and need not be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
        return CLOSED
    except OSError as error:
        text, code = f"{program}: {error.filename or 'input or output'}: {error.strerror or error}", 74
    except Exception:  # of a user's own code, who needs to see where
        text, code = traceback.format_exc().rstrip(), RunError.exit_code
    say(text, sys.stderr)
    return code


def whole(low: int = 1) -> Callable[[str], int]:
    """The type of an argument that is a whole number."""

    def read(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"must be a whole number, at least {low}, not {text!r}")
        return int(text)

    return read


def wholes(text: str) -> list[int]:
    """The type of an argument that is a list of counts."""
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


def telling(lines: Sequence[str], *patterns: str) -> str:
    """The line of many that says what went wrong, for programs have much to say besides: the first in which the first
    of some regular expressions is found that is found in any; else the first."""
    said = [line.strip() for line in lines if line.strip()]
    found = (line for pattern in patterns for line in said if re.search(pattern, line))
    return next(found, said[0] if said else "it said nothing")


def table(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Lines of aligned columns, each to its side: "l" or "r"."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(_pad(*cell) for cell in zip(row, widths, sides, strict=True)).rstrip() for row in rows]


def _pad(text: str, width: int, side: str) -> str:
    return text.ljust(width) if side == "l" else text.rjust(width)


def size(amount: float) -> str:
    """Bytes: "1.5 MiB"."""
    return _scaled(amount, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def count(amount: float) -> str:
    """How many: "1.5 M"."""
    return _scaled(amount, 1000, ("", "k", "M", "G", "T", "P"))


def _scaled(amount: float, step: int, units: Sequence[str]) -> str:
    power = 0
    while amount >= 1000 and power < len(units) - 1:
        amount, power = amount / step, power + 1
    return f"{amount:,.{0 if power == 0 or amount >= 100 else 1}f} {units[power]}".rstrip()
