"""The training program: `mpirun -n 16 python -m mpiml.train`. Builds everything, then runs the loop."""

from __future__ import annotations

import contextlib
import gc
import os
import sys

if __name__ == "__main__":
    gc.disable()  # until all is imported: what is imported stays
    # Set before NumPy loads: otherwise each rank's BLAS starts a thread per core, only to be told to use fewer.
    for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    if {"-h", "--help", "--version"} & set(sys.argv[1:]):
        # Must work where MPI cannot start, on a login node say; the imports below start MPI.
        from mpiml.config import parse
        from mpiml.errors import ConfigError

        with contextlib.suppress(ConfigError):  # is found again, and told, when MPI is up
            parse(sys.argv[1:])
    from mpiml.run.process import StopRequest

    StopRequest().__enter__()  # a signal that comes before MPI is up must not kill; train() takes it over

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from mpi4py import MPI

from mpiml import assemble, design, load, restart
from mpiml.assemble import Run
from mpiml.build import Model
from mpiml.clock import Clock
from mpiml.config import Config, parse
from mpiml.data.dataset import Dataset
from mpiml.errors import SAVED, NotFiniteError
from mpiml.parallel import grid as grids
from mpiml.parallel.record import Record, agree
from mpiml.parallel.split import check_ranks
from mpiml.run import launch, log, trace
from mpiml.run.deadline import Deadline
from mpiml.run.failure import Guard, exit_code
from mpiml.run.process import StopRequest, ignore_signals, prepare_process
from mpiml.run.verdict import on_rank_0, together
from mpiml.run.watch import Watch

if __name__ == "__main__":
    gc.freeze()
    gc.enable()

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
    clock = trace.clock_for(config.trace, comm.size)
    with Guard(comm, clock, PROGRAM) as guard:
        return _train(config, comm, model, data, clock, guard)


def _train(
    asked: Config, comm: MPI.Intracomm, model: Model | None, data: Dataset | None, clock: Clock, guard: Guard
) -> dict[str, Any]:
    began = perf_counter()
    launch.check_size(MPI.COMM_WORLD.size)
    launch.check_alike(comm, clock, launch.software() | asked.by_flag())
    cfg, before = on_rank_0(comm, clock, lambda: restart.settings(asked)) if asked.resume else (asked, None)
    stop = StopRequest(Deadline(cfg.time_limit, os.environ))
    with Watch(comm.Dup(), clock, cfg.stall_timeout, guard.fail), stop:
        together(comm, clock, lambda: check_ranks(comm.size, cfg.pipe))
        if cfg.trace:
            on_rank_0(comm, clock, lambda: trace.check(cfg.trace, cfg.out))
        prepare_process(cfg.threads)
        if cfg.resume and (done := on_rank_0(comm, clock, lambda: restart.finished(cfg))):
            return done
        dataset = load.open_data(cfg, comm, clock, data)
        replicas = comm.size // cfg.pipe
        cfg = together(
            comm, clock, lambda: design.resolve(cfg, len(dataset.train), dataset.classification, replicas, before)
        )
        if cfg.resume and (done := on_rank_0(comm, clock, lambda: restart.finished(cfg))):  # --epochs has become steps
            return done
        run = assemble.assemble(cfg, dataset, grids.build(comm, cfg.pipe), clock, model, restart.check_saved)
        with restart.opened(run, dataset.name) as directory:
            guard.run, guard.token = directory.path, directory.token
            start, notes, history = restart.restore(run, directory.path)
            rows, metric = run.shards.rows_per_step, run.metric.name
            with log.Log(run.grid.comm, directory.metrics, clock, rows, metric, run.pace()) as logger:
                logger.open_console(start + 1, run.steps, cfg.quiet)
                grid = design.grid_text(run.grid.stages, run.grid.replicas, cfg.microbatches or 1)
                for line in [*directory.notes, *run.notes, *notes, grid]:
                    logger.say(line)
                # Numbers that are not finite end the run, with a better message than NumPy's.
                drawn = trace.written(cfg.trace, run.grid, clock, logger.say)
                with run.ahead, np.errstate(all="ignore"), drawn:
                    outcome = history | _loop(run, start, directory.checkpoints, logger, stop)
                outcome["samples_per_second"] = logger.samples_per_second()
                outcome["seconds"] = round(perf_counter() - began, 3)
                _summary(run, directory.path, outcome, logger)
            result = restart.finish(run, directory.path, outcome)
        run.free()
        return result


def _loop(run: Run, start: int, checkpoints: Path, logger: log.Log, stop: StopRequest) -> dict[str, Any]:
    """Train from the step after `start`. Returns the outcome for result.json."""
    cfg, comm, clock = run.config, run.grid.comm, run.clock
    assert cfg.microbatches, "settings are resolved before a run is assembled"
    outcome: dict[str, Any] = {"status": "done", "exit_code": 0, "step": start}
    stop.deadline.expect(restart.size(run))
    if start < run.steps and agree(comm, run.record(0), stop=stop.now()).stop:  # all that there is is saved
        outcome |= {"status": "stopped", "exit_code": SAVED, "reason": stop.reason()}
        return outcome | {"weights_sha256": restart.digest(run)}
    for step in range(start + 1, run.steps + 1):
        began = perf_counter()
        clock.step = step
        last = step == run.steps
        log_due = _due(step, cfg.log_every, last)
        table = run.record(cfg.microbatches, measured=log_due)
        run.stage.train(step, run.ahead.batches(step), table, measured=log_due)
        clock("communication")
        record = run.agree(table, not run.update.finite, stop.now())
        _refuse_not_finite(run, step, record)
        eval_due = _due(step, cfg.eval_every, last)
        save_due = _due(step, cfg.save_every, last) or record.stop
        rate = run.learning_rate(step)
        told = log_due or eval_due or save_due
        norm = run.update.step(rate, record.weight, step, told)
        _refuse_not_finite(run, step, record, norm)
        if told:  # else the next step's record will carry it
            _refuse_not_finite(run, step + 1, agree(comm, run.record(0), not run.update.finite))
        clock("compute")
        logger.timed(perf_counter() - began, step, record.mean_loss)

        epoch = (step - 1) // run.shards.steps_per_epoch + 1
        outcome |= {"step": step, "loss": record.mean_loss}
        if log_due:
            logger.step(step, epoch, record.mean_loss, run.metric.value(record.metric), rate, norm)
        if eval_due:
            outcome |= evaluate(run, step, epoch, logger)
        if save_due:
            stop.deadline.saved(restart.save(run, step, checkpoints))
        if record.stop and not last:
            outcome |= {"status": "stopped", "exit_code": SAVED, "reason": stop.reason()}
            break
    return outcome | {"weights_sha256": restart.digest(run)}


def evaluate(run: Run, step: int, epoch: int, logger: log.Log) -> dict[str, float]:
    """Score the test rows on all replicas; collective. Returns the metric under its name."""
    record = run.tests.score(run.stage, run.metric, run.clock, step)
    score = run.metric.value(record.metric)
    logger.evaluation(step, epoch, record.mean_loss, score, len(run.tests.split))
    return {run.metric.name: score, "test_loss": record.mean_loss}


def _due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (last or step % every == 0)


def _refuse_not_finite(run: Run, step: int, record: Record, norm: float | None = None) -> None:
    """End the run, on all ranks, if the loss of this step or what its gradient did is not finite; collective."""
    grid, reason, rank = run.grid, None, None
    if record.broken:
        reason = f"weights are not finite after step {step - 1}"
    elif record.bad_entry is not None:
        replicas, total = grid.replicas, run.config.microbatches or 1
        replica = (replicas * (record.bad_entry + 1) - 1) // total
        rank = grid.launched[grid.rank_of(grid.stages - 1, replica)]
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
    comm, clock = MPI.COMM_WORLD, Clock()
    try:
        with Guard(comm, clock, PROGRAM):
            given = list(sys.argv[1:] if arguments is None else arguments)
            first, config = on_rank_0(comm, clock, lambda: (given, parse(given, PROGRAM)))
            config = together(comm, clock, lambda: config if given == first else parse(given, PROGRAM))
        return int(train(config, comm)["exit_code"])
    except BaseException as error:  # reported already, and in a job of several ranks known to all
        return exit_code(error)


if __name__ == "__main__":
    code = main()
    ignore_signals()
    sys.exit(code)
