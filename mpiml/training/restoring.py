"""What a run begins with: where its newest good checkpoint left off, weights of --init, or first values."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from mpiml.config import Config
from mpiml.config import settings as all_settings
from mpiml.data.dataset import Dataset
from mpiml.data.fingerprint import difference
from mpiml.errors import DataError, OutputError
from mpiml.flags import flag
from mpiml.parallel.state import VALUES
from mpiml.run import checkpoint, environment, shared_file, step_files
from mpiml.run.checkpoint import Checkpoint
from mpiml.run.contents import Contents
from mpiml.run.directory import CHECKPOINTS, CONFIG
from mpiml.run.metrics import cut_after, gradient_noise, last_known, missing, scores
from mpiml.run.segments import Segment
from mpiml.run.verified import Progress
from mpiml.training import accounts, first_values
from mpiml.training.arrays import needed_kinds, preparations, restore_constants, segments
from mpiml.training.hold import Hold
from mpiml.training.look import Known
from mpiml.training.noise import Pair, averages_of
from mpiml.training.place import BuiltModel
from mpiml.training.run import Run
from mpiml.training.saved import may_become, settings_of
from mpiml.training.task import Seen

SMALL = "data.", "round."  # how names begin of a checkpoint's arrays that are not parts of vectors


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
    """What a run that is to go on knows of its data. Rank 0 calls it. `progress` is called while a checkpoint is read.

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
        newest, _ = checkpoint.newest(hold.checkpoints, lambda name: name.startswith("data."), progress)
        if newest:
            _check_same_run(cfg, newest)
            before_model = preparations(newest, cfg, data.train.x.shape)
    return Known(seen, before_model)


class Restored(NamedTuple):
    """Where a run goes on.

    Attributes:
        step: the last one that is done; within a round of workers, the last before it.
        saved: the step of its checkpoint, 0 if there is none.
        notes: what a person should know.
        history: the step of its checkpoint and the last results in its log, under the names of result.json.
        scores: (step, score) of each evaluation in its log, by what --best names.
        unscored: whether `step` has been saved, but its evaluation, which comes after that, is not in the log.
        noise: the averages of the gradient's noise in its log.
    """

    step: int
    saved: int
    notes: list[str]
    history: dict[str, Any]
    scores: list[tuple[int, float | None]]
    unscored: bool
    noise: Pair


class Continuation(NamedTuple):
    """A checkpoint to go on from, as all ranks know it.

    Attributes:
        start: the last step that is done; of a round that was left, the last before it.
        names: of its vectors.
        left: the arrays of a round that was left; empty if none was.
    """

    path: Path
    contents: Contents
    start: int
    names: tuple[str, ...]
    left: Mapping[str, NDArray[Any]]


class Restoring:
    """Puts the state of the newest good checkpoint, or weights and constants of --init, in place."""

    def __init__(self, run: Run, hold: Hold, first_node: int):
        """`first_node` as of shared_file.load."""
        self.run, self.hold, self.team, self.first_node = run, hold, run.grid.team, first_node
        self.progress = self.team.clock.progress
        # On rank 0: the checkpoint, without vectors, and what is to be said.
        self._saved: Checkpoint | None = None
        self._problems: list[str] = []
        self._notes: list[str] = []

    def restore(self) -> Restored:
        """Put it in place; collective."""
        self.team.clock("checkpoint")
        for path in self.team.on_rank_0(lambda: step_files.listed(self.hold.checkpoints)):
            source = self.team.on_rank_0(functools.partial(self._source, path))
            if source and self._read(source):
                break
        else:
            self.team.on_rank_0(self._check_none)
            if self.run.config.init:
                self._init()
        # Nothing can be refused any more, so now the log may change.
        return self.team.on_rank_0(self._cut_log)

    def _source(self, path: Path) -> Continuation | None:
        """Rank 0: what a checkpoint is, all of which but vectors is read and verified; None if it is damaged."""
        run, layouts, constants = self.run, self.run.model.layouts, self.run.model.constants
        try:
            saved = checkpoint.load(
                path, lambda name: name in constants.arrays or name.startswith(SMALL), self.progress
            )
        except OutputError as error:
            self._problems.append(str(error))
            return None
        _check_same_run(run.config, saved)
        left = {name: saved.arrays[name] for name in accounts.NAMES if name in saved.arrays}
        if left:
            accounts.check_left(left, saved.step, run.calendar, run.model.metric.columns, saved.origin)
        self._saved, names = saved, run.learning.names(saved.step, bool(left))
        constants.check(saved.header, needed_kinds(layouts, names))
        start = run.calendar.round_of(saved.step)[0] - 1 if left else saved.step
        return Continuation(path, saved.contents, start, names, left)

    def _read(self, source: Continuation) -> bool:
        """Read the vectors of a checkpoint, each rank what it needs; collective. Returns False if it is damaged."""
        learning, layout = self.run.learning, self.run.model.layouts[self.run.grid.stage]
        learning.begin(source.start + 1)
        learning.left = source.left or None
        state, into, counted = learning.saved_state, list[Segment](), list[Segment]()
        for name in source.names:
            if part := state.parts.get(name):
                into += segments(layout, name, part.held)
                counted += segments(layout, name, part.collected, once=True)
        names = needed_kinds(self.run.model.layouts, source.names)
        for name in state.parts.keys() - source.names:  # what the checkpoint has not is as at the beginning
            for view in state.parts[name].held.values():
                view.fill(0)
        try:
            shared_file.load(self.team, self.first_node, source.path, source.contents, names, into, counted)
        except OutputError as error:
            self._problems.append(str(error))
            return False
        with self.team.clock.doing("joining"):
            state.settle()
        self._restore_constants(self._saved.arrays if self._saved else {})
        return True

    def _init(self) -> None:
        """Take what --init gives of the values that all ranks have; collective."""
        self.run.learning.begin(1)
        given, self._notes = first_values.take(self.run, self.progress)
        self._restore_constants(given)

    def _restore_constants(self, given: Mapping[str, Any]) -> None:
        """Give all ranks the constants that are others in what rank 0 has been given; collective."""
        constants = self.run.model.constants
        restore_constants(constants, self.team, {name: given[name] for name in constants.changed(given)})

    def _check_none(self) -> None:
        """Rank 0: raise OutputError if there are checkpoints, of which none can be used."""
        if self._problems:
            raise OutputError(f"no checkpoint in {self.hold.checkpoints} can be used: {'; '.join(self._problems)}")

    def _cut_log(self) -> Restored:
        """Rank 0: cut the log to what was there when the checkpoint was written, or when the round began that was left
        then; without one, to nothing."""
        run, metrics, saved, notes = self.run, self.hold.metrics, self._saved, self._notes
        step = saved.step if saved else 0
        left = saved is not None and accounts.STEPS in saved.arrays
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
        notes = [*(f"warning: skipped {problem}" for problem in self._problems), *notes]
        return Restored(step, saved.step if saved else 0, notes, history, scores(kept, run.best.name), unscored, noise)


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
