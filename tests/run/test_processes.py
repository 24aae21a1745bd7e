"""A launcher that dies is noticed by the rank that it has started, and by no process that is no rank of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, signal, sys, time
from mpiml.run.processes import launcher
its = launcher()
print(its.ended, flush=True)
os.kill(int(sys.argv[1]), signal.SIGKILL)
for _ in range(40):
    if its.ended: break
    time.sleep(0.01)
print(its.ended, flush=True)
"""


def said(name: str, path: Path, environment: dict[str, str]) -> list[str]:
    """What a process says of its launcher before and after it has killed it: a shell under that name, which starts it
    through another shell."""
    shell = path / name
    shutil.copy("/bin/sh", shell)
    inner = f"{sys.executable} {path / 'script.py'} $PPID; true"
    (path / "script.py").write_text(SCRIPT)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI", "SLURM"))}
    command = [str(shell), "-c", f"sh -c '{inner}'; true"]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, env=clean | environment, timeout=20)
    return done.stdout.split()


def test_launcher_that_dies_is_noticed(tmp_path: Path) -> None:
    assert said("mpirun", tmp_path, {"PMI_RANK": "1"}) == ["False", "True"]


def test_parent_that_is_no_launcher_may_die(tmp_path: Path) -> None:
    assert said("myshell", tmp_path, {"PMI_RANK": "1"}) == ["False", "False"]


def test_process_that_is_no_rank_has_no_launcher(tmp_path: Path) -> None:
    """A shell or a program that somebody starts by mpirun, which does not count as one of its ranks."""
    assert said("mpirun", tmp_path, {}) == ["False", "False"]
