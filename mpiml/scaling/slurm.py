"""A study as SLURM jobs: a job for each number of ranks and repeat, submitted once for as long as it is queued; no MPI.

A job for each repeat, and not one for all of them, so that repeats differ as jobs do (other nodes, another hour) and
the intervals say so; a job for each number of ranks, and not one for all, so that no node idles.
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

from mpiml.command import telling
from mpiml.errors import ConfigError
from mpiml.run.directory import write_atomically
from mpiml.scaling.jobs import Task
from mpiml.scaling.points import JOBS

KEPT = ("ranks", "mode", "pipes", "repeats", "steps", "warm_up", "timeout", "node_ranks", "launcher", "target")

SCRIPT = """#!/bin/bash
# Repeat {repeat} of what is measured on {ranks} ranks; python -m mpiml.scaling run --slurm wrote this.
#SBATCH --nodes={nodes} --ntasks={ranks} --ntasks-per-node={each} --cpus-per-task={threads}
#SBATCH --exclusive
#SBATCH --time={minutes}
PYTHON=${{PYTHON:-{python}}}
[[ ! -e jobs/site.sh ]] || source jobs/site.sh
exec "$PYTHON" -m mpiml.scaling run {flags} {launcher}-- {settings}
"""


def queued(directory: Path, tasks: Sequence[Task], node_ranks: int | None) -> dict[str, str]:
    """Number and state of those jobs of a study that SLURM has not ended, by name.

    Asked of SLURM, by names that tell the study, the ranks and the repeat: so nothing is submitted twice, whatever
    became of the command that did it first.

    Raises ConfigError without SLURM or --node-ranks.
    """
    if not node_ranks:
        raise ConfigError("--slurm: say with --node-ranks N how many ranks a node takes")
    _there("sbatch")
    names = [_name(directory, *job) for job in _jobs(tasks)]
    lines = _call(["squeue", "--noheader", "--format=%j %i is %T", f"--name={','.join(names)}"]).splitlines()
    return {name: state.lower() for name, _, state in (line.strip().partition(" ") for line in lines)}


def submit(
    directory: Path,
    tasks: Sequence[Task],
    states: dict[str, str],
    chosen: argparse.Namespace,
    settings: Sequence[str],
    threads: int,
) -> None:
    """Submit a job for every number of ranks and repeat of which something is open, unless `states` says that it is
    queued or running, and say what is open.

    Raises ConfigError if SLURM refuses.
    """
    submitted = waiting = 0
    for ranks, repeat in _jobs(tasks):
        mine = [task for task in tasks if (task.point.ranks, task.repeat) == (ranks, repeat)]
        missing = sum(not task.done for task in mine)
        state = states.get(_name(directory, ranks, repeat))
        text = f"ranks {ranks}, repeat {repeat}: {len(mine) - missing} of {len(mine)} there"
        if missing and state:
            waiting += 1
            text += f"; job {state}"
        elif missing:
            submitted += 1
            text += f"; {_submit(directory, chosen, settings, threads, ranks, repeat, missing)}"
        print(text, flush=True)
    there = sum(task.done for task in tasks)
    print(f"{there} of {len(tasks)} measured; jobs submitted: {submitted}, queued or running before: {waiting}", end="")
    print("" if there == len(tasks) else "; the same command tells how far they are, and submits again what failed")


def _jobs(tasks: Sequence[Task]) -> list[tuple[int, int]]:
    """Ranks and repeat of each, in order."""
    return list(dict.fromkeys((task.point.ranks, task.repeat) for task in tasks))


def _name(directory: Path, ranks: int, repeat: int) -> str:
    """Of a job: the same whenever it is asked for, and another for each study."""
    return f"scaling-{hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:10]}-{ranks}-{repeat}"


def _submit(
    directory: Path,
    chosen: argparse.Namespace,
    settings: Sequence[str],
    threads: int,
    ranks: int,
    repeat: int,
    missing: int,
) -> str:
    """Write and submit a job; returns what to tell of it."""
    path = directory / JOBS / f"ranks-{ranks:05d}_{repeat}.sbatch"
    log = path.with_suffix(".log")
    kept = {name: getattr(chosen, name) for name in KEPT if getattr(chosen, name) is not None}
    kept |= {"max_epochs": chosen.max_epochs, "out": directory, "only": [ranks, repeat]}
    flags = [f"--{name.replace('_', '-')}={_text(value)}" for name, value in kept.items()]
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
        settings=shlex.join(settings),
    )
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, script)
    before = f"; of the one before, see {log}" if log.exists() else ""
    flags = ["--parsable", f"--output={log}", "--open-mode=append", *shlex.split(chosen.sbatch)]
    job = _call(["sbatch", *flags, f"--job-name={_name(directory, ranks, repeat)}", str(path)])
    return f"submitted as job {job.split(';')[0]}{before}"


def _call(command: Sequence[str]) -> str:
    """What a command of SLURM prints. Raises ConfigError if it fails."""
    _there(command[0])
    done = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        told = telling(done.stderr.splitlines(), "error")  # the first names the fault; the last, that there is one
        raise ConfigError(f"--slurm: {command[0]} failed, exit code {done.returncode}: {told}")
    return done.stdout.strip()


def _there(command: str) -> None:
    if not shutil.which(command):
        raise ConfigError(f"--slurm: no {command} found; use a login node of the cluster, or leave out --slurm")


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
