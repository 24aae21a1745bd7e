"""How a run begins anew or where it left off, and how its state is kept."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpiml.config import Config
from mpiml.config import settings as all_settings
from mpiml.data.normalize import Normalization
from mpiml.errors import OutputError
from mpiml.flags import flag
from mpiml.nn.parameters import Layout, Parameter
from mpiml.parallel.state import VALUES
from mpiml.run import checkpoint, lock, log
from mpiml.run.checkpoint import Checkpoint
from mpiml.run.directory import CHECKPOINTS, CONFIG, METRICS, sync_file, update_result
from mpiml.run.metrics import entries, missing
from mpiml.training.hold import Opened
from mpiml.training.model import check_constants
from mpiml.training.run import Run
from mpiml.training.saved import settings_of
from mpiml.training.task import Task


def check_saved(cfg: Config, layouts: Sequence[Layout]) -> None:
    """Raise OutputError if what the run is to begin with, its own checkpoints or else --init, is of another model:
    before anything is written, and before memory that only a damaged file asks for is. Rank 0 calls it."""
    needed = needed_kinds(layouts, (VALUES,))
    checkpoints = Path(cfg.out or "") / CHECKPOINTS
    if cfg.resume and checkpoints.is_dir() and checkpoint.listed(checkpoints):
        checkpoint.check_newest(checkpoints, needed)
    elif cfg.init:
        checkpoint.check_kinds(cfg.init, checkpoint.kinds(Path(cfg.init)), needed)


def finish(run: Run, directory: Opened, outcome: Mapping[str, Any]) -> dict[str, Any]:
    """Write how the run ended; collective. Returns the whole result.

    Raises DirectoryError, on all ranks alike, if another job has taken the directory.
    """

    def write() -> dict[str, Any]:
        lock.check(directory.path, directory.token)
        sync_file(directory.metrics)
        return update_result(directory.path, outcome)

    result: dict[str, Any] = run.grid.team.on_rank_0(write)
    return result


class Restored(NamedTuple):
    """Where a run goes on.

    Attributes:
        step: the last one that is done.
        notes: what a person should know.
        history: the last results in its log, under the names of result.json.
        unscored: whether `step` has been saved, but its evaluation, which comes after that, is not in the log.
    """

    step: int
    notes: list[str]
    history: dict[str, Any]
    unscored: bool


def restore(run: Run, path: Path) -> Restored:
    """Put the state of the newest good checkpoint, or the weights of --init, in place; collective."""
    cfg = run.config
    whole: list[Mapping[str, Any]] = []

    def read() -> tuple[Restored, tuple[str, ...], Normalization | None]:
        found, begin, saved = None, Restored(0, [], {}, False), None
        if cfg.resume:
            found, problems = checkpoint.newest(path / CHECKPOINTS, moved=run.clock.progress)
            begin = _log_so_far(run, path, found, [f"warning: skipped {problem}" for problem in problems])
        names = tuple(run.state.mine) if found else ()
        if found and "init" in (cfg.given or ()):
            begin.notes.append(f"--init {cfg.init} is not read: it is for a run's first step")
        if not found and cfg.init:
            found, names = checkpoint.load(Path(cfg.init), moved=run.clock.progress), (VALUES,)
            begin.notes.append(f"first weights from {cfg.init}")
        if found:
            if begin.step:
                _check_same_run(cfg, found)
                check_constants(run.constants, found)
            if begin.step and run.normalization:
                saved = normalization(found, run.task)
            whole.extend(vectors(run.layouts, found, names))
        return begin, names, saved

    run.clock("checkpoint")
    begin, names, saved = run.grid.team.on_rank_0(read)
    if saved and run.normalization:
        run.normalization.take(saved)
    if names:
        run.state.distribute(whole, *names)
    return begin


def _log_so_far(run: Run, path: Path, found: Checkpoint | None, notes: list[str]) -> Restored:
    """The log, cut to what was there when a checkpoint was written; without one, to nothing."""
    cfg, metrics, step = run.config, path / METRICS, found.step if found else 0
    if found:
        its = settings_of(found, (), {})
        if lost := missing(entries(metrics), step, its.log_every, its.eval_every):
            notes.append(f"warning: {metrics} has lost its lines of steps {lost[0]} to {lost[-1]}")
    notes.append(f"going on after step {step}" if found else f"no checkpoint in {path} yet: starting at step 0")
    kept, damaged = log.cut(metrics, step, run.steps, cfg.eval_every, cfg.log_every)
    scored = any("evaluation" in entry and entry["step"] == step for entry in kept)
    unscored = found is not None and run.due(step).evaluation and not scored
    return Restored(step, notes + damaged, log.last_known(kept, run.metric.name), unscored)


def _check_same_run(cfg: Config, found: Checkpoint) -> None:
    saved = settings_of(found, (), {})
    for field in all_settings():
        mine, theirs = getattr(cfg, field.name), getattr(saved, field.name)
        if mine != theirs and not saved.may_become(field, mine):
            raise OutputError(
                f"{found.origin} has {flag(field.name)} {theirs}, but {CONFIG} {mine}: they are of different runs, or "
                f"{CONFIG} is damaged; if you remove it, --resume takes the checkpoint's settings"
            )


def save(run: Run, step: int, directory: Opened) -> float:
    """Write a checkpoint, when the metrics so far are on disk; collective. Returns the seconds that it took.

    Raises DirectoryError, on all ranks alike, if another job has taken the directory.
    """
    began = time.monotonic()
    with run.clock.booked("checkpoint"):
        stages = run.state.collect()

        def write() -> None:
            run.clock("checkpoint")
            lock.check(directory.path, directory.token)
            sync_file(directory.metrics)
            arrays = named(run.layouts, stages, *run.state.mine)
            if run.normalization:
                arrays |= run.normalization.arrays()
            saved = Checkpoint(step, run.config.to_toml(), arrays, run.task.to_json(), run.constants)
            checkpoint.save(directory.checkpoints, saved, run.config.keep, run.clock.progress)
            update_result(directory.path, {"step": step, "saved": step})

        run.grid.team.on_rank_0(write)
    return time.monotonic() - began


def size(run: Run) -> int:
    """The bytes of a checkpoint."""
    return sum(layout.size * layout.dtype.itemsize for layout in run.layouts) * len(run.state.mine)


def digest(run: Run) -> str:
    """The SHA-256 of all weights in layer order, the same for every layout; collective."""
    with run.clock.booked("checkpoint"):
        stages = run.state.collect(VALUES)

        def computed() -> str:
            run.clock("checkpoint")
            return checkpoint.digest(named(run.layouts, stages, VALUES).items(), run.clock.progress)

        return run.grid.team.on_rank_0(computed)


def named(layouts: Sequence[Layout], stages: Sequence[Mapping[str, Any]], *names: str) -> dict[str, Any]:
    """All stages' vectors as arrays: weights under their names, state NAME as optimizer.NAME.(weight's name)."""
    arrays: dict[str, Any] = {}
    for vector in names:
        for layout, vectors_of_stage in zip(layouts, stages, strict=True):
            name_of = _names(layout, vector)
            arrays |= {name_of[p]: view for p, view in layout.views(vectors_of_stage[vector]) if p in name_of}
    return arrays


def needed_kinds(layouts: Sequence[Layout], names: Sequence[str]) -> dict[str, checkpoint.Kind]:
    """Of what kind the arrays of `named` are."""
    return {
        name: (layout.dtype.name, p.shape)
        for vector in names
        for layout in layouts
        for p, name in _names(layout, vector).items()
    }


def _names(layout: Layout, vector: str) -> dict[Parameter, str]:
    """What the arrays of a vector are called in a checkpoint. Statistics, which no optimizer changes, have no state."""
    prefix = "" if vector == VALUES else f"optimizer.{vector}."
    return {p: prefix + p.name for p in layout.parameters if vector == VALUES or p.momentum is None}


def vectors(layouts: Sequence[Layout], found: Checkpoint, names: Sequence[str]) -> list[Mapping[str, Any]]:
    """The reverse of `named`, for some vectors. Raises OutputError if the checkpoint is of another model."""
    checkpoint.check_kinds(found.origin, checkpoint.kinds_of(found.arrays), needed_kinds(layouts, names))
    stages = [{name: layout.zeros() for name in names} for layout in layouts]
    for name, target in named(layouts, stages, *names).items():
        target[...] = found.arrays[name]
    return list(stages)


def normalization(found: Checkpoint, task: Task) -> Normalization:
    """What a checkpoint's model normalises its inputs by. Raises OutputError if that is missing or of other inputs."""
    arrays = {name: array for name, array in found.arrays.items() if name.startswith("data.")}
    checkpoint.check_kinds(
        found.origin, checkpoint.kinds_of(arrays), dict.fromkeys(Normalization.NAMES, ("float64", task.shape))
    )
    return Normalization.of_arrays(arrays)
