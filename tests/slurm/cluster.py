"""A real SLURM on one machine: `python -m tests.slurm.cluster` runs one until its standard input ends.

It starts munged, slurmctld and a slurmd for each node in the foreground, below a directory and on ports of its own, as
whoever calls it, and touches nothing that is installed. By whatever way its parent ends, standard input ends with it;
then all daemons and all processes of jobs are killed and the directory is removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NODES = (
    "n0",
    "n1",
    "n2",
    "n3",
    "low0",
    "odd0",
    "odd1",
    "s0",
    "s1",
    *(f"fewer{number}" for number in range(5)),
    *(f"mpirun{number}" for number in range(3)),
)  # that they have more CPUs than the machine does not matter
PR_SET_CHILD_SUBREAPER = 36  # of prctl(2)
READY = "ready"
os.environ["PATH"] += ":/usr/sbin:/sbin"  # where the daemons are, which not every shell looks at
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "unshare", "shellcheck")

# cred_expire and the intervals: a requeued job starts again after 6 seconds instead of minutes.
# config_overrides, linuxproc, task/none: nodes with more CPUs than the machine, no cgroups, no binding.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={path}/munge.sock,cred_expire=5
StateSaveLocation={path}/state
SlurmdSpoolDir={path}/spool-%n
SlurmctldPidFile={path}/slurmctld.pid
SlurmdPidFile={path}/slurmd-%n.pid
SlurmctldLogFile={path}/slurmctld.log
SlurmdLogFile={path}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=0
KillWait=5
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=n[0-3] Default=YES PreemptMode=OFF
PartitionName=low Nodes=low0 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=low0 PriorityTier=10 PreemptMode=OFF
PartitionName=odd Nodes=odd[0-1]
PartitionName=studies Nodes=s[0-1]
PartitionName=fewer Nodes=fewer[0-4]
PartitionName=mpirun Nodes=mpirun[0-2]
"""


def missing() -> list[str]:
    """The commands that a cluster needs and that are not here."""
    return [command for command in COMMANDS if not shutil.which(command)]


def install() -> None:
    """Install SLURM where that can be done: by apt-get, as root."""
    if not (missing() and os.geteuid() == 0 and shutil.which("apt-get")):
        return
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 300}
    command = (
        "apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=200 slurm-wlm munge util-linux shellcheck"
    )
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    if subprocess.run(command.split(), check=False, env=environment, **quiet).returncode:
        subprocess.run(["apt-get", "update"], check=False, **quiet)
        subprocess.run(command.split(), check=False, env=environment, **quiet)


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens at, below those that clients are given."""
    while True:
        first = random.randrange(20000, 32000)
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("", port))
            return first
        except OSError:
            continue


def configure(path: Path) -> None:
    """Write slurm.conf and the key of munge."""
    host = socket.gethostname().split(".")[0]
    user = os.environ.get("USER", "root") if os.geteuid() else "root"
    port = free_ports(1 + len(NODES))
    text = CONFIGURATION.format(path=path, host=host, user=user, port=port)
    for number, node in enumerate(NODES, port + 1):
        text += f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={number} CPUs=8 RealMemory=4000\n"
    (path / "slurm.conf").write_text(text)
    (path / "munge.key").write_bytes(os.urandom(1024))
    (path / "munge.key").chmod(0o400)
    (path / "state").mkdir()


def daemons(path: Path) -> list[list[str]]:
    """The commands that make the cluster, in the order of their start."""
    munge = f"munged --foreground --force --socket={path}/munge.sock --key-file={path}/munge.key "
    munge += f"--pid-file={path}/munged.pid --seed-file={path}/munged.seed"
    slurmd = [f"slurmd -D -N {node} -f {path}/slurm.conf" for node in NODES]
    if subprocess.run(["unshare", "--mount", "true"], check=False, stderr=subprocess.DEVNULL).returncode == 0:
        # As on real nodes: a /dev/shm of its own, and what an MPI library leaves there goes with it.
        own = "mount -t tmpfs tmpfs /dev/shm; exec"
        slurmd = [f"unshare --mount sh -c {shlex.quote(f'{own} {command}')}" for command in slurmd]
    return [shlex.split(command) for command in (munge, f"slurmctld -D -f {path}/slurm.conf", *slurmd)]


def start(path: Path) -> None:
    """Start the daemons and wait until all nodes are idle; raises TimeoutError."""
    configure(path)
    os.environ["SLURM_CONF"] = str(path / "slurm.conf")
    log = open(path / "daemons.log", "w")  # noqa: SIM115 (the daemons write it)
    for command in daemons(path):
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=path)
        if command[0] == "munged":
            wait_for_file(path / "munge.sock")
    deadline = time.monotonic() + 60
    while idle() < len(NODES):
        if time.monotonic() > deadline:
            raise TimeoutError((path / "daemons.log").read_text() + (path / "slurmctld.log").read_text())
        time.sleep(0.2)


def wait_for_file(path: Path) -> None:
    """Return when a file is there; raises TimeoutError."""
    deadline = time.monotonic() + 30
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not appear")
        time.sleep(0.05)


def idle() -> int:
    """The number of nodes that wait for jobs."""
    done = subprocess.run(["sinfo", "-h", "-N", "-o", "%N %t"], check=False, capture_output=True, text=True)
    return len({line for line in done.stdout.splitlines() if line.endswith(" idle")})


def descendants() -> list[int]:
    """All processes below this one; orphans among them are its children, for it asked to be given them."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue  # it has just ended
        if state != "Z":
            parents.setdefault(int(parent), []).append(int(stat.parent.name))
    found, todo = [], [os.getpid()]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


def stop() -> None:
    """Kill all daemons and whatever jobs have started, and wait for their end."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for process in descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.05)


def main() -> None:
    """Print the directory when the cluster is ready; end with standard input."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    path = Path(tempfile.mkdtemp(prefix="mpiml-slurm-", dir="/tmp"))  # short: the name of a socket has a limit
    try:
        start(path)
        print(READY, path, flush=True)
        sys.stdin.read()
    finally:
        stop()
        shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the end of standard input is the one way to end it
    main()
