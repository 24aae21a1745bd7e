"""The processes of this node, as the kernel shows them; no MPI."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterator, Mapping
from pathlib import Path

from mpiml.run.alarm import RANKS

LAUNCHERS = ("hydra_pmi_proxy", "mpiexec", "mpirun", "orterun", "prterun", "prted", "orted", "srun", "slurmstepd")


class Process:
    """A process by its number; None is a process about which nothing is known: it never counts as ended."""

    def __init__(self, number: int | None):
        self._poll, self._descriptor = select.poll(), -1
        if number is not None:
            try:
                self._descriptor = os.pidfd_open(number)
            except (OSError, AttributeError):  # an old kernel, or one that is not Linux
                return
            self._poll.register(self._descriptor, select.POLLIN)

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self._descriptor >= 0 and bool(self._poll.poll(0))

    def close(self) -> None:
        """Free the descriptor; `ended` is False from now on."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def memory_available(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """The bytes of memory that are left for programs on this node, or in the job or container that this process is in:
    memory that holds copies of files is. 0 if unknown."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:  # it is not Linux
        return 0
    left = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0)
    for group in _memory_groups(proc, groups):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with contextlib.suppress(OSError, ValueError, KeyError):  # of the other version, or without limit ("max")
                most, now = (int((group / name).read_text()) for name in (limit, used))
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                left = min(left, most - now + int(statistics["inactive_file"]))
    return max(left, 0)


def _memory_groups(proc: Path, groups: Path) -> Iterator[Path]:
    """The control groups that limit the memory of this process, the innermost first."""
    file = proc / "self" / "cgroup"
    for line in file.read_text().splitlines() if file.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = groups / controllers
            group = root / path.lstrip("/")
            yield from [group, *(parent for parent in group.parents if parent.is_relative_to(root))]


def kernel() -> str:
    """Identifies the boot of a machine and a PID namespace on it, within which process numbers are unique; empty if
    unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def own_launcher(environment: Mapping[str, str] = os.environ) -> Process:
    """The process of the launcher that started this rank; Process(None) if none did."""
    started = any(name in environment for name in RANKS)
    return Process(next(launchers(), None) if started else None)


def launchers() -> Iterator[int]:
    """The process numbers of the launchers among this process's ancestors on this node, the nearest first."""
    process = os.getppid()
    try:
        while process > 1:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
            status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            if status["Name"].startswith(LAUNCHERS):
                yield process
            process = int(status["PPid"])
    except (OSError, KeyError, ValueError):
        return
