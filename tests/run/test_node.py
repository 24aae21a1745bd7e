"""Other processes of the node: a process that ends is noticed, a launcher's by the ranks that it has started alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpiml.run.node import Process, kernel, memory_available

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


GB = 1 << 30
LIMITS = {
    "v2, a limit": ("0::/job/step\n", {"job/step": ("memory.max", 4 * GB, "memory.current", 3 * GB)}, GB),
    "v2, files count as left": ("0::/job\n", {"job": ("memory.max", 4 * GB, "memory.current", 3 * GB, GB)}, 2 * GB),
    "v2, none": ("0::/job\n", {"job": ("memory.max", "max", "memory.current", 3 * GB)}, 8 * GB),
    "v2, of a group around it": (
        "0::/job/step/task\n",
        {
            "job/step/task": ("memory.max", "max", "memory.current", GB),
            "job": ("memory.max", 6 * GB, "memory.current", GB),
        },
        5 * GB,
    ),
    "v2, of a container": ("0::/\n", {".": ("memory.max", 2 * GB, "memory.current", GB)}, GB),
    "v2, used up": ("0::/job\n", {"job": ("memory.max", GB, "memory.current", 2 * GB)}, 0),
    "v1": (
        "5:cpu,cpuacct:/other\n4:memory:/slurm/job\n0::/\n",
        {"memory/slurm/job": ("memory.limit_in_bytes", 3 * GB, "memory.usage_in_bytes", GB, GB // 2)},
        2 * GB + GB // 2,
    ),
    "v1, no limit": (
        "4:memory:/\n",
        {"memory": ("memory.limit_in_bytes", 1 << 62, "memory.usage_in_bytes", GB)},
        8 * GB,
    ),
    "none that says anything": ("0::/job\n", {}, 8 * GB),
    "no groups": (None, {}, 8 * GB),
}


@pytest.mark.parametrize("which", LIMITS)
def test_memory_that_is_left_is_the_least_of_the_node_and_of_the_groups_of_the_process(
    tmp_path: Path, which: str
) -> None:
    own, groups, left = LIMITS[which]
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {8 << 20} kB\nCached: 7 kB\n")
    if own is not None:
        (tmp_path / "proc/self/cgroup").write_text(own)
    for name, (limit, most, used, now, *files) in groups.items():
        group = tmp_path / "groups" / name
        group.mkdir(parents=True, exist_ok=True)
        (group / limit).write_text(f"{most}\n")
        (group / used).write_text(f"{now}\n")
        (group / "memory.stat").write_text(f"anon 77\ninactive_file {(files or [0])[0]}\nactive_file 5\n")
    assert memory_available(tmp_path / "proc", tmp_path / "groups") == left


def test_memory_that_is_left_on_a_machine_that_says_nothing(tmp_path: Path) -> None:
    assert memory_available(tmp_path, tmp_path) == 0
    assert memory_available() > 0
    (tmp_path / "meminfo").write_text(f"MemAvailable: {8 << 20} kB\n")
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("0::/job\n")
    (tmp_path / "job").mkdir()
    for name, text in (("memory.max", str(GB)), ("memory.current", "1"), ("memory.stat", "anon 5\n")):
        (tmp_path / "job" / name).write_text(text)
    assert memory_available(tmp_path, tmp_path) == 8 * GB  # of another kernel, whose groups do not say enough
