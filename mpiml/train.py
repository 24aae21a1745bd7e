"""The training program: `mpirun -n 16 python -m mpiml.train`. Builds everything, then runs the loop."""

from __future__ import annotations

import os
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
from mpiml.data.dataset import Dataset
from mpiml.errors import SAVED, NotFiniteError, freed
from mpiml.parallel import grid as grids
from mpiml.parallel.record import Record, agree
from mpiml.partition import check_ranks
from mpiml.run import log, one_job, trace
from mpiml.run.crew import Crew
from mpiml.run.deadline import Deadline
from mpiml.run.failure import Guard, exit_code
from mpiml.run.process import StopRequest, prepare_process
from mpiml.run.watch import Watch
from mpiml.team import Team
from mpiml.training import resolve, storage
from mpiml.training.data import open_data
from mpiml.training.hold import Hold, Opened
from mpiml.training.model import Model
from mpiml.training.run import Due, Run, assemble

if __name__ == "__main__":
    start.begun()

PROGRAM = "mpiml.train"


def train(
    config: Config, comm: MPI.Intracomm | None = None, model: Model | None = None, data: Dataset | None = None
) -> dict[str, Any]:
    """Train as the command does; every rank of the communicator calls it alike.

    Args:
        config: the settings.
        comm: the ranks to train on; all of the job's by default.
        model: a list of layers, a PyTorch module, or a function (shape of an input row, number of outputs) that
            returns one of these, in place of config.model.
        data: a data set in place of config.data.

    Returns:
        The content of result.json.

    Raises:
        RunError: one of mpiml.errors, on all ranks alike. If one rank fails alone in a job of several, the whole
            job is ended instead, for the others would wait for it for ever.
    """
    comm = MPI.COMM_WORLD if comm is None else comm
    guard = Guard(Team(comm, trace.clock_for(config.trace, comm.size)), PROGRAM)
    with Hold(guard) as hold, guard:
        return _train(config, model, data, hold, guard)


def _train(asked: Config, model: Model | None, data: Dataset | None, hold: Hold, guard: Guard) -> dict[str, Any]:
    began, everyone = perf_counter(), guard.team
    one_job.check_size(MPI.COMM_WORLD.size)
    everyone.check_alike(one_job.software() | asked.by_flag())
    cfg, before, done = hold.resumed(asked)
    if done:
        return done
    stop = StopRequest(Deadline(cfg.time_limit, os.environ))
    with Watch(everyone.comm.Dup(), everyone.clock, cfg.stall_timeout, guard.fail) as watch, stop:
        everyone.together(lambda: check_ranks(everyone.size, cfg.pipe))
        if cfg.trace:
            everyone.on_rank_0(lambda: trace.check(cfg.trace, cfg.out))
        prepare_process(cfg.threads)
        crew = Crew(everyone, resolve.busy(cfg, before, everyone.size))
        stop.others = crew.asked

        def work(team: Team) -> dict[str, Any]:
            dataset, replicas = open_data(cfg, team, data), team.size // cfg.pipe
            rows, classes = len(dataset.train), dataset.classification
            resolved = team.together(lambda: resolve.resolve(cfg, rows, classes, replicas, before))
            if cfg.resume and (done := hold.finished(team, resolved)):  # --epochs has become steps
                return done
            idle = resolve.idle_text(team.size, crew.idle, resolved.microbatches or 1)
            with freed(grids.build(team, cfg.pipe), team.size) as grid:
                run = assemble(resolved, dataset, grid, model, storage.check_saved)
                with freed(run, team.size):
                    return _run(run, dataset.name, hold, [*run.notes, *watch.notes, *idle], stop, began)

        return crew.run(work, stop)


def _run(run: Run, name: str, hold: Hold, notes: list[str], stop: StopRequest, began: float) -> dict[str, Any]:
    """Train what is assembled, in its directory. Returns the content of result.json."""
    cfg = run.config
    directory = hold.opened(run, name)
    begin = storage.restore(run, directory.path)
    rows, metric = run.shards.rows_per_step, run.metric.name
    with log.Log(run.grid.team, directory.metrics, rows, metric, run.pace()) as logger:
        logger.open_console(begin.step + 1, run.steps, cfg.quiet)
        grid = resolve.grid_text(run.grid.stages, run.grid.replicas, cfg.microbatches or 1)
        for line in [*directory.notes, *notes, *begin.notes, grid]:
            logger.say(line)
        # Numbers that are not finite end the run, with a better message than NumPy's.
        drawn = trace.written(cfg.trace, run.grid, logger.say)
        with run.ahead, np.errstate(all="ignore"), drawn:
            outcome = begin.history | _loop(run, begin, directory, logger, stop)
        outcome["samples_per_second"] = logger.samples_per_second()
        outcome["seconds"] = round(perf_counter() - began, 3)
        _summary(run, directory.path, outcome, logger)
    return storage.finish(run, directory, outcome)


def _loop(run: Run, begin: storage.Restored, directory: Opened, logger: log.Log, stop: StopRequest) -> dict[str, Any]:
    """Train from the step after the restored one. Returns the outcome for result.json."""
    outcome: dict[str, Any] = {"status": "done", "exit_code": 0, "step": begin.step}
    stop.deadline.expect(storage.size(run))
    stopped = False
    if begin.unscored or begin.step < run.steps:  # else there is nothing to stop
        stopped = agree(run.grid.comm, run.record(0), stop=stop.now()).stop
    if begin.unscored and not stopped:
        stopped = not _evaluate(run, begin.step, logger, stop, outcome)
    for step in range(begin.step + 1, run.steps + 1):
        if stopped:
            break
        due = run.due(step)
        record = _step(run, step, due, logger, stop)
        outcome |= {"step": step, "loss": record.mean_loss}
        save = due.save or record.stop
        if save:
            stop.deadline.saved(storage.save(run, step, directory))
        scored = not due.evaluation or _evaluate(run, step, logger, stop, outcome)
        if not (scored or save):
            storage.save(run, step, directory)
        stopped = not scored or (record.stop and step < run.steps)
    if stopped:
        outcome |= {"status": "stopped", "exit_code": SAVED, "reason": stop.reason()}
    return outcome | {"weights_sha256": storage.digest(run)}


def _step(run: Run, step: int, due: Due, logger: log.Log, stop: StopRequest) -> Record:
    """Forward, backward, agree, sum, update; collective. Raises NotFiniteError on all ranks alike."""
    began = perf_counter()
    cfg, comm, clock = run.config, run.grid.comm, run.clock
    assert cfg.microbatches, "settings are resolved before a run is assembled"
    clock.step = step
    table = run.record(cfg.microbatches, measured=due.log)
    run.stage.train(step, run.ahead.batches(step), table, measured=due.log)
    clock("communication")
    record = run.agree(table, not run.update.finite, stop.now())
    _refuse_not_finite(run, step, record)
    rate = run.learning_rate(step)
    shown = due.log or due.save or due.evaluation or record.stop
    norm = run.update.step(rate, record.weight, step, shown)
    _refuse_not_finite(run, step, record, norm)
    if shown:  # else the next step's record will carry it
        _refuse_not_finite(run, step + 1, agree(comm, run.record(0), not run.update.finite))
    clock("compute")
    logger.timed(perf_counter() - began, step, record.mean_loss)
    if due.log:
        logger.step(step, run.epoch(step), record.mean_loss, run.metric.value(record.metric), rate, norm)
    return record


def _evaluate(run: Run, step: int, logger: log.Log, stop: StopRequest, outcome: dict[str, Any]) -> bool:
    """Score the test rows on all replicas, for the log and the outcome; collective. False if a stop came between."""
    record = run.tests.score(run.stage, run.metric, run.clock, step, stop.at_once)
    if record:
        score = run.metric.value(record.metric)
        logger.evaluation(step, run.epoch(step), record.mean_loss, score, len(run.tests.split))
        outcome |= {run.metric.name: score, "test_loss": record.mean_loss}
    return record is not None


def _refuse_not_finite(run: Run, step: int, record: Record, norm: float | None = None) -> None:
    """End the run, on all ranks, if the loss of this step or what its gradient did is not finite; collective."""
    grid, reason, rank = run.grid, None, None
    if record.broken:
        reason = f"weights are not finite after step {step - 1}"
    elif record.bad_entry is not None:
        replicas, total = grid.replicas, run.config.microbatches or 1
        replica = (replicas * (record.bad_entry + 1) - 1) // total
        rank = grid.team.launched[grid.rank_of(grid.stages - 1, replica)]
        reason = f"the loss is not finite in step {step} (micro-batch {record.bad_entry}, rank {rank})"
    elif norm is not None and not norm < float("inf"):
        reason = f"the gradient is not finite in step {step}"
    if reason:
        error = NotFiniteError(f"{reason}; a smaller --lr, --warmup-steps or --clip may help")
        error.rank, error.everywhere = rank, True
        run.stage.sum.drop()
        raise error


def _summary(run: Run, path: Path, outcome: dict[str, Any], logger: log.Log) -> None:
    """What a person wants to know at the end."""
    shares = logger.where_the_time_went()
    speed = outcome["samples_per_second"]
    scored = outcome.get(run.metric.name)
    score = "" if scored is None else f"test {run.metric.name} {scored:.4f}, "
    what = "done" if outcome["status"] == "done" else "stopped and saved; go on with --resume"
    logger.say(
        f"{what}: step {outcome['step']}, {score}{outcome['seconds']:.1f} s"
        + (f", {speed:,.0f} samples/s" if speed else "")
    )
    logger.say("time: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    logger.say(f"files: {path}/ (metrics.jsonl, result.json, checkpoints)")


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
