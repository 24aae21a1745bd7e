"""The state of a run: restored where it left off, or begun anew, and saved in the run's directory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mpiml.config import Config
from mpiml.config import settings as all_settings
from mpiml.data.dataset import Dataset
from mpiml.data.fingerprint import difference
from mpiml.errors import DataError, OutputError
from mpiml.flags import flag
from mpiml.parallel.state import VALUES
from mpiml.run import checkpoint, environment, step_files, verified
from mpiml.run.checkpoint import Checkpoint
from mpiml.run.deadline import Deadline
from mpiml.run.directory import CHECKPOINTS, CONFIG, sync_file
from mpiml.run.metrics import cut_after, gradient_noise, last_known, missing, scores
from mpiml.run.result import update_result
from mpiml.run.verified import Progress
from mpiml.training import accounts, first_values
from mpiml.training.arrays import from_arrays, needed_kinds, preparations, restore_constants, to_arrays
from mpiml.training.hold import Hold
from mpiml.training.look import Known
from mpiml.training.noise import Pair, averages_of
from mpiml.training.place import BuiltModel
from mpiml.training.rounds import Round
from mpiml.training.run import Run
from mpiml.training.saved import may_become, settings_of
from mpiml.training.task import Seen


def check_saved(cfg: Config, model: BuiltModel) -> None:
    """Raise OutputError if what the run is to begin with, its own checkpoints or else --init, is of another model:
    before anything is written, and before memory that only a damaged file asks for is. Rank 0 calls it."""
    if cfg.resume and _has_checkpoints(cfg):
        needed = needed_kinds(model.layouts, (VALUES,))
        checkpoint.check_newest(Path(cfg.out or "") / CHECKPOINTS, lambda saved: model.constants.check(saved, needed))
    elif cfg.init:
        from mpiml.training import init  # on one rank, of a few runs

        init.check(cfg, model)


def _has_checkpoints(cfg: Config) -> bool:
    checkpoints = Path(cfg.out or "") / CHECKPOINTS
    return checkpoints.is_dir() and bool(step_files.listed(checkpoints))


def known_data(cfg: Config, data: Dataset, hold: Hold, progress: Progress) -> Known:
    """What a run that is to go on knows of its data. Rank 0 calls it. `progress` is called while a checkpoint is read,
    which `hold` keeps until it is restored.

    Raises DataError if `data` are not the run's, OutputError for a run directory that is damaged.
    """
    if not cfg.resume:
        return Known()
    path = Path(cfg.out or "")
    before = environment.data(path)
    if before and (other := difference(data.fingerprint, before, "in the run so far")):
        raise DataError(f"{cfg.data} holds other data than the run in {path} was trained on: {other}")
    seen = Seen.of_json(environment.look(path)) if before and cfg.look != "all" else None
    if seen and not seen.is_of(data, cfg.classes, data.ignored(cfg.ignore)):
        seen = None
    before_model = None
    if (cfg.normalize or cfg.fill is not None) and _has_checkpoints(cfg):
        newest, _ = hold.newest(progress, again=True)
        if newest:
            _check_same_run(cfg, newest)
            before_model = preparations(newest, cfg, data.train.x.shape)
    return Known(seen, before_model)


class Restored(NamedTuple):
    """Where a run goes on.

    Attributes:
        step: the last one that is done; within a round of workers, the last before it.
        notes: what a person should know.
        history: the step of its checkpoint and the last results in its log, under the names of result.json.
        scores: (step, score) of each evaluation in its log, by what --best names.
        unscored: whether `step` has been saved, but its evaluation, which comes after that, is not in the log.
        noise: the averages of the gradient's noise in its log.
    """

    step: int
    notes: list[str]
    history: dict[str, Any]
    scores: list[tuple[int, float | None]]
    unscored: bool
    noise: Pair


class Store:
    """The state of a run in its directory. Every method is collective. `deadline` learns how long saving takes.

    Raises DirectoryError, on all ranks alike, where it would write and another job has taken the directory.
    """

    def __init__(self, run: Run, hold: Hold, deadline: Deadline):
        self.run, self.hold, self.deadline = run, hold, deadline
        self.team, self.clock = run.grid.team, run.grid.team.clock
        self._saved = 0  # the step of the last checkpoint
        states, layouts = len(run.state.names) - 1, run.model.layouts
        size = sum((layout.size + states * layout.updated) * layout.dtype.itemsize for layout in layouts)
        deadline.expect(size + sum(array.nbytes for array in run.model.constants.arrays.values()))

    def restore(self) -> Restored:
        """Put the state of the newest good checkpoint, or weights and constants of --init, in place."""
        run, progress = self.run, self.clock.progress
        layouts, constants = run.model.layouts, run.model.constants
        newest: list[tuple[Checkpoint | None, list[str]]] = []  # on rank 0, the one that is whole; problems of others
        stages: list[Mapping[str, Any]] = []  # on rank 0, of each stage its vectors
        changed: dict[str, Any] = {}  # on rank 0, the constants that are others than the model's

        def begins() -> bool:
            newest.append(self.hold.newest(progress))
            return bool(run.config.init) and not newest[0][0]

        self.clock("checkpoint")
        begun = self.team.on_rank_0(begins)
        of_init, notes_of_init = first_values.take(run, progress) if begun else ({}, [])

        def read() -> tuple[Restored, int, tuple[str, ...], dict[str, Any]]:
            saved, problems = newest.pop()
            names: tuple[str, ...] = ()
            given: Mapping[str, Any] = {}
            notes = [f"warning: skipped {problem}" for problem in problems]
            left = {name: saved.arrays[name] for name in accounts.NAMES if name in saved.arrays} if saved else {}
            if saved:
                _check_same_run(run.config, saved)
                names, given = run.learning.names(saved.step, bool(left)), saved.arrays
                if left:
                    accounts.check_left(left, saved.step, run.calendar, run.model.metric.columns, saved.origin)
                constants.check(saved.header, needed_kinds(layouts, names))
                stages.extend(from_arrays(layouts, saved, names))
            else:
                given, notes = of_init, [*notes, *notes_of_init]
            changed.update((name, given[name]) for name in constants.changed(given))
            # Nothing can be refused any more, so now the log may change.
            return self._cut_log(saved, bool(left), notes), saved.step if saved else 0, names, left

        start, self._saved, names, left = self.team.on_rank_0(read)
        if names:
            run.learning.begin(start.step + 1)
            run.learning.left = left or None
            run.learning.saved_state.distribute(stages, *names)
        restore_constants(constants, self.team, changed)
        self._remember(start)
        if start.step:  # the job before may have been killed before it did so
            self.team.on_rank_0(self._prune)
        return start

    def _remember(self, start: Restored) -> None:
        """Know what the run has learned from its log: which evaluations are the best, and how noisy gradients are."""
        for scored in start.scores:
            self.run.best.add(*scored)
        if self.run.noise:
            self.run.noise.averages = start.noise

    def _cut_log(self, saved: Checkpoint | None, left: bool, notes: list[str]) -> Restored:
        """Rank 0: cut the log to what was there when a checkpoint was written, or when the round began that was `left`
        then; without one, to nothing."""
        run, metrics, step = self.run, self.hold.metrics, saved.step if saved else 0
        cfg, round_ = run.config, run.calendar.round_of(max(step, 1))
        if left:
            notes.append(f"going on within the round of steps {round_[0]} to {round_[-1]}")
            step = round_[0] - 1
        due = run.calendar.due(step)
        entries, kept, damaged = cut_after(metrics, step, due.log, due.evaluation or step == cfg.steps)
        if saved:
            before = settings_of(saved, (), {})
            wait = before.average_every if before.eval_every else 0  # for the end of a round
            if lost := missing(entries, step, before.log_every, before.eval_every + wait):
                notes.append(f"warning: {metrics} has lost its lines of steps {lost[0]} to {lost[-1]}")
            notes += [] if left else [f"going on after step {step}"]
        elif cfg.resume:
            notes.append(f"no checkpoint in {self.hold.path} yet: starting at step 0")
        notes += damaged
        if saved and "init" in (cfg.given or ()):
            notes.append(f"--init {cfg.init} is not read: it is for a run's first step")
        scored = any("evaluation" in entry and entry["step"] == step for entry in kept)
        unscored = saved is not None and not left and due.evaluation and not scored
        history = last_known(kept, run.model.metric.name, cfg.evaluated) | ({"step": saved.step} if saved else {})
        noise = averages_of(gradient_noise(kept))
        return Restored(step, notes, history, scores(kept, run.best.name), unscored, noise)

    def save(self, step: int) -> None:
        """Write the checkpoint of a step, unless that is done, when the metrics so far are on disk."""
        if step != self._saved:
            self._write(step)

    def save_round(self, left: Round) -> int:
        """Write a checkpoint within a round that workers have left: of each of them, and how far it is. Returns its
        step, the last that all have done."""
        of_workers = accounts.arrays_of(left.workers, left.reported.logged, left.steps)
        self.run.learning.left = of_workers
        self._write(int(of_workers[accounts.STEPS].min()))
        return self._saved

    def _write(self, step: int) -> None:
        run, began = self.run, time.monotonic()
        state, left = run.learning.saved_state, run.learning.left or {}
        with self.clock.booked("checkpoint"):
            stages = state.collect()

            def write() -> None:
                self.clock("checkpoint")
                self.hold.check()
                sync_file(self.hold.metrics)
                model = run.model
                arrays = to_arrays(model.layouts, stages, *state.names) | dict(model.constants.arrays) | dict(left)
                for preparation in run.data.preparations:
                    arrays |= preparation.arrays()
                saved = Checkpoint(step, run.config.to_toml(), arrays, model.task.to_json(), model.constants.entries)
                kept = run.config.keep, self.clock.progress, run.best.steps
                checkpoint.save(self.hold.checkpoints, saved, *kept)
                update_result(self.hold.path, {"step": step, "saved": step} | run.best.result(self.hold.path))

            self.team.on_rank_0(write)
        self._saved = step
        if not left:
            self.deadline.saved(time.monotonic() - began)

    def save_best(self, step: int) -> None:
        """Save a step that is one of the best by now, and remove the checkpoints of those that no longer are."""
        self.save(step)

        def keep() -> None:
            self.hold.check()
            self._prune()
            update_result(self.hold.path, self.run.best.result(self.hold.path))

        self.team.on_rank_0(keep)

    def _prune(self) -> None:
        step_files.prune(self.hold.checkpoints, self._saved, self.run.config.keep, self.run.best.steps)

    def saved(self) -> dict[str, Any]:
        """The fields of result.json on checkpoints: the newest, and the best evaluation's."""
        best: dict[str, Any] = self.team.on_rank_0(lambda: self.run.best.result(self.hold.path))
        return {"saved": self._saved} | best

    def digest(self) -> str:
        """The SHA-256 of all weights in layer order, the same for every layout; within a round, of those before it."""
        run = self.run
        with self.clock.booked("checkpoint"):
            stages = run.learning.saved_state.collect(VALUES)

            def compute() -> str:
                self.clock("checkpoint")
                return verified.digest(to_arrays(run.model.layouts, stages, VALUES).items(), self.clock.progress)

            return self.team.on_rank_0(compute)

    def finish(self, outcome: Mapping[str, Any]) -> dict[str, Any]:
        """Write how the run ended. Returns the whole result."""

        def write() -> dict[str, Any]:
            self.hold.check()
            sync_file(self.hold.metrics)
            return update_result(self.hold.path, outcome)

        return self.team.on_rank_0(write)


def _check_same_run(cfg: Config, saved: Checkpoint) -> None:
    """Raise OutputError if a checkpoint has settings that these may not go on with."""
    stored = settings_of(saved, (), {})
    for field in all_settings():
        now, was = getattr(cfg, field.name), getattr(stored, field.name)
        if now != was and not may_become(stored, field, now):
            raise OutputError(
                f"{saved.origin} has {flag(field.name)} {was}, but {CONFIG} {now}: they are of different runs, or "
                f"{CONFIG} is damaged; if you remove it, --resume takes the checkpoint's settings"
            )
