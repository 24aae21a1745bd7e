"""The training program: `mpirun -n 16 python -m mpiml.train`. Builds everything, then runs the loop."""

from __future__ import annotations

import os
import shlex
import sys

if __name__ == "__main__":
    from mpiml.run import start

    start.begin("mpiml.train")
    from mpiml.config import parse
    from mpiml.run.process import StopRequest

    start.answer_help(parse)

    StopRequest().__enter__()  # a signal that comes before MPI is up must not kill; train() takes it over
    start.start_mpi()

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from mpi4py import MPI

from mpiml.clock import Clock
from mpiml.config import Config, parse
from mpiml.errors import SAVED, freed
from mpiml.flags import seconds
from mpiml.parallel import grid as grids
from mpiml.partition import check_ranks
from mpiml.run import log, one_job, trace
from mpiml.run.crew import Crew
from mpiml.run.deadline import Deadline
from mpiml.run.failure import Guard, exit_code
from mpiml.run.process import StopRequest, prepare_process
from mpiml.run.result import Result
from mpiml.run.watch import Watch
from mpiml.team import Team
from mpiml.training import resolve, sharing
from mpiml.training.data import open_data
from mpiml.training.hold import Hold
from mpiml.training.model import Model
from mpiml.training.restoring import Restored, check_saved, known_data
from mpiml.training.run import Run, assemble
from mpiml.training.storage import Store

if __name__ == "__main__":
    start.begun()

PROGRAM = "mpiml.train"
DONE: Result = {"status": "done", "exit_code": 0}


def train(
    config: Config, comm: MPI.Intracomm | None = None, model: Model | None = None, data: Any = None
) -> dict[str, Any]:
    """Train as the command does; every rank of the communicator calls it alike.

    Args:
        config: the settings.
        comm: the ranks to train on; all of the job's by default.
        model: a list of layers, a PyTorch module, or a function (shape of an input row, number of outputs) that
            returns one of these, in place of config.model.
        data: in place of config.data a Dataset, or what a function for --data may return.

    Returns the content of result.json.

    Raises RunError, one of mpiml.errors, on all ranks alike. If one rank fails alone in a job of several, the whole job
    is ended instead, for the others would wait for it for ever.
    """
    comm = MPI.COMM_WORLD if comm is None else comm
    guard = Guard(Team(comm, trace.clock_for(config.trace, comm.size)), PROGRAM)
    with Hold(guard) as hold, guard:
        return _train(config, model, data, hold, guard)


def _train(asked: Config, model: Model | None, data: Any, hold: Hold, guard: Guard) -> dict[str, Any]:
    began, everyone = perf_counter(), guard.team
    one_job.check_size(MPI.COMM_WORLD.size)
    everyone.check_alike(one_job.software() | asked.by_flag())
    cfg, before, done = hold.resumed(asked)
    if done:
        return done
    stop = StopRequest(Deadline(seconds(cfg.time_limit, "--time-limit"), os.environ), cfg.stop_grace)
    with Watch(everyone.comm.Dup(), everyone.clock, cfg.stall_timeout, guard.fail) as watch, stop:
        everyone.together(lambda: check_ranks(everyone.size, cfg.pipe))
        if cfg.trace:
            everyone.on_rank_0(lambda: trace.check(cfg.trace, cfg.out))
        if cfg.log == "tensorboard":
            from mpiml.run import tensorboard

            everyone.on_rank_0(tensorboard.check)
        prepare_process(cfg.threads)
        crew = Crew(everyone, sharing.busy(cfg, before, everyone.size))
        stop.others = crew.asked

        def work(team: Team) -> dict[str, Any]:
            dataset, replicas = open_data(cfg, team, data), team.size // cfg.pipe
            rows, classes = len(dataset.train), dataset.classification
            resolved = team.together(lambda: resolve.resolve(cfg, rows, classes, replicas, before))
            if cfg.resume and (done := hold.finished(team, resolved, before)):  # --epochs has become steps
                return done
            known = team.on_rank_0(lambda: known_data(resolved, dataset, hold, team.clock.progress))
            idle = sharing.idle_text(team.size, crew.idle, resolved.microbatches, resolved.workers, resolved.leaf)
            with freed(grids.build(team, cfg.pipe), team.size) as grid:
                run = assemble(resolved, dataset, grid, model, check_saved, known)
                with freed(run, team.size):
                    return _run(run, dataset.name, hold, [*run.notes, *watch.notes, *idle], stop, began)

        return crew.run(work, stop)


def _run(run: Run, name: str, hold: Hold, notes: list[str], stop: StopRequest, began: float) -> dict[str, Any]:
    """Train what is assembled, in its directory. Returns the content of result.json."""
    grid, about = run.grid, hold.opened(run, name)
    with freed(Store(run, hold, stop.deadline), grid.team.size) as store:
        return _go_on(run, store, hold, [*about, *notes], stop, began)


def _go_on(run: Run, store: Store, hold: Hold, notes: list[str], stop: StopRequest, began: float) -> dict[str, Any]:
    """Train from where the run left off. Returns the content of result.json."""
    cfg, grid, data = run.config, run.grid, run.data
    stop.broken = lambda: store.failed
    restored = store.restore()
    warnings, waits = hold.begun(run, restored.step), store.claim()
    rows, metric = data.shards.rows_per_step, run.model.metric.name
    with log.Log(grid.team, hold.metrics, rows, metric, run.pace(), restored.history, cfg.evaluated) as logger:
        if cfg.log == "tensorboard":
            logger.open_events()
        logger.open_console(restored.step + 1, cfg.steps, cfg.quiet)
        shape = sharing.grid_text(grid.stages, grid.replicas, cfg.microbatches, cfg.workers, cfg.leaf)
        for line in [*warnings, *notes, *restored.notes, *waits, shape, *sharing.workers_text(cfg, grid.replicas)]:
            logger.say(line)
        # Numbers that are not finite end the run, with a better message than NumPy's.
        with data.ahead, np.errstate(all="ignore"), trace.written(cfg.trace, grid, logger.say):
            stopped = _begin(run, restored, store, logger, stop) or _loop(run, restored.step, store, logger, stop)
            store.settle()
            done = DONE | {"reason": run.best.reason}
            ended = {"status": "stopped", "exit_code": SAVED, "reason": stop.reason()} if stopped else done
            outcome = {"step": restored.step} | ended | logger.known | store.saved()
            outcome["weights_sha256"] = store.digest()
        outcome["samples_per_second"] = logger.samples_per_second()
        outcome["seconds"] = round(perf_counter() - began, 3)
        _summary(run, hold.path, outcome, logger)
    return store.finish(outcome)


def _begin(run: Run, restored: Restored, store: Store, logger: log.Log, stop: StopRequest) -> bool:
    """Do what is left of the step that a run goes on from. Returns whether it was asked to stop before the next."""
    if not restored.unscored and (restored.step == run.config.steps or run.best.enough):
        return False  # there is nothing to stop
    if run.asked_to_stop(stop.now()):
        return True
    return restored.unscored and not _scored(run, restored.step, store, logger, stop)


def _loop(run: Run, start: int, store: Store, logger: log.Log, stop: StopRequest) -> bool:
    """Train from the step after `start`. Returns whether it was asked to stop before the end."""

    def moved(step: int) -> None:
        logger.moved(step)
        store.tick()

    step = start
    while step < run.config.steps and not run.best.enough:
        done = run.advance(step + 1, stop, moved)  # a step, or a round of workers; refuses what is not finite
        store.tick()
        if done.left:
            logger.known |= {"step": store.save_round(done.left)}
            return True
        newest = max((one.step for one in done.steps if one.logged), default=None)
        for one in done.steps:
            logger.timed(one)
            if one.logged:
                logger.step(one, one.step == newest)
        step = done.steps[-1].step
        if done.due.save or done.stop:
            store.save(step, step < run.config.steps and not done.stop)  # first: an evaluation may fail
        scored = not done.due.evaluation or _scored(run, step, store, logger, stop)
        if not scored or (done.stop and step < run.config.steps and not run.best.enough):
            store.save(step, going_on=False)
            return True
    return False


def _scored(run: Run, step: int, store: Store, logger: log.Log, stop: StopRequest) -> bool:
    """Evaluate, and save the step if it is one of the best or the end. Returns False if a stop cut that short."""
    store.before_evaluation()

    def broken_off() -> bool:
        store.tick()
        return stop.at_once()

    evaluation = run.evaluate(step, broken_off)
    if evaluation is None:
        return False
    logger.evaluation(evaluation)
    if run.best.add(step, evaluation.loss if run.best.name == "loss" else evaluation.score):
        store.save_best(step)
    if run.best.enough and run.config.save_every:
        store.save(step)
    return True


def _summary(run: Run, path: Path, outcome: dict[str, Any], logger: log.Log) -> None:
    """What a person wants to know at the end."""
    shares = logger.where_the_time_went()
    speed = outcome["samples_per_second"]
    scored = outcome.get(run.model.metric.name)
    which = run.config.evaluated
    score = "" if scored is None else f"{which} {run.model.metric.name} {scored:.4f}, "
    if run.config.keep_best and outcome.get("best_checkpoint"):
        best = f"{run.best.what} {outcome['best_score']:.4f} at step {outcome['best_step']}"
        logger.say(f"best: {best}: {path / outcome['best_checkpoint']}")
    if run.best.reason and outcome["status"] == "done":
        logger.say(f"ended by --patience: {run.best.reason}")
    if (noise := outcome.get("noise_scale")) is not None:
        logger.say(f"noise scale: batches beyond about {max(noise, 1):,.0f} rows bring little")
    what = "done" if outcome["status"] == "done" else "stopped and saved; go on with --resume"
    logger.say(
        f"{what}: step {outcome['step']}, {score}{outcome['seconds']:.1f} s"
        + (f", {speed:,.0f} samples/s" if speed else "")
    )
    logger.say("time: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    logger.say(f"files: {path}/ (metrics.jsonl, result.json, checkpoints)")
    logger.say(f"report: python -m mpiml.report {shlex.quote(str(path))}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    team = Team(MPI.COMM_WORLD, Clock())
    try:
        with Guard(team, PROGRAM):
            given = list(sys.argv[1:] if arguments is None else arguments)
            first, config = team.on_rank_0(lambda: (given, parse(given, PROGRAM)))
            config = team.together(lambda: config if given == first else parse(given, PROGRAM))
        return int(train(config, team.comm)["exit_code"])
    except BaseException as error:  # reported already, and in a job of several ranks known to all
        return exit_code(error)


if __name__ == "__main__":
    start.end(main())
