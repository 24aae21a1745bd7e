"""How a run begins, in a new directory or where it left off, and how its state is kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mpiml import documents
from mpiml.assemble import Run
from mpiml.build import Task, check_constants
from mpiml.config import Config
from mpiml.config import settings as all_settings
from mpiml.data.fingerprint import difference
from mpiml.data.normalize import Normalization
from mpiml.errors import DataError, OutputError
from mpiml.nn.parameters import Layout, Parameter
from mpiml.parallel.state import VALUES
from mpiml.run import checkpoint, environment, lock, log
from mpiml.run.checkpoint import Checkpoint
from mpiml.run.directory import (
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    METRICS,
    RunDirectory,
    read_result,
    sync_file,
    update_result,
    write_atomically,
    write_result,
)
from mpiml.run.metrics import entries, missing
from mpiml.run.verdict import on_rank_0
from mpiml.saved import CODE, settings_in, settings_of
from mpiml.setting import absolute, flag


def settings(asked: Config) -> tuple[Config, Config | None]:
    """The settings to start from: those asked for, or a stored run's, changed as asked; and the stored ones, if there
    are any. Rank 0 calls it.

    A run whose config.toml is gone has them in its checkpoints.
    """
    if not (asked.resume and asked.out):
        return asked, None
    path = Path(asked.out)
    stored, checkpoints = path / CONFIG, path / CHECKPOINTS
    if stored.exists():
        before = settings_in(stored)
    elif checkpoints.is_dir() and (newest := checkpoint.newest(checkpoints, lambda name: False)[0]):
        before = settings_of(newest, CODE, {name: getattr(asked, name) for name in asked.given or ()})
    else:
        return asked, None
    cfg = asked.resumed(before)
    if absolute(cfg.data) != absolute(before.data) and environment.data(path) is None:
        raise DataError(
            f"--data {cfg.data}: the run in {path} has {before.data}, and without its {ENVIRONMENT} nothing tells "
            "whether these are the same data"
        )
    return cfg, before


def check_saved(cfg: Config, layouts: Sequence[Layout]) -> None:
    """Raise OutputError if what the run is to begin with, its own checkpoints or else --init, is of another model:
    before anything is written, and before memory that only a damaged file asks for is. Rank 0 calls it."""
    needed = needed_kinds(layouts, (VALUES,))
    checkpoints = Path(cfg.out or "") / CHECKPOINTS
    if cfg.resume and checkpoints.is_dir() and checkpoint.listed(checkpoints):
        checkpoint.check_newest(checkpoints, needed)
    elif cfg.init:
        first = checkpoint.load(Path(cfg.init), lambda name: not name.startswith("optimizer."))
        checkpoint.check_kinds(first.origin, checkpoint.kinds_of(first.arrays), needed)


def finished(cfg: Config) -> dict[str, Any] | None:
    """The result of a run that has nothing left to do. Rank 0 calls it."""
    if not (cfg.resume and cfg.out and cfg.steps):
        return None
    result = read_result(Path(cfg.out))
    if result.get("status") != "done" or result.get("step", 0) < cfg.steps:
        return None
    if not cfg.quiet:
        print(f"{cfg.out} is finished after step {result['step']}: nothing to do", flush=True)
    return result | {"exit_code": 0}  # which is what "done" says, whatever else a file says


@dataclass
class Opened:
    """What every rank knows of the run directory: where it is, a token of this job, and what there is to say."""

    path: Path
    token: str
    notes: list[str]

    @property
    def metrics(self) -> Path:
        """One line per logged step and per evaluation."""
        return self.path / METRICS

    @property
    def checkpoints(self) -> Path:
        """The directory of checkpoints."""
        return self.path / CHECKPOINTS


@contextmanager
def opened(run: Run, name: str) -> Iterator[Opened]:
    """Hold the run directory, with all in it that is known at the start, for the length of a block; collective.

    Args:
        name: of the data set, for the name of a new directory.
    """
    ranks = run.grid.comm.gather(environment.of_rank(run.config.threads))
    held: list[RunDirectory] = []

    def take() -> Opened:
        held.append(RunDirectory.create(run.config.out, f"{name}-{run.config.model}", run.config.resume))
        path, job = held[0].path, environment.of_job(ranks or [], run.fingerprint)
        job, changes = environment.going_on(environment.read(path), job, checkpoint.last_step(path / CHECKPOINTS))
        notes = [f"warning: {text}" for text in (*environment.warnings(ranks or []), *changes)] + held[0].notes
        before = read_result(path)
        if before.get("status") == "running":
            notes.append("the last job in this directory ended without a word: killed, or its node failed")
        elif before.get("status") == "failed":
            notes.append(f"the last job in this directory failed: {before.get('reason')}")
        _check_same_data(run, path)
        _check_nothing_vanished(run.config, path, before)
        _begin(run, path, job)
        return Opened(path, held[0].token, notes)

    try:
        known: Opened = on_rank_0(run.grid.comm, run.clock, take)
        yield known
    finally:
        for directory in held:
            directory.close()


def _check_same_data(run: Run, path: Path) -> None:
    """Raise DataError if the run in a directory was trained on other data."""
    before = environment.data(path)
    if before and (other := difference(run.fingerprint, before, "in the run so far")):
        raise DataError(f"{run.config.data} holds other data than the run in {path} was trained on: {other}")


def _check_nothing_vanished(config: Config, path: Path, result: Mapping[str, Any]) -> None:
    """Raise OutputError if there is no checkpoint, though there was one: the run has stopped and saved, or its metrics
    go beyond the step of its first save, which was on disk before they did."""
    if checkpoint.listed(path / CHECKPOINTS):
        return
    stored = settings_in(path / CONFIG) if (path / CONFIG).exists() else config
    reached = max((entry["step"] for entry in entries(path / METRICS)), default=0)
    stopped = result.get("step", 0) if result.get("status") == "stopped" else 0
    if stopped or 0 < stored.save_every < reached:
        raise OutputError(
            f"the checkpoints in {path / CHECKPOINTS} are gone, for the run had come to step {max(stopped, reached)}: "
            f"put them back, or begin anew with another --out"
        )


def _begin(run: Run, path: Path, job: Mapping[str, Any]) -> None:
    write_atomically(path / CONFIG, run.config.to_toml())
    write_atomically(path / ENVIRONMENT, documents.to_json(job, indent=2) + "\n")
    running = {
        "status": "running",
        "exit_code": None,
        "reason": None,
        "rank": None,
        "step": 0,
        "ranks": run.grid.comm.size,
        "pipe": run.grid.stages,
        "microbatches": run.config.microbatches,
    }
    write_result(path, running)


def finish(run: Run, path: Path, outcome: Mapping[str, Any]) -> dict[str, Any]:
    """Write how the run ended; collective. Returns the whole result."""

    def write() -> dict[str, Any]:
        sync_file(path / METRICS)
        return update_result(path, outcome)

    result: dict[str, Any] = on_rank_0(run.grid.comm, run.clock, write)
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
    cfg, comm = run.config, run.grid.comm
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
    begin, names, saved = on_rank_0(comm, run.clock, read)
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
            raise OutputError(f"{found.origin} is of another run: {flag(field.name)} {theirs}, here {mine}")


def save(run: Run, step: int, directory: Opened) -> float:
    """Write a checkpoint, when the metrics so far are on disk; collective. Returns the seconds that it took.

    Raises DirectoryError, on all ranks alike, if another job has taken the directory.
    """
    began = time.monotonic()
    with run.clock.booked("checkpoint"):
        run.clock("joining")
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

        on_rank_0(run.grid.comm, run.clock, write)
    return time.monotonic() - began


def size(run: Run) -> int:
    """The bytes of a checkpoint."""
    return sum(layout.size * layout.dtype.itemsize for layout in run.layouts) * len(run.state.mine)


def digest(run: Run) -> str:
    """The SHA-256 of all weights in layer order, the same for every layout; collective."""
    with run.clock.booked("checkpoint"):
        run.clock("joining")
        stages = run.state.collect(VALUES)

        def computed() -> str:
            run.clock("checkpoint")
            return checkpoint.digest(named(run.layouts, stages, VALUES).items(), run.clock.progress)

        return on_rank_0(run.grid.comm, run.clock, computed)


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
