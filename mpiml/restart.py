"""How a run begins, in a new directory or where it left off, and how its state is kept."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpiml.assemble import Run
from mpiml.config import Config, from_toml
from mpiml.errors import OutputError
from mpiml.parallel.state import VALUES
from mpiml.run import checkpoint, environment, log
from mpiml.run.checkpoint import Checkpoint
from mpiml.run.directory import RunDirectory, read_result, write_atomically, write_result
from mpiml.run.verdict import on_rank_0


def settings(asked: Config) -> Config:
    """The settings to start from: those asked for, or a stored run's, changed as asked. Rank 0 calls it."""
    if not (asked.resume and asked.out):
        return asked
    stored = Path(asked.out) / "config.toml"
    if not stored.exists():
        return asked
    return asked.resumed(Config(**from_toml(stored)))


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


def open_directory(
    run: Run, name: str, ranks: list[dict[str, Any]], opened: list[RunDirectory]
) -> tuple[Path, str, list[str]]:
    """Take the run directory, append it to `opened`, and write what is known at the start. Rank 0 calls it.

    Returns the path, a token for this job, and what there is to say.
    """
    cfg, grid = run.config, run.grid
    directory = RunDirectory.create(cfg.out, f"{name}-{cfg.model}", cfg.resume)
    opened.append(directory)
    notes = [f"warning: {text}" for text in environment.warnings(ranks)]
    before = read_result(directory.path)
    if before.get("status") == "running":
        notes.append("the last job in this directory ended without a word: killed, or its node failed")
    elif before.get("status") == "failed":
        notes.append(f"the last job in this directory failed: {before.get('reason')}")
    write_atomically(directory.config, cfg.to_toml())
    write_atomically(directory.environment, environment.to_json(ranks))
    running = {
        "status": "running",
        "exit_code": None,
        "reason": None,
        "rank": None,
        "step": 0,
        "ranks": grid.comm.size,
        "pipe": grid.stages,
        "microbatches": cfg.microbatches,
    }
    write_result(directory.path, running)
    return directory.path, f"{os.getpid()}-{time.time_ns()}", notes


def restore(run: Run, path: Path) -> tuple[int, list[str], dict[str, Any]]:
    """Put the state of the newest good checkpoint, or the weights of --init, in place; collective.

    Returns the step after which it was saved, what there is to say, and what the log knows of the run so far.
    """
    cfg, comm = run.config, run.grid.comm
    whole: list[Mapping[str, Any]] = []

    def read() -> tuple[int, list[str], dict[str, Any], tuple[str, ...]]:
        found, notes, history = None, [], {}
        if cfg.resume:
            found, problems = checkpoint.newest(path / "checkpoints")
            notes += [f"warning: skipped {problem}" for problem in problems]
            notes.append(
                f"going on after step {found.step}" if found else f"no checkpoint in {path} yet: starting at step 0"
            )
            entries = log.cut(path / "metrics.jsonl", found.step if found else 0, cfg.eval_every, cfg.log_every)
            history = log.last_known(entries, run.metric.name)
        step, names = (found.step, tuple(run.state.mine)) if found else (0, ())
        if not found and cfg.init:
            found, names = checkpoint.load(Path(cfg.init)), (VALUES,)
            notes.append(f"first weights from {cfg.init}")
        if found:
            whole.extend(vectors(run, found, names))
        return step, notes, history, names

    step, notes, history, names = on_rank_0(comm, read)
    if names:
        run.state.distribute(whole, *names)
    return step, notes, history


def save(run: Run, step: int, directory: Path) -> None:
    """Write a checkpoint; collective."""
    with run.clock.booked("checkpoint"):
        run.clock("joining")
        stages = run.state.collect()

        def write() -> None:
            run.clock("checkpoint")
            arrays = named(run, stages, *run.state.mine)
            checkpoint.save(directory, Checkpoint(step, run.config.to_toml(), arrays), run.config.keep)

        on_rank_0(run.grid.comm, write)


def digest(run: Run) -> str:
    """The SHA-256 of all weights in layer order, the same for every layout; collective."""
    with run.clock.booked("checkpoint"):
        run.clock("joining")
        stages = run.state.collect(VALUES)
        return on_rank_0(run.grid.comm, lambda: checkpoint.digest(named(run, stages, VALUES)))


def named(run: Run, stages: Sequence[Mapping[str, Any]], *names: str) -> dict[str, Any]:
    """All stages' vectors as arrays: weights under their names, state NAME as optimizer.NAME.(weight's name)."""
    arrays: dict[str, Any] = {}
    for vector in names:
        prefix = "" if vector == VALUES else f"optimizer.{vector}."
        for layout, vectors_of_stage in zip(run.layouts, stages, strict=True):
            arrays |= {prefix + name: array for name, array in layout.named(vectors_of_stage[vector]).items()}
    return arrays


def vectors(run: Run, found: Checkpoint, names: Sequence[str]) -> list[Mapping[str, Any]]:
    """The reverse of `named`, for some vectors. Raises OutputError if the checkpoint is of another model."""
    stages = [{name: layout.zeros() for name in names} for layout in run.layouts]
    for name, target in named(run, stages, *names).items():
        if name not in found.arrays:
            raise OutputError(f"the checkpoint has no {name}: it is of another model or optimizer")
        source = found.arrays[name]
        if source.shape != target.shape or source.dtype != target.dtype:
            raise OutputError(
                f"the checkpoint's {name} is {source.dtype} {source.shape}, the model's {target.dtype} {target.shape}"
            )
        target[...] = source
    return list(stages)
