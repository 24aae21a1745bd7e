"""A study in SLURM's queue: a job for each number of ranks and repeat, submitted unless it is queued; no MPI.

Each repeat is a job of its own, so that repeats differ as jobs do (other nodes, another hour) and the intervals show
it; so is each number of ranks, so that no node idles.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mpiml.command import fault_line
from mpiml.errors import ConfigError
from mpiml.run.directory import write_atomically
from mpiml.scaling.jobs import StudyJob
from mpiml.scaling.points import JOBS

# Flags of `run` that the submitted jobs get too.
FLAGS = ["ranks", "mode", "pipes", "repeats", "steps", "warm_up", "timeout", "node_ranks", "launcher", "target"]
FLAGS += ["max_epochs", "batches", "trainings", "out"]

SCRIPT = """#!/bin/bash
# Repeat {repeat} of all points of {ranks} ranks; python -m mpiml.scaling run --slurm wrote this.
#SBATCH --nodes={nodes} --ntasks={ranks} --ntasks-per-node={each} --cpus-per-task={threads}
#SBATCH --exclusive
#SBATCH --time={minutes}
PYTHON=${{PYTHON:-{python}}}
[[ ! -e jobs/site.sh ]] || source jobs/site.sh
exec "$PYTHON" -m mpiml.scaling run {flags} {launcher}-- {settings}
"""


def queued(directory: Path, jobs: Sequence[StudyJob], node_ranks: int | None) -> dict[str, str]:
    """Number and state of the study's jobs that are queued or running, by name.

    Asks squeue for names made of the study's directory, the ranks and the repeat: so nothing is submitted twice, even
    if the command that submitted it was killed.

    Raises ConfigError without SLURM or --node-ranks.
    """
    if not node_ranks:
        raise ConfigError("--slurm: say with --node-ranks N how many ranks a node takes")
    _check_installed("sbatch")
    names = ",".join(_name(directory, *group) for group in _groups(jobs))
    lines = _call(["squeue", "--noheader", "--format=%j %i is %T", f"--name={names}"]).splitlines()
    return {name: state.lower() for name, _, state in (line.strip().partition(" ") for line in lines)}


def submit(chosen: argparse.Namespace, threads: int, jobs: Sequence[StudyJob], states: dict[str, str]) -> None:
    """Submit a SLURM job for every number of ranks and repeat with open jobs, unless `states` shows it queued or
    running; print what is open.

    Raises ConfigError if SLURM refuses.
    """
    submitted = waiting = 0
    for ranks, repeat in _groups(jobs):
        group = [job for job in jobs if (job.point.ranks, job.repeat) == (ranks, repeat)]
        missing = sum(not job.done for job in group)
        state = states.get(_name(chosen.out, ranks, repeat))
        text = f"ranks {ranks}, repeat {repeat}: {len(group) - missing} of {len(group)} done"
        if missing and state:
            waiting += 1
            text += f"; job {state}"
        elif missing:
            submitted += 1
            text += f"; {_submit(chosen, threads, ranks, repeat, missing)}"
        print(text, flush=True)
    done = sum(job.done for job in jobs)
    more = "" if done == len(jobs) else "; the same command shows progress, and submits again what failed"
    print(f"{done} of {len(jobs)} done; jobs submitted: {submitted}, queued or running before: {waiting}{more}")


def _groups(jobs: Sequence[StudyJob]) -> list[tuple[int, int]]:
    """Ranks and repeat of each SLURM job, in order."""
    return list(dict.fromkeys((job.point.ranks, job.repeat) for job in jobs))


def _name(directory: Path, ranks: int, repeat: int) -> str:
    """The name of a SLURM job, which only this study gives."""
    return f"scaling-{hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:10]}-{ranks}-{repeat}"


def _submit(chosen: argparse.Namespace, threads: int, ranks: int, repeat: int, missing: int) -> str:
    """Write and submit a SLURM job; returns a message with its number."""
    path = chosen.out / JOBS / f"ranks-{ranks:05d}_{repeat}.sbatch"
    log = path.with_suffix(".log")
    values = {name: getattr(chosen, name) for name in FLAGS if getattr(chosen, name) not in (None, [])}
    values["only"] = [ranks, repeat]
    lists = {name: ",".join(map(str, value)) for name, value in values.items() if isinstance(value, list)}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (values | lists).items()]
    script = SCRIPT.format(
        repeat=repeat,
        ranks=ranks,
        nodes=math.ceil(ranks / chosen.node_ranks),
        each=min(ranks, chosen.node_ranks),
        threads=threads,
        minutes=math.ceil(missing * chosen.timeout / 60) + 1,
        python=shlex.quote(sys.executable),
        flags=shlex.join(flags),
        launcher="" if chosen.launcher else '${LAUNCH_SOME:+--launcher="$LAUNCH_SOME"} ',
        settings=shlex.join(chosen.settings),
    )
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, script)
    before = f"; log of the one before: {log}" if log.exists() else ""
    flags = ["--parsable", f"--output={log}", "--open-mode=append", *shlex.split(chosen.sbatch)]
    job = _call(["sbatch", *flags, f"--job-name={_name(chosen.out, ranks, repeat)}", str(path)])
    return f"submitted as job {job.split(';')[0]}{before}"


def _call(command: Sequence[str]) -> str:
    """The output of a SLURM command. Raises ConfigError if it fails."""
    _check_installed(command[0])
    done = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        fault = fault_line(done.stderr, "error")  # the first such line: the last says only that there is an error
        raise ConfigError(f"--slurm: {command[0]} failed, exit code {done.returncode}: {fault}")
    return done.stdout.strip()


def _check_installed(command: str) -> None:
    if not shutil.which(command):
        raise ConfigError(f"--slurm: no {command} found; use a login node of the cluster, or leave out --slurm")
