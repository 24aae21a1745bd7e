"""The run directory of a job: which run it is, who holds it, and what stands there from the start."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpiml import documents
from mpiml.config import FALLING, Config
from mpiml.errors import DataError, OutputError
from mpiml.run import checkpoint, environment, jobs, lock, step_files
from mpiml.run.console import say
from mpiml.run.directory import CHECKPOINTS, CONFIG, ENVIRONMENT, METRICS, RunDirectory, holds_run, write_atomically
from mpiml.run.failure import Guard
from mpiml.run.one_job import mpi_library
from mpiml.run.result import Result, read_result, write_result
from mpiml.run.streams import Diverted
from mpiml.team import Team
from mpiml.training.resolve import absolute
from mpiml.training.run import Run
from mpiml.training.saved import CODE, resumed, settings_in, settings_of

ENOUGH = ("patience", "best", "eval_every", "steps")  # settings by which evaluations are enough
RUNNING: Result = {"status": "running", "exit_code": None, "reason": None, "rank": None}


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
    cfg = resumed(asked, before)
    if before.steps and checkpoints.is_dir():  # which may have done more steps before it was to end sooner
        before = before.replace(steps=max(before.steps, step_files.last_step(checkpoints)))
    if absolute(cfg.data) != absolute(before.data) and environment.data(path) is None:
        raise DataError(
            f"--data {cfg.data}: the run in {path} has {before.data}, and without its {ENVIRONMENT} it is "
            "not known whether these are the same data"
        )
    return cfg, before


class Hold:
    """The run directory of a job, locked by rank 0; every method is collective.

    On a resume it is locked before anything can be refused, so that result.json shows how this job failed and not how
    the last one ended. It is let go last, after a failure has been written. From `resumed` or `opened` on, all ranks'
    guards know where it is, and the token of this job.
    """

    def __init__(self, guard: Guard):
        self.guard = guard
        self._directory: RunDirectory | None = None  # on rank 0
        self._before: dict[str, Any] = {}  # the result of the job before
        self._diverted: Diverted | None = None  # what this rank prints, once all ranks have tried that
        self._printed: list[str] | None = None  # what a person should know of it, from then on

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *error: object) -> None:
        if self._diverted:
            self._diverted.close()
        if self._directory:
            self._directory.close()

    @property
    def path(self) -> Path:
        """The directory."""
        assert self.guard.run, "it has been opened"
        return self.guard.run

    @property
    def metrics(self) -> Path:
        """One line per logged step and per evaluation."""
        return self.path / METRICS

    @property
    def checkpoints(self) -> Path:
        """The directory of checkpoints."""
        return self.path / CHECKPOINTS

    def check(self) -> None:
        """Rank 0: raise DirectoryError if another job has taken the directory."""
        lock.check(self.path, self.guard.token)

    def resumed(self, asked: Config) -> tuple[Config, Config | None, dict[str, Any] | None]:
        """The settings to start from; the stored ones, or None; and the result if nothing is left to do.

        If something is, the directory is held from here on.
        """
        if not asked.resume:
            return asked, None, None

        def look() -> tuple[Config, Config | None, dict[str, Any] | None]:
            path, done = Path(asked.out or ""), None
            try:
                cfg, stored = settings(asked)
                same = not stored or all(getattr(cfg, name) == getattr(stored, name) for name in FALLING)
                done = _finished(cfg, read_result(path), stored) if same else None  # a rate for more steps
            finally:
                if not done and path.is_dir() and holds_run(path):
                    self._take(RunDirectory(asked.out), resume=True)
            return cfg, stored, done

        cfg, stored, done = self.guard.team.on_rank_0(look)
        self._tell(self.guard.team, asked)
        return cfg, stored, done

    def finished(self, team: Team, cfg: Config, stored: Config | None) -> dict[str, Any] | None:
        """The result of a run that, as is known only by now, has nothing left to do; collective over `team`. `stored`
        as from `resumed`."""

        def look() -> dict[str, Any] | None:
            done = _finished(cfg, self._before, stored)
            if done and self._directory:
                write_result(self._directory.path, done)
            return done

        done: dict[str, Any] | None = team.on_rank_0(look)
        return done

    def opened(self, run: Run, name: str) -> list[str]:
        """Hold the directory, of which nothing but its result is written yet; a new one is called after the data set's
        `name`. Collective over the run's ranks.

        Returns what a person should know of the directory and the job before. Raises OutputError, on all ranks alike,
        if its run has lost its checkpoints.
        """
        config = run.config

        def look() -> list[str]:
            if not self._directory:
                self._take(RunDirectory(config.out, f"{name}-{config.model}"), config.resume)
            assert self._directory, "it has just been taken"
            path = self._directory.path
            _check_nothing_vanished(path, self._before)
            return [*self._directory.notes, *_notes(self._before)]

        notes = run.grid.team.on_rank_0(look)
        self._tell(run.grid.team, config)
        return [*notes, *(self._printed or [])]

    def begun(self, run: Run, after: int) -> list[str]:
        """Write what is known at the start, when nothing can be refused any more, of a job that goes on after a step;
        collective over the run's ranks.

        Returns what a person should know of the job.
        """
        comm, config, clock = run.grid.comm, run.config, run.grid.team.clock
        here = environment.of_rank(config.threads, run.model.device.name)
        with clock.doing("joining"):
            ranks = comm.gather(here)

        def write() -> list[str]:
            path = self.path
            look = vars(run.data.seen) if run.data.seen else None
            job = environment.of_job(ranks or [], mpi_library(), run.data.fingerprint, look)
            before = environment.read(path)
            job, changes = environment.going_on(before, job, step_files.last_step(self.checkpoints))
            order = run.data.shards
            epochs = order.steps_per_epoch, order.rows_per_step
            job["jobs"] = jobs.with_job(before, after, comm.size, config.pipe, *epochs)
            saved = self._before.get("saved", 0)
            of_run = {"ranks": comm.size, "pipe": config.pipe, "microbatches": config.microbatches}
            write_result(path, RUNNING | {"step": saved, "saved": saved} | of_run | run.best.result(path))
            write_atomically(path / CONFIG, config.to_toml())
            write_atomically(path / ENVIRONMENT, documents.to_json(job, indent=2) + "\n")
            return [f"warning: {text}" for text in (*environment.warnings(ranks or []), *changes)]

        return run.grid.team.on_rank_0(write)

    def _take(self, directory: RunDirectory, resume: bool) -> None:
        """Rank 0: from now on this job's fate is written there."""
        self._directory = directory
        self._before = read_result(directory.path)
        self.guard.run, self.guard.token = directory.path, directory.token
        directory.prepare(resume)
        before = {key: value for key, value in self._before.items() if key != "traceback"}
        write_result(directory.path, {"step": 0, "saved": 0} | before | RUNNING)

    def _tell(self, team: Team, config: Config) -> None:
        self.guard.run, self.guard.token = team.broadcast((self.guard.run, self.guard.token))
        if config.rank_log and self.guard.run and self._printed is None:
            from mpiml.run import rank_log  # in few runs

            self._diverted, self._printed = rank_log.divert(team, self.guard.run)


def _finished(cfg: Config, result: dict[str, Any], stored: Config | None = None) -> dict[str, Any] | None:
    """The result of the job before, if there is nothing left to do: the last step is done, or by the `stored` settings,
    and so by these, its evaluations were enough."""
    if not (cfg.out and cfg.steps) or result.get("status") != "done":
        return None
    reason = result.get("reason")
    enough = reason and stored and all(getattr(cfg, name) == getattr(stored, name) for name in ENOUGH)
    if result.get("step", 0) < cfg.steps and not enough:
        return None
    if not cfg.quiet:
        why = f" ({reason})" if reason else ""
        say(f"{cfg.out} is finished after step {result['step']}{why}: nothing to do", sys.stdout)
    return result | {"exit_code": 0}  # which is what "done" says, whatever else a file says


def _notes(before: Mapping[str, Any]) -> list[str]:
    """What a person should know of the job before, by its result."""
    if before.get("status") == "running":
        return ["the last job in this directory ended without a word: killed, or its node failed"]
    if before.get("status") == "failed":
        return [f"the last job in this directory failed: {before.get('reason')}"]
    return []


def _check_nothing_vanished(path: Path, before: Mapping[str, Any]) -> None:
    """Raise OutputError if the checkpoints are gone: the result of the last job says that there was one."""
    if before.get("saved") and not step_files.listed(path / CHECKPOINTS):
        raise OutputError(
            f"the checkpoints in {path / CHECKPOINTS} are gone, of which the last was of step {before['saved']}: put "
            "them back, or begin anew with another --out"
        )
