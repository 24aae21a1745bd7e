"""Memory that the ranks of a node share: what is written is seen, and nothing of it stays behind."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.data.dataset import DIGITS
from mpiml.errors import ConfigError
from mpiml.parallel import memory as memories
from mpiml.parallel.memory import PAGE, FencedMemory, PrivateMemory, SharedMemory, share
from mpiml.vectors import bytes_of
from tests.conftest import eventually, mpirun

COMM = MPI.COMM_WORLD
KINDS = [SharedMemory, FencedMemory]


def make(kind: type[SharedMemory], own: int, common: int) -> SharedMemory:
    return kind(COMM, 2 * bytes_of(own, np.float32), bytes_of(common, np.float64))


@pytest.mark.mpi
@pytest.mark.parametrize("kind", KINDS)
def test_all_see_what_each_wrote(kind: type[SharedMemory]) -> None:
    size = 1000 + COMM.rank
    memory = make(kind, size, 10)
    everyone, common = memory.own(1 + COMM.rank % 2, 1000, np.float32), memory.common(10, np.float64)
    assert [len(vectors) for vectors in everyone] == [1 + rank % 2 for rank in range(COMM.size)]
    zero = not any(vector.any() for vectors in everyone for vector in vectors)
    memory.barrier()
    assert zero
    for index, vector in enumerate(everyone[COMM.rank]):
        assert vector.ctypes.data % 64 == 0
        vector[:] = 10 * COMM.rank + index
    memory.barrier()
    for rank, vectors in enumerate(everyone):
        for index, vector in enumerate(vectors):
            assert (vector == 10 * rank + index).all()
    if COMM.rank == 0:
        common[:] = np.arange(10)
    memory.barrier()
    assert (common == np.arange(10)).all()


@pytest.mark.mpi
@pytest.mark.parametrize("kind", KINDS)
def test_barrier_lets_nobody_go_early(kind: type[SharedMemory]) -> None:
    """A counter that every rank advances in turn comes out wrong if one barrier lets one rank through."""
    memory = make(kind, 1, 1)
    counter = memory.common(1, np.float64)
    for turn in range(200):
        if turn % COMM.size == COMM.rank:
            counter[0] += 1
        memory.barrier()
        assert counter[0] == turn + 1
        memory.barrier()


@pytest.mark.mpi
@pytest.mark.parametrize("kind", KINDS)
def test_what_all_have_posted_can_be_read(kind: type[SharedMemory]) -> None:
    memory = make(kind, 64, 1)
    everyone, seen = memory.own(1, 64, np.float32), []
    for turn in range(1, 50):
        everyone[COMM.rank][0][:] = turn
        memory.post(turn)
        if memory.posted() >= turn:
            seen.append(all((vector[0] >= turn).all() for vector in everyone))
    assert all(seen)
    COMM.Barrier()
    assert memory.posted() == (49 if kind is SharedMemory else 0)  # the other cannot know


@pytest.mark.mpi
@pytest.mark.parametrize("kind", KINDS)
def test_action_is_done_when_all_have_come_and_before_any_goes(kind: type[SharedMemory]) -> None:
    memory = make(kind, 1, COMM.size + 1)
    board = memory.common(COMM.size + 1, np.float64)

    def add() -> None:
        board[-1] = board[:-1].sum()

    for turn in range(50):
        board[COMM.rank] = turn * (COMM.rank + 1)
        memory.barrier(add)
        assert board[-1] == turn * COMM.size * (COMM.size + 1) / 2
        memory.barrier()


@pytest.mark.mpi
def test_a_name_is_used_where_there_is_no_other_way_and_is_gone_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> tuple[int, str]:
        raise OSError(38, "not here")

    monkeypatch.setattr(memories, "_nameless", refuse)
    before = set(os.listdir("/dev/shm"))
    COMM.Barrier()
    memory = make(SharedMemory, 10, 10)
    COMM.Barrier()
    assert not {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("mpiml")}
    memory.common(10, np.float64)[COMM.rank % 10] = 1
    memory.barrier()


@pytest.mark.mpi
def test_a_python_without_memfd_create_shares_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    memory, problem = share(COMM, COMM, PAGE, PAGE, "shared")
    assert isinstance(memory, SharedMemory)
    assert problem is None


@pytest.mark.mpi
def test_another_file_under_the_same_name_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where ranks have process numbers of their own: what rank 0 calls /proc/PID/fd/N is another's data set."""
    own_file = tmp_path / "data"
    own_file.write_bytes(b"a data set")
    everyones = [Path(path) for path in COMM.allgather(str(own_file))]

    def misleading() -> tuple[int, str]:
        return os.memfd_create("mpiml"), str(everyones[-1])

    def refuse() -> tuple[int, str]:
        raise OSError(38, "not here")

    monkeypatch.setattr(memories, "_nameless", misleading)
    assert make(SharedMemory, 10, 10).ranks == COMM.size  # by a file that has a name
    monkeypatch.setattr(memories, "_named", refuse)
    memory, problem = share(COMM, COMM, PAGE, PAGE, "auto")
    assert isinstance(memory, PrivateMemory) == (COMM.size > 1)
    assert COMM.size == 1 or "cannot be shared" in str(problem)
    COMM.Barrier()
    assert own_file.read_bytes() == b"a data set"


def test_a_file_that_a_killed_job_left_behind_goes_with_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memories, "SHM", str(tmp_path))
    old, new = tmp_path / "mpiml-old", tmp_path / "mpiml-new"
    for file in (old, new, tmp_path / "other"):
        file.write_text("")
    for file in (old, tmp_path / "other"):
        os.utime(file, (time.time() - 2 * memories.LEFT_BEHIND,) * 2)
    descriptor, path = memories._named()
    os.close(descriptor)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["mpiml-new", "other", Path(path).name])


@pytest.mark.contract
def test_ranks_in_containers_train_together(tmp_path: Path) -> None:
    """Each rank with process numbers of its own, and all files of its own mapped at low numbers of descriptors."""
    apart = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*apart, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no namespaces of process numbers can be made here")
    for key, array in np.load(DIGITS).items():
        np.save(tmp_path / f"{key}.npy", array)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    program = [sys.executable, "-m", "mpiml.train", "--data", str(tmp_path), "--memory", "shared", "--steps", "5"]
    command = ["timeout", "--kill-after=5", "30", *mpirun(2), *apart, *program, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.mpi
def test_without_room_all_fall_back_together_and_say_so() -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if COMM.rank == 0:  # who sizes the file
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        memory, problem = share(COMM, COMM, 1 << 20, 1 << 20, "auto")
        assert isinstance(memory, PrivateMemory)
        assert problem is not None
        assert f"{COMM.size + 1} MiB" in problem
        with pytest.raises(ConfigError, match="--memory shared") as raised:
            share(COMM, COMM, 1 << 20, 1 << 20, "shared")
        assert raised.value.everywhere
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.contract
def test_nothing_stays_behind_after_kill_9(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    command = [*mpirun(3), sys.executable, "-m", "mpiml.train", "--steps", "100000", "--out", str(tmp_path / "run")]
    job = subprocess.Popen([*command, "--memory", "shared"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert eventually((tmp_path / "run" / "metrics.jsonl").exists)
    ranks = [
        int(pid)
        for pid in subprocess.run(
            ["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=True
        ).stdout.split()
    ]
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    job.wait(10)
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "mpiml" in name}
