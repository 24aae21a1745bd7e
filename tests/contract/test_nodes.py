"""Contract test: two real nodes, each a network namespace with a name of its own, and a virtual cable between them.

Needs root, iproute2 and MPICH's mpirun, which reaches the other node by a script in place of ssh. Nothing of it has a
name outside, so it is gone with the two processes that hold the namespaces.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import launch, mpirun

pytestmark = pytest.mark.contract
ADDRESSES = ["10.77.0.1", "10.77.0.2"]
CABLE = "cable0"
# MPICH would find that both nodes are one machine, and go through its memory.
OVER_THE_CABLE = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp", "FI_TCP_IFACE": CABLE}
LIMIT = 60  # seconds of a job
SSH = """#!/bin/sh
# Called as ssh is: options, a host, and a command that is quoted for one more shell.
while [ "${1#-}" != "$1" ]; do shift; done
holder=$(cat "$(dirname "$0")/$1"); shift
eval exec nsenter --target "$holder" --net --uts -- "$@"
"""
WHERE = """
from mpi4py import MPI
from mpiml.clock import Clock
from mpiml.parallel import grid
from mpiml.team import Team
local = grid.build(Team(MPI.COMM_WORLD, Clock()), 1).local
nodes = [size for rank, size in MPI.COMM_WORLD.allgather((local.rank, local.size)) if rank == 0]
names = MPI.COMM_WORLD.gather(MPI.Get_processor_name())
if names:
    print(nodes, names)
"""
STEPS = 20
FIXED = "--microbatches 12 --batch 100 --hidden 48,40 --clip 0.3 --eval-every 0 --quiet --steps " + str(STEPS)


class Cluster:
    """Two nodes that exist as long as the block.

    Args:
        path: an empty directory, for the script that stands for ssh.

    Raises OSError or CalledProcessError where they cannot be made.
    """

    def __init__(self, path: Path, stack: ExitStack):
        self.ssh = path / "ssh"
        self.ssh.write_text(SSH)
        self.ssh.chmod(0o755)
        self.holders = [self._hold(stack) for _ in ADDRESSES]
        cable = ["type", "veth", "peer", "name", CABLE, "netns", str(self.holders[1])]
        _check(["ip", "link", "add", CABLE, "netns", str(self.holders[0]), *cable])
        for node, (address, holder) in enumerate(zip(ADDRESSES, self.holders, strict=True)):
            (path / address).write_text(str(holder))
            for command in (
                f"hostname node{node}",
                "ip link set lo up",
                f"ip address add {address}/24 dev {CABLE}",
                f"ip link set {CABLE} up",
            ):
                _check([*self.enter(node), *command.split()])
        for node, _ in enumerate(ADDRESSES):  # the kernel takes up to a second to see both ends; MPI wants it seen
            while "state UP" not in _check([*self.enter(node), "ip", "link", "show", CABLE]):
                time.sleep(0.05)

    def enter(self, node: int) -> list[str]:
        """What makes a command one of that node."""
        return ["nsenter", "--target", str(self.holders[node]), "--net", "--uts", "--"]

    def run(self, ranks: list[int], *arguments: str) -> subprocess.CompletedProcess[str]:
        """`python ARGUMENTS` on so many ranks of each node."""
        hosts = ",".join(f"{address}:{count}" for address, count in zip(ADDRESSES, ranks, strict=True))
        how = ["-launcher", "ssh", "-launcher-exec", str(self.ssh), "-hosts", hosts]
        command = [*mpirun(sum(ranks)), *how, sys.executable, *arguments]
        limited = [*self.enter(0), "timeout", "--kill-after=5", str(LIMIT), *command]
        environment = os.environ | OVER_THE_CABLE
        return subprocess.run(
            limited, env=environment, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )

    def bytes_sent(self) -> int:
        """What the first node has sent to the second."""
        counters = Path(f"/proc/{self.holders[0]}/net/dev").read_text().split(f"{CABLE}:")[1]
        return int(counters.split()[8])

    def _hold(self, stack: ExitStack) -> int:
        """A process in namespaces of its own, which ends with the block, with these tests or after some minutes."""
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--uts", "sleep", "300"]
        holder = stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        stack.callback(holder.kill)
        outside = os.readlink("/proc/self/ns/uts")
        while os.readlink(f"/proc/{holder.pid}/ns/uts") == outside:
            if holder.poll() is not None:
                raise OSError(holder.communicate()[1].strip())
            time.sleep(0.01)
        return holder.pid


def _check(command: list[str]) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    version = subprocess.run([mpirun(1)[0], "--version"], check=False, capture_output=True, text=True)
    if "HYDRA" not in version.stdout:
        pytest.skip("only MPICH's mpirun can be told how to reach a node that has no ssh")
    with ExitStack() as stack:
        try:
            nodes = Cluster(tmp_path_factory.mktemp("cluster"), stack)
        except OSError as error:
            reason = f"no network namespaces can be made here: {error}"
            if os.environ.get("CI") == "true" and os.geteuid() == 0:
                pytest.fail(reason)
            pytest.skip(reason)
        yield nodes


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the weights of one rank."""
    path = tmp_path_factory.mktemp("alone") / "run"
    done = launch(0, "-m", "mpiml.train", "--out", str(path), *FIXED.split())
    assert done.returncode == 0, done.stderr
    return json.loads((path / "result.json").read_text())["weights_sha256"]


@pytest.mark.parametrize("ranks", [[2, 2], [2, 1]])
def test_ranks_see_two_nodes(cluster: Cluster, ranks: list[int]) -> None:
    done = cluster.run(ranks, "-c", WHERE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{ranks} {['node0'] * ranks[0] + ['node1'] * ranks[1]}"


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        ([2, 2], ""),
        ([2, 2], "--bucket 0.0005"),
        ([1, 2], "--bucket 0.0005"),
        ([3, 1], "--pipe 2 --bucket 0.0005"),
    ],
)
def test_same_bits_on_two_nodes(cluster: Cluster, alone: str, tmp_path: Path, ranks: list[int], flags: str) -> None:
    sent = cluster.bytes_sent()
    done = cluster.run(ranks, "-m", "mpiml.train", "--out", str(tmp_path / "run"), *FIXED.split(), *flags.split())
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["weights_sha256"] == alone
    assert cluster.bytes_sent() - sent > STEPS * 48 * 40 * 4, "too little went over the cable"
