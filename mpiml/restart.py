"""How a run begins, in a new directory or where it left off, and how its state is kept."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpi4py import MPI

from mpiml.assemble import Run
from mpiml.build import check_constants
from mpiml.clock import Clock
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
from mpiml.run.failure import Guard
from mpiml.run.terminal import say
from mpiml.run.verdict import on_rank_0
from mpiml.setting import flag
from mpiml.waiting import broadcast


def settings(asked: Config) -> Config:
    """The settings to start from: those asked for, or a stored run's, changed as asked. Rank 0 calls it.

    A run whose config.toml is gone has them in its checkpoints.
    """
    if not (asked.resume and asked.out):
        return asked
    stored, checkpoints = Path(asked.out) / CONFIG, Path(asked.out) / CHECKPOINTS
    if stored.exists():
        return asked.resumed(Config(**from_toml(stored)))
    newest = checkpoint.newest(checkpoints)[0] if checkpoints.is_dir() else None
    return asked.resumed(of_checkpoint(newest.config)) if newest else asked


def check_init(run: Run) -> None:
    """Raise OutputError or ConfigError if --init cannot be used: before anything is written. Rank 0 calls it."""
    if run.config.init:
        vectors(run.layouts, checkpoint.load(Path(run.config.init)), (VALUES,))


@dataclass
class Opened:
    """What every rank knows of the run directory: where it is, and what there is to say."""

    path: Path
    notes: list[str]

    @property
    def metrics(self) -> Path:
        """One line per logged step and per evaluation."""
        return self.path / METRICS

    @property
    def checkpoints(self) -> Path:
        """The directory of checkpoints."""
        return self.path / CHECKPOINTS


class Hold:
    """The run directory of a job. Rank 0 holds it: on a resume before anything can be refused, so that result.json
    never tells of the job before; and until all is written, how the job failed too. Collective.

    Args:
        guard: is told where it is.
    """

    def __init__(self, comm: MPI.Intracomm, clock: Clock, guard: Guard):
        self.comm, self.clock, self.guard = comm, clock, guard
        self._directory: RunDirectory | None = None  # on rank 0
        self._before: dict[str, Any] = {}  # the result of the job before

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *error: object) -> None:
        if self._directory:
            self._directory.close()

    def resumed(self, asked: Config) -> tuple[Config, dict[str, Any] | None]:
        """The settings of the run that `asked` goes on with, and its result if nothing is left to do."""
        if not asked.resume:
            return asked, None

        def look() -> tuple[Config, dict[str, Any] | None]:
            path, done = Path(asked.out or ""), None
            try:
                cfg = settings(asked)
                done = _finished(cfg, read_result(path))
            finally:
                if not done and asked.out and holds_run(path):
                    self._take(RunDirectory.create(asked.out, "", resume=True))
            return cfg, done

        cfg, done = on_rank_0(self.comm, self.clock, look)
        self._tell()
        return cfg, done

    def finished(self, cfg: Config) -> dict[str, Any] | None:
        """The result of a run that, as is known only by now, has nothing left to do."""

        def look() -> dict[str, Any] | None:
            done = _finished(cfg, self._before)
            if done and self._directory:
                write_result(self._directory.path, done)
            return done

        done: dict[str, Any] | None = on_rank_0(self.comm, self.clock, look)
        return done

    def opened(self, run: Run, name: str) -> Opened:
        """The directory, with all in it that is known at the start.

        Args:
            name: of the data set, for the name of a new directory.
        """
        ranks = self.comm.gather(environment.of_rank(run.config.threads))

        def write() -> Opened:
            config = run.config
            directory = self._directory or RunDirectory.create(config.out, f"{name}-{config.model}", config.resume)
            if not self._directory:
                self._take(directory)
            path = directory.path
            _check_same_data(run, path)
            write_result(path, read_result(path) | {"pipe": config.pipe, "microbatches": config.microbatches})
            write_atomically(path / CONFIG, config.to_toml())
            write_atomically(path / ENVIRONMENT, environment.to_json(ranks or [], run.fingerprint))
            warnings = [f"warning: {text}" for text in environment.warnings(ranks or [])]
            return Opened(path, [*warnings, *_notes(self._before)])

        known: Opened = on_rank_0(self.comm, self.clock, write)
        self._tell()
        return known

    def _take(self, directory: RunDirectory) -> None:
        """Rank 0: from now on this job's fate is written there."""
        self._directory, self._before = directory, read_result(directory.path)
        self.guard.run, self.guard.token = directory.path, f"{os.getpid()}-{time.time_ns()}"
        running = {"status": "running", "exit_code": None, "reason": None, "rank": None, "step": 0}
        write_result(directory.path, running | {"ranks": self.comm.size})

    def _tell(self) -> None:
        with self.clock.doing("joining"):
            self.guard.run, self.guard.token = broadcast(self.comm, (self.guard.run, self.guard.token))


def _finished(cfg: Config, result: dict[str, Any]) -> dict[str, Any] | None:
    """The result of the job before, if there is nothing left to do."""
    if not (cfg.out and cfg.steps) or result.get("status") != "done" or result.get("step", 0) < cfg.steps:
        return None
    if not cfg.quiet:
        say(f"{cfg.out} is finished after step {result['step']}: nothing to do", sys.stdout)
    return result


def _notes(before: Mapping[str, Any]) -> list[str]:
    """What a person should know of the job before, by its result."""
    if before.get("status") == "running":
        return ["the last job in this directory ended without a word: killed, or its node failed"]
    if before.get("status") == "failed":
        return [f"the last job in this directory failed: {before.get('reason')}"]
    return []


def _check_same_data(run: Run, path: Path) -> None:
    """Raise DataError if the run in a directory was trained on other data."""
    before = environment.data(path)
    if before and (other := difference(run.fingerprint, before, "in the run so far")):
        raise DataError(f"{run.config.data} has changed since the run in {path} began: {other}")


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
        stages = run.state.collect()

        def write() -> None:
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
