"""Files of a directory that are each of a step, such as step-000000100.safetensors."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypeVar

from mpiml.documents import shown
from mpiml.errors import OutputError
from mpiml.run.directory import named_errors

T = TypeVar("T")
NAME = re.compile(r"step-(\d+)\.safetensors")
DIGITS = 18  # the most that a step's number has


def file_name(step: int) -> str:
    """The file name of the file after a step."""
    return f"step-{step:09d}.safetensors"


def prune(directory: Path, step: int, keep: int, best: Collection[int] = ()) -> None:
    """Remove all files up to a step but the newest `keep` and those of the steps `best`.

    Those of later steps are neither counted nor removed: they are damaged, or the run would not be at this step.
    """
    older = [file for file in listed(directory) if step_of(file) <= step]
    for old in older[keep:]:
        if step_of(old) not in best:
            with named_errors("remove", old):
                old.unlink(missing_ok=True)


def newest(directory: Path, load: Callable[[Path], T]) -> tuple[T | None, list[str]]:
    """What `load` makes of the newest file for which it raises no OutputError, and what is wrong with newer ones.

    None if there are no files. Raises OutputError if there are some but none can be used, or if the directory cannot be
    read.
    """
    problems: list[str] = []
    for path in listed(directory):
        try:
            return load(path), problems
        except OutputError as error:
            problems.append(str(error))
    if problems:
        raise OutputError(f"no checkpoint in {directory} can be used: {'; '.join(problems)}")
    return None, problems


def listed(directory: Path) -> list[Path]:
    """The files, newest first."""
    with named_errors("read", directory), os.scandir(directory) as entries:
        files = [Path(entry.path) for entry in entries if NAME.fullmatch(entry.name) and entry.is_file()]
    return sorted(files, key=lambda file: (step_of(file), file.name), reverse=True)


def last_step(directory: Path) -> int:
    """The step of the newest file, from its name; 0 if there is none."""
    return max(map(step_of, listed(directory)), default=0)


def step_in(texts: Mapping[str, str], path: Path) -> int:
    """The step that the texts of a file say. Raises OutputError if it is no whole number."""
    step = texts.get("step", "")
    if not (step.isascii() and step.isdecimal() and len(step) <= DIGITS):
        raise OutputError(f"{path} is damaged: step is {shown(step)}, but must be a whole number")
    return int(step)


def step_of(file: Path) -> int:
    """The step of a file that `listed` has given."""
    match = NAME.fullmatch(file.name)
    assert match, "only files with such names are listed"
    return int(match[1])
