"""--init: the file that a run begins with, checked against the model, and its arrays put in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiml.config import Config
from mpiml.errors import OutputError, first_few
from mpiml.run import checkpoint, step_files, tensors
from mpiml.run.checkpoint import Header
from mpiml.run.directory import CHECKPOINTS
from mpiml.run.result import read_result
from mpiml.run.verified import Progress
from mpiml.training import accounts
from mpiml.training.init_names import NameMap
from mpiml.training.init_plan import Plan, plan
from mpiml.training.place import BuiltModel

Array = NDArray[Any]


def check(config: Config, model: BuiltModel) -> None:
    """Raise OutputError or ConfigError if --init cannot give the model its first values; only headers are read."""
    problems: list[OutputError] = []
    for path in _to_try(config):
        try:
            file = tensors.header(path)
        except OutputError as error:
            problems.append(error)
            continue  # `take` says what is wrong with it
        _plan(config, model, *file)
        return
    raise problems[-1]


def take(config: Config, model: BuiltModel, progress: Progress) -> tuple[Iterator[tuple[str, Array]], list[str]]:
    """What --init gives.

    Returns (name, value) of each parameter, average and constant that it gives, which is read only then; and what a
    person should know. Raises as `check`, and OutputError for a damaged file; of a run's, the first that is whole is
    taken. So does the iterator for values that cannot be taken.
    """
    skipped: dict[Path, OutputError] = {}
    for path in _to_try(config):
        try:
            file, foreign = tensors.header(path)
        except OutputError as error:
            skipped[path] = error
            continue
        planned = _plan(config, model, file, foreign)
        read = {name for source in planned.sources.values() for name in (source.name, *source.others)}
        try:
            step = None if foreign else checkpoint.load(path, read.__contains__, progress, keep=False).step
        except OutputError as error:
            skipped[path] = error
            continue
        within = ", within a round of workers: the weights at its start" if accounts.STEPS in file.kinds else ""
        of_step = "" if step is None else f" (step {step}{within})"
        some = f": {planned.count()}" if len(planned.sources) < len(planned.wanted) else ""
        notes = [f"warning: skipped {problem}" for file, problem in skipped.items() if file.exists()]
        notes += [f"first weights from {path}{of_step}{some}", *planned.notes()]
        return _values(path, planned, progress), notes
    if len(skipped) == 1:
        raise skipped.popitem()[1]
    raise OutputError(f"no checkpoint in {config.init} can be used: {'; '.join(map(str, skipped.values()))}")


def _values(path: Path, planned: Plan, progress: Progress) -> Iterator[tuple[str, Array]]:
    """The values that are taken of a file, by name; of each no more is kept when the next is read."""
    arrays = tensors.arrays(path, [source.name for source in planned.sources.values()], progress, planned.foreign)

    def value(name: str, array: Array) -> Array:
        source = planned.sources[name]
        planned.check_shared(source, _differing(path, source.others, array, progress))
        return planned.value(name, array)

    for name in planned.sources:
        yield name, value(name, next(arrays))


def _differing(path: Path, names: Sequence[str], array: Array, progress: Progress) -> list[str]:
    """Those of a file's arrays that are not equal to another one of it."""
    others = zip(names, tensors.arrays(path, names, progress) if names else (), strict=True)
    return [name for name, other in others if not np.array_equal(other, array)]


def _plan(config: Config, model: BuiltModel, file: Header, foreign: bool) -> Plan:
    """What the settings take of a file. A checkpoint's optimizer state is none of it."""
    kinds = {name: kind for name, kind in file.kinds.items() if foreign or checkpoint.is_of_model(name)}
    names = NameMap.read(config.init_names) if config.init_names else None
    return plan(model, file._replace(kinds=kinds), foreign, names, config.init_partial)


def _to_try(config: Config) -> Iterator[Path]:
    """`_files`, and then those that have come since: a run that goes on removes files and writes others."""
    tried = set[Path]()
    while files := [file for file in _files(config) if file not in tried]:
        yield from files
        tried.update(files)


def _files(config: Config) -> list[Path]:
    """The files that --init may mean, of which the first that is whole is taken: of a run its best checkpoint, then the
    newest first. Raises OutputError for a directory that holds none."""
    path = Path(config.init or "")
    if not path.is_dir():
        return [path]
    if not (path / CHECKPOINTS).is_dir():
        there = sorted(file.name for file in path.glob("*.safetensors"))
        raise OutputError(f"{path} holds no run" + (f"; name a file in it: {first_few(there)}" if there else ""))
    files = step_files.listed(path / CHECKPOINTS)
    if not files:
        raise OutputError(f"{path} has no checkpoint yet")
    best = path / str(read_result(path).get("best_checkpoint"))
    return sorted(files, key=lambda file: file != best)  # the others stay in their order
