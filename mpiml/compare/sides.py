"""What is compared: a run, a checkpoint, a directory of checkpoints, or a metrics file, and what is known of it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpiml import documents
from mpiml.compare.arrays import checked
from mpiml.errors import OutputError
from mpiml.run import environment, step_files
from mpiml.run.contents import contents_in
from mpiml.run.directory import CHECKPOINTS, CONFIG, METRICS, names, settings_in
from mpiml.run.result import read_result

RUN, FILE, FILES, LINES = "run", "checkpoint", "checkpoints", "metrics"
WHAT = "give the directory of a run, a checkpoint of it, or its metrics.jsonl"


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        name: "A" or "B".
        path: as it was given.
        kind: one of RUN, FILE (a checkpoint), FILES (a directory of checkpoints) and LINES (a metrics file).
        metrics: the metrics file to compare, if there is one.
        checkpoints: those to compare, by step.
        settings: by name with dashes, as TOML has them; empty if they are not known.
        environment: what environment.json says, empty if there is none; result: of a run, what result.json says.
        notes: what of these cannot be read.
    """

    name: str
    path: Path
    kind: str
    metrics: Path | None = None
    checkpoints: Mapping[int, Path] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    result: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} ({self.path})"


def opened(name: str, path: Path) -> Side:
    """What is at a path. Raises OutputError if it is nothing that can be compared."""
    if path.is_dir():
        return _directory(name, path)
    if not path.exists():
        raise OutputError(f"{path}: No such file or directory; {WHAT}")
    if path.suffix == ".jsonl":
        return _with_run(Side(name, path, LINES, metrics=path), path.absolute().parent)
    if path.suffix != ".safetensors":
        raise OutputError(f"{path} is neither a run nor a checkpoint (.safetensors) nor metrics (.jsonl); {WHAT}")
    texts = checked(path).texts
    side = Side(name, path, FILE, checkpoints={step_files.step_in(texts, path): path})
    side = _with_run(side, path.absolute().parent.parent)
    return dataclasses.replace(side, settings=_settings_in(path, texts))


def _directory(name: str, path: Path) -> Side:
    entries = names(path)
    if entries.isdisjoint({CONFIG, METRICS, CHECKPOINTS}):
        if not (files := step_files.listed(path)):
            raise OutputError(f"{path} holds no run: it has neither {CONFIG} nor {METRICS} nor {CHECKPOINTS}/; {WHAT}")
        side = Side(name, path, FILES, checkpoints=_by_step(files))
        return _with_settings(_with_run(side, path.absolute().parent))
    files = step_files.listed(path / CHECKPOINTS) if CHECKPOINTS in entries else []
    metrics = path / METRICS if METRICS in entries else None
    return _with_settings(_with_run(Side(name, path, RUN, metrics, _by_step(files)), path))


def _by_step(files: list[Path]) -> dict[int, Path]:
    return {step_files.step_of(file): file for file in reversed(files)}


def _with_run(side: Side, run: Path) -> Side:
    """A side with what the directory of its run says, if that is one; where a file there is damaged, a note says so."""
    if side.kind != RUN and not (run / CONFIG).exists():
        return side
    known: dict[str, Any] = {}
    notes = []
    readers = {"settings": settings_in, "environment": environment.read, "result": read_result}
    if side.kind != RUN:
        del readers["result"]
    for what, read in readers.items():
        try:
            known[what] = read(run)
        except OutputError as error:
            notes.append(str(error).partition("; if you remove it")[0])
    return dataclasses.replace(side, **known, notes=tuple(notes))


def _with_settings(side: Side) -> Side:
    """A side with the settings that its newest checkpoint has, if it has no others."""
    if side.settings or not side.checkpoints:
        return side
    newest = side.checkpoints[max(side.checkpoints)]
    with contextlib.suppress(OutputError):  # whoever compares the checkpoint will say it
        return dataclasses.replace(side, settings=_settings_in(newest, contents_in(newest).texts))
    return side


def _settings_in(path: Path, texts: Mapping[str, str]) -> dict[str, Any]:
    return documents.from_toml(texts.get("config", ""), f"{path}: config")
