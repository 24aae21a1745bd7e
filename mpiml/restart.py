"""How a run begins, in a new directory or where it left off, and how its state is kept."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpiml.assemble import Run
from mpiml.build import check_constants
from mpiml.config import Config, from_toml, of_checkpoint
from mpiml.config import settings as all_settings
from mpiml.data.fingerprint import difference
from mpiml.data.normalize import Normalization
from mpiml.errors import DataError, OutputError
from mpiml.nn.parameters import Layout
from mpiml.parallel.state import VALUES
from mpiml.run import checkpoint, environment, log
from mpiml.run.checkpoint import Checkpoint
from mpiml.run.directory import (
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    METRICS,
    RunDirectory,
    holds_run,
    read_result,
    write_atomically,
    write_result,
)
from mpiml.run.verdict import on_rank_0
from mpiml.setting import absolute, flag


def settings(asked: Config) -> Config:
    """The settings to start from: those asked for, or a stored run's, changed as asked. Rank 0 calls it.

    A run whose config.toml is gone has them in its checkpoints.
    """
    if not (asked.resume and asked.out):
        return asked
    path = Path(asked.out)
    stored, checkpoints = path / CONFIG, path / CHECKPOINTS
    if stored.exists():
        before = Config(**from_toml(stored))
    elif newest := checkpoint.newest(checkpoints)[0] if checkpoints.is_dir() else None:
        before = of_checkpoint(newest.config)
    else:
        return asked
    cfg = asked.resumed(before)
    if absolute(cfg.data) != absolute(before.data) and environment.data(path) is None:
        raise DataError(
            f"--data {cfg.data}: the run in {path} has {before.data}, and without its {ENVIRONMENT} nothing tells "
            "whether these are the same data"
        )
    return cfg


def check_init(run: Run) -> None:
    """Raise OutputError or ConfigError if the weights of --init are needed and cannot be used: before anything is
    written. Rank 0 calls it."""
    cfg = run.config
    checkpoints = Path(cfg.out or "") / CHECKPOINTS
    if cfg.init and not (cfg.resume and checkpoints.is_dir() and checkpoint.listed(checkpoints)):
        vectors(run.layouts, checkpoint.load(Path(cfg.init)), (VALUES,))


def busy(cfg: Config, ranks: int) -> int:
    """How many of `ranks` have work: all of them, unless a run goes on that has fewer micro-batches than they would
    make replicas. Rank 0 calls it."""
    goes_on = cfg.resume and cfg.out and holds_run(Path(cfg.out))
    return min(ranks, cfg.pipe * cfg.microbatches) if goes_on and cfg.microbatches else ranks


def finished(cfg: Config) -> dict[str, Any] | None:
    """The result of a run that has nothing left to do. Rank 0 calls it."""
    if not (cfg.resume and cfg.out and cfg.steps):
        return None
    result = read_result(Path(cfg.out))
    if result.get("status") != "done" or result.get("step", 0) < cfg.steps:
        return None
    if not cfg.quiet:
        print(f"{cfg.out} is finished after step {result['step']}: nothing to do", flush=True)
    return result


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
        notes = [f"warning: {text}" for text in (*environment.warnings(ranks or []), *changes)]
        before = read_result(path)
        if before.get("status") == "running":
            notes.append("the last job in this directory ended without a word: killed, or its node failed")
        elif before.get("status") == "failed":
            notes.append(f"the last job in this directory failed: {before.get('reason')}")
        _check_same_data(run, path)
        _begin(run, path, job)
        return Opened(path, f"{os.getpid()}-{time.time_ns()}", notes)

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


def _begin(run: Run, path: Path, job: Mapping[str, Any]) -> None:
    write_atomically(path / CONFIG, run.config.to_toml())
    write_atomically(path / ENVIRONMENT, json.dumps(job, indent=2) + "\n")
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
        result = {**read_result(path), **outcome}
        write_result(path, result)
        return result

    result: dict[str, Any] = on_rank_0(run.grid.comm, run.clock, write)
    return result


def restore(run: Run, path: Path) -> tuple[int, list[str], dict[str, Any]]:
    """Put the state of the newest good checkpoint, or the weights of --init, in place; collective.

    Returns the step after which it was saved, what there is to say, and what the log knows of the run so far.
    """
    cfg, comm = run.config, run.grid.comm
    whole: list[Mapping[str, Any]] = []

    def read() -> tuple[int, list[str], dict[str, Any], tuple[str, ...], Normalization | None]:
        found, notes, history, saved = None, [], {}, None
        if cfg.resume:
            found, problems = checkpoint.newest(path / CHECKPOINTS)
            notes += [f"warning: skipped {problem}" for problem in problems]
            notes.append(
                f"going on after step {found.step}" if found else f"no checkpoint in {path} yet: starting at step 0"
            )
            if found and "init" in (cfg.given or ()):
                notes.append(f"--init {cfg.init} is not read: it is for a run's first step")
            step = found.step if found else 0
            entries = log.cut(path / METRICS, step, run.steps, cfg.eval_every, cfg.log_every)
            history = log.last_known(entries, run.metric.name)
        step, names = (found.step, tuple(run.state.mine)) if found else (0, ())
        if not found and cfg.init:
            found, names = checkpoint.load(Path(cfg.init)), (VALUES,)
            notes.append(f"first weights from {cfg.init}")
        if found:
            if step:
                _check_same_run(cfg, of_checkpoint(found.config))
                check_constants(run.constants, found.constants)
            if step and run.normalization:
                saved = Normalization.of_arrays(found.arrays)
            whole.extend(vectors(run.layouts, found, names))
        return step, notes, history, names, saved

    run.clock("checkpoint")
    step, notes, history, names, saved = on_rank_0(comm, run.clock, read)
    if saved and run.normalization:
        run.normalization.take(saved)
    if names:
        run.state.distribute(whole, *names)
    return step, notes, history


def _check_same_run(cfg: Config, saved: Config) -> None:
    for field in all_settings():
        mine, theirs = getattr(cfg, field.name), getattr(saved, field.name)
        if mine != theirs and not field.metadata["on_resume"]:
            raise OutputError(f"the newest checkpoint is of another run: {flag(field.name)} {theirs}, here {mine}")


def save(run: Run, step: int, directory: Path) -> float:
    """Write a checkpoint; collective. Returns the seconds that it took."""
    began = time.monotonic()
    with run.clock.booked("checkpoint"):
        run.clock("joining")
        stages = run.state.collect()

        def write() -> None:
            run.clock("checkpoint")
            arrays = named(run.layouts, stages, *run.state.mine)
            if run.normalization:
                arrays |= run.normalization.arrays()
            saved = Checkpoint(step, run.config.to_toml(), arrays, run.task.to_json(), run.constants)
            checkpoint.save(directory, saved, run.config.keep)

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
        return on_rank_0(
            run.grid.comm, run.clock, lambda: checkpoint.digest(named(run.layouts, stages, VALUES).items())
        )


def named(layouts: Sequence[Layout], stages: Sequence[Mapping[str, Any]], *names: str) -> dict[str, Any]:
    """All stages' vectors as arrays: weights under their names, state NAME as optimizer.NAME.(weight's name).

    Statistics, which no optimizer changes, have no state.
    """
    arrays: dict[str, Any] = {}
    for vector in names:
        prefix = "" if vector == VALUES else f"optimizer.{vector}."
        for layout, vectors_of_stage in zip(layouts, stages, strict=True):
            views = layout.views(vectors_of_stage[vector])
            arrays |= {prefix + p.name: view for p, view in views if vector == VALUES or p.momentum is None}
    return arrays


def vectors(layouts: Sequence[Layout], found: Checkpoint, names: Sequence[str]) -> list[Mapping[str, Any]]:
    """The reverse of `named`, for some vectors. Raises OutputError if the checkpoint is of another model."""
    stages = [{name: layout.zeros() for name in names} for layout in layouts]
    for name, target in named(layouts, stages, *names).items():
        target[...] = checkpoint.array(found, name, target.shape, target.dtype)
    return list(stages)
