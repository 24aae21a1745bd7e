"""Other processes of the node: a process that ends is noticed, a launcher's by the ranks that it has started alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpiml.run.node import Process, kernel

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from mpiml.run.node import own_launcher

def gone():
    try:
        return Path(f"/proc/{shell}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True

process, shell, limit = own_launcher(), int(sys.argv[1]), time.monotonic() + 20
print(process.ended, flush=True)
os.kill(shell, signal.SIGKILL)
while not gone() and time.monotonic() < limit:
    time.sleep(0.001)
print(process.ended, gone(), flush=True)
"""


def said(name: str, path: Path, environment: dict[str, str]) -> list[str]:
    """Whether a process finds its launcher ended before and after it has killed it, and whether that is gone then.

    The launcher is a shell under that name, which starts the process through another shell.
    """
    shell = path / name
    shutil.copy("/bin/sh", shell)
    inner = f"{sys.executable} {path / 'script.py'} $PPID; true"
    (path / "script.py").write_text(SCRIPT)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI", "SLURM"))}
    command = [str(shell), "-c", f"sh -c '{inner}'; true"]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, env=clean | environment, timeout=60)
    return done.stdout.split()


def test_launcher_that_dies_is_noticed(tmp_path: Path) -> None:
    assert said("mpirun", tmp_path, {"PMI_RANK": "1"}) == ["False", "True", "True"]


def test_parent_that_is_no_launcher_may_die(tmp_path: Path) -> None:
    assert said("myshell", tmp_path, {"PMI_RANK": "1"}) == ["False", "False", "True"]


def test_process_that_is_no_rank_has_no_launcher(tmp_path: Path) -> None:
    """A shell or a program that somebody starts by mpirun, which does not count as one of its ranks."""
    assert said("mpirun", tmp_path, {}) == ["False", "False", "True"]


def test_a_process_that_ends_is_noticed_until_nobody_looks() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = Process(child.pid)
        assert not process.ended
        child.kill()
        child.wait()
    assert process.ended
    process.close()
    process.close()
    assert not process.ended


def test_of_what_is_no_process_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Process(None).ended
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    assert not Process(child.pid).ended  # it had ended before
    monkeypatch.delattr(os, "pidfd_open")
    assert not Process(os.getpid()).ended  # an old kernel


def test_processes_of_a_machine_have_the_same_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "from mpiml.run.node import kernel; print(kernel())"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == kernel() != ""

    def no_such(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", no_such)
    assert kernel() == ""
