"""What spoils a file of a data set, and what is said of it then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mpiml.data.dataset import open_dataset
from mpiml.data.formats import Options
from mpiml.data.inspection import inspect, problem
from mpiml.errors import DataError
from tests.data import samples

Change = Callable[[bytes], bytes]


def look_at(spec: Path, options: Options) -> None:
    """Open a data set and look at all its values, as a run of one rank would."""
    data = open_dataset(str(spec), options)
    for split in (data.train, data.test):
        for column, source in (("x", split.x), ("y", split.y)):
            source.hold(np.arange(len(source)))
            if wrong := problem(data, column, inspect(source, np.arange(len(source)))):
                raise DataError(f"{source.name}: {wrong[0]} {wrong[1]}")


def refusal(spec: Path, options: Options = samples.OPTIONS) -> str:
    """Why a data set cannot be used, in one line."""
    with pytest.raises(DataError) as error:
        look_at(spec, options)
    assert "\n" not in str(error.value)
    return str(error.value)


def rewrite(path: Path, change: Change) -> None:
    path.write_bytes(change(path.read_bytes()))


def replaced_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def cut(count: int) -> Callable[[Path], None]:
    return lambda path: rewrite(path, lambda raw: raw[:count])


def longer(path: Path) -> None:
    rewrite(path, lambda raw: raw + b"and more")


def of_text(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text)
