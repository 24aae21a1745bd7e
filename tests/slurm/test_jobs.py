"""The scripts of jobs/ on a real SLURM: whatever interrupts a run, it ends with the weights of one that never stopped.

Most of the time jobs wait: for SLURM, or in steps that sleep. So all scenarios run at once, and each has a test.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.conftest import launch
from tests.slurm.conftest import Cluster, wait_until

pytestmark = pytest.mark.slurm

STEPS = 60
FLAGS = f"--steps {STEPS} --microbatches 16 --hidden 24 --save-every 5 --log-every 5"
TWO = "--nodes=1 --ntasks-per-node=2"
SLOW = {"PROGRAM": "-m tests.slurm.slow", "PACE": "0.15"}
STUDY = "--repeats 1 --steps 3 --warm-up 1"
SCENARIOS: list[Callable[[Cluster], Ended]] = []


@dataclass
class Ended:
    """What is left of a job: what SLURM says of it, its result.json, and what it printed."""

    job: dict[str, str]
    result: dict[str, Any]
    log: str
    seconds: float = 0  # from the failure of a node to the next step

    @property
    def restarts(self) -> int:
        return int(self.job["Restarts"])


def scenario(function: Callable[[Cluster], Ended]) -> Callable[[Cluster], Ended]:
    SCENARIOS.append(function)
    return function


def submit(cluster: Cluster, out: str, flags: str = "", script: str = "train_resume.sbatch", **environment: str) -> str:
    return cluster.submit(f"{TWO} {flags}", script, FLAGS, out, **(SLOW | environment))


def ended(cluster: Cluster, job: str, out: str) -> Ended:
    return Ended(cluster.wait(job), cluster.result(out), cluster.log(out))


def wait_for_checkpoint(cluster: Cluster, job: str, out: str) -> None:
    wait_until(lambda: cluster.checkpoints(out) or cluster.has_ended(job), f"a checkpoint of {out}")
    assert cluster.checkpoints(out), cluster.log(out)


@scenario
def signalled(cluster: Cluster) -> Ended:
    job = submit(cluster, "signalled", "--nodes=2 --ntasks-per-node=1")
    wait_for_checkpoint(cluster, job, "signalled")
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    return ended(cluster, job, "signalled")


@scenario
def signalled_under_mpirun(cluster: Cluster) -> Ended:
    job = submit(cluster, "under-mpirun", LAUNCH="mpirun -n 2")
    wait_for_checkpoint(cluster, job, "under-mpirun")
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    return ended(cluster, job, "under-mpirun")


@scenario
def preempted(cluster: Cluster) -> Ended:
    job = submit(cluster, "preempted", "--partition=low --exclusive")
    wait_for_checkpoint(cluster, job, "preempted")
    urgent = submit(cluster, "urgent", "--partition=urgent --exclusive", "train.sbatch", PACE="0")
    assert cluster.wait(urgent)["JobState"] == "COMPLETED"
    return ended(cluster, job, "preempted")


@scenario
def node_down(cluster: Cluster) -> Ended:
    job = submit(cluster, "node-down", "--partition=odd")
    wait_for_checkpoint(cluster, job, "node-down")
    cluster.fail(cluster.show(job)["NodeList"])
    return ended(cluster, job, "node-down")


def seconds_to_next_step(cluster: Cluster, out: str) -> float:
    """The time until a run that a node has just failed goes on in its job: until it has made a step again."""
    began = time.monotonic()
    wait_until(lambda: "going on after step" in cluster.log(out), f"{out} to go on")
    before = cluster.step(out)
    wait_until(lambda: cluster.step(out) > before, f"a step of {out}", pause=0.05)
    return time.monotonic() - began


def fewer(cluster: Cluster, out: str, **environment: str) -> tuple[str, list[str]]:
    """The number and nodes of a job that has saved, on three nodes of the partition that is named as the run."""
    flags = f"--partition={out} --nodes=3 --ntasks-per-node=2"
    job = cluster.submit(flags, "train_resume.sbatch", f"{FLAGS} --log-every 1", out, **SLOW, POLL="1", **environment)
    wait_for_checkpoint(cluster, job, out)
    host, nodes = (
        cluster.show(job)["BatchHost"],
        cluster.call("scontrol", "show", "hostnames", cluster.show(job)["NodeList"]),
    )
    return job, [host, *(node for node in nodes.split() if node != host)]


@scenario
def fewer_nodes(cluster: Cluster) -> Ended:
    """A node fails, then the one of the script, then there are three nodes again."""
    job, nodes = fewer(cluster, "fewer")
    cluster.fail(nodes[1])
    seconds = seconds_to_next_step(cluster, "fewer")
    saved = cluster.checkpoints("fewer")[-1]
    wait_until(lambda: cluster.checkpoints("fewer")[-1] > saved, "a checkpoint of two nodes")
    assert cluster.result("fewer")["ranks"] == 4
    cluster.fail(nodes[0])
    end = ended(cluster, job, "fewer")
    return replace(end, seconds=seconds)


@scenario
def fewer_nodes_under_mpirun(cluster: Cluster) -> Ended:
    """A node fails, and the launcher notices; SLURM does when the run goes on."""
    job, nodes = fewer(cluster, "mpirun", LAUNCH="mpirun -n 6")
    if not cluster.kill(nodes[1]):
        cluster.set_down(nodes[1])
    seconds = seconds_to_next_step(cluster, "mpirun")
    cluster.set_down(nodes[1])
    return replace(ended(cluster, job, "mpirun"), seconds=seconds)


@scenario
def time_limit(cluster: Cluster) -> Ended:
    """A minute, the least that SLURM knows; the steps take a little more."""
    return ended(cluster, submit(cluster, "time-limit", "--time=1 --signal=B:USR1@0", PACE="1.1"), "time-limit")


@scenario
def chain(cluster: Cluster) -> Ended:
    environment = {"OUT": str(cluster.path / "chain"), "SBATCH_OUTPUT": f"{cluster.path}/chain.log"}
    flags = [*FLAGS.split(), "--time-limit", "0:08"]
    small = {"SLURM_JOB_NUM_NODES": "1"} | SLOW | {"PACE": "0.25", "LAUNCH": "srun --mpi=pmi2 --nodes=1 --ntasks=2"}
    jobs = cluster.call("jobs/chain.sh", "4", *flags, **environment, **small).split()
    assert len(jobs) == 4
    return ended(cluster, jobs[-1], "chain")


@scenario
def broken_chain(cluster: Cluster) -> Ended:
    environment = {"OUT": str(cluster.path / "broken"), "SBATCH_OUTPUT": f"{cluster.path}/broken.log"}
    jobs = cluster.call("jobs/chain.sh", "2", "--lrr", "1", **environment).split()
    return ended(cluster, jobs[-1], "broken")


@scenario
def not_one_job(cluster: Cluster) -> Ended:
    """Four processes that do not know of each other."""
    return ended(cluster, submit(cluster, "not-one", "--ntasks-per-node=4", LAUNCH="srun --mpi=none"), "not-one")


@scenario
def array(cluster: Cluster) -> Ended:
    """Two runs; the first is seed 0, which is the default."""
    job = submit(cluster, "array", "--array=0-1", "train.sbatch", PACE="0")
    tasks = [cluster.wait(f"{job}_{task}") for task in (0, 1)]
    assert [task["JobState"] for task in tasks] == ["COMPLETED"] * 2, cluster.log("array")
    digests = [cluster.result(f"array-{task}")["weights_sha256"] for task in (0, 1)]
    assert digests[0] != digests[1]
    return Ended(tasks[0], cluster.result("array-0"), cluster.log("array"))


def study(cluster: Cluster, script: str, nodes: int, launch: str) -> Ended:
    """A study of one and two ranks in one job."""
    flags = f"--partition=studies --nodes={nodes} --ntasks-per-node={2 // nodes}"
    job = cluster.submit(flags, f"{script}.sbatch", f"{STUDY} -- --hidden 16", script, LAUNCH=launch)
    return Ended(cluster.wait(job), cluster.result(script, "scaling.json"), cluster.log(script))


@scenario
def strong_scaling(cluster: Cluster) -> Ended:
    return study(cluster, "strong_scaling", 2, "srun --mpi=pmi2 --cpu-bind=cores")


@scenario
def weak_scaling_under_mpirun(cluster: Cluster) -> Ended:
    return study(cluster, "weak_scaling", 1, "mpirun -n 2")


@scenario
def queued_study(cluster: Cluster) -> Ended:
    """Two jobs wait; asked again, nothing is submitted; one is cancelled, and only that one is submitted again."""
    out = str(cluster.path / "queued")
    command = [sys.executable, "-m", "mpiml.scaling", "run", "--slurm", "--ranks", "2", "--node-ranks", "2"]
    command += ["--out", out, *STUDY.split()]

    def run(sbatch: str) -> dict[str, str]:
        told = cluster.call(*command, "--sbatch", sbatch, "--", "--hidden", "16", LAUNCH="srun --mpi=pmi2")
        return dict(re.findall(r"^ranks (\d+), repeat 0: (.*)", told, re.MULTILINE))

    first, second = run("--partition=studies --hold"), run("--partition=studies --hold")
    jobs = {ranks: re.findall(r"submitted as job (\d+)", what)[0] for ranks, what in first.items()}
    assert second == {ranks: f"0 of {3 - int(ranks)} done; job {job} is pending" for ranks, job in jobs.items()}
    cluster.call("scontrol", "release", jobs["1"])
    cluster.call("scancel", jobs["2"])
    assert cluster.wait(jobs["1"])["JobState"] == "COMPLETED"
    third = run("--partition=studies")
    assert third["1"] == "2 of 2 done"
    job = re.findall(r"0 of 1 done; submitted as job (\d+)", third["2"])[0]
    state = cluster.wait(job)
    cluster.call(sys.executable, "-m", "mpiml.scaling", "report", out)
    return Ended(state, cluster.result("queued", "scaling.json"), "")


def check_nodes(cluster: Cluster, out: str, **environment: str) -> Ended:
    """The same run on two nodes, each by itself, with two ranks on each."""
    flags = f"{FLAGS} --log-every 1 --transform tests.slurm.faulty:flip"
    nodes = "--nodes=2 --nodelist=n2,n3 --ntasks-per-node=2"
    return ended(cluster, cluster.submit(nodes, "check_nodes.sbatch", flags, out, **environment), out)


@scenario
def sound_nodes(cluster: Cluster) -> Ended:
    return check_nodes(cluster, "sound")


@scenario
def faulty_node(cluster: Cluster) -> Ended:
    return check_nodes(cluster, "faulty", FAULTY="n3")


@pytest.fixture(scope="module")
def scenarios(cluster: Cluster) -> Iterator[dict[str, Future[Ended]]]:
    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        yield {function.__name__: pool.submit(function, cluster) for function in SCENARIOS}


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster) -> str:
    """The digest of the weights of the run that all others are compared to, on one rank and without SLURM."""
    done = launch(0, "-m", "mpiml.train", "--out", str(cluster.path / "uninterrupted"), *FLAGS.split())
    assert done.returncode == 0, done.stderr
    return str(cluster.result("uninterrupted")["weights_sha256"])


@pytest.fixture
def end(request: pytest.FixtureRequest, scenarios: dict[str, Future[Ended]]) -> Ended:
    """How the scenario ended that the test is named for."""
    return scenarios[request.function.__name__.removeprefix("test_")].result()


def assert_same_end(end: Ended, digest: str) -> None:
    assert end.job["JobState"] == "COMPLETED", f"{end.job}\n{end.log}"
    assert (end.result["status"], end.result["step"], end.result["weights_sha256"]) == ("done", STEPS, digest), end.log


def test_signalled(end: Ended, uninterrupted: str) -> None:
    assert_same_end(end, uninterrupted)
    assert end.restarts == 1
    assert "asked to stop by a signal" in end.log


def test_signalled_under_mpirun(end: Ended, uninterrupted: str) -> None:
    assert_same_end(end, uninterrupted)
    assert end.restarts == 1
    assert "asked to stop by a signal" in end.log


def test_preempted(end: Ended, uninterrupted: str) -> None:
    assert_same_end(end, uninterrupted)
    assert end.restarts == 1
    assert "asked to stop by a signal" in end.log


def test_node_down(end: Ended, uninterrupted: str) -> None:
    assert_same_end(end, uninterrupted)
    assert end.restarts == 1
    assert "going on after step" in end.log


def test_fewer_nodes(end: Ended, uninterrupted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_same_end(end, uninterrupted)
    assert (end.restarts, end.result["ranks"]) == (1, 6), end.log
    assert end.log.count("going on with these after step-") == 1
    with capsys.disabled():
        print(f"\nsrun: {end.seconds:.1f} s from the failure of a node to the next step on the others")


def test_fewer_nodes_under_mpirun(end: Ended, uninterrupted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_same_end(end, uninterrupted)
    assert (end.restarts, end.result["ranks"]) == (0, 4), end.log
    assert end.log.count("going on with these after step-") == 1
    with capsys.disabled():
        print(f"\nmpirun: {end.seconds:.1f} s from the failure of a node to the next step on the others")


def test_array(end: Ended, uninterrupted: str) -> None:
    assert_same_end(end, uninterrupted)


def test_broken_chain(end: Ended) -> None:
    """The link after the one that failed does not wait for ever."""
    assert end.job["JobState"] == "CANCELLED"
    assert end.result == {}
    assert "--lrr" in end.log


def test_not_one_job(end: Ended) -> None:
    assert end.job["JobState"] == "FAILED"
    assert end.result == {}
    assert end.log.count("mpiml.train:") == 1
    assert "4 processes" in end.log


@pytest.mark.parametrize("launcher", ["srun --mpi=pmi2 --cpu-bind=cores", "mpirun -n 16"])
def test_four_nodes_sixteen_ranks(cluster: Cluster, uninterrupted: str, launcher: str) -> None:
    out = f"sixteen-{launcher.split()[0]}"
    job = cluster.submit("", "train.sbatch", f"{FLAGS} --pipe 2", out, LAUNCH=launcher)
    end = ended(cluster, job, out)
    assert_same_end(end, uninterrupted)
    assert end.result["ranks"] == 16


def test_chain(end: Ended, uninterrupted: str) -> None:
    assert_same_end(end, uninterrupted)
    assert "stopped, step" in end.log
    assert "time is nearly up" in end.log


def test_time_limit(end: Ended, uninterrupted: str) -> None:
    assert_same_end(end, uninterrupted)
    assert end.restarts >= 1
    assert "time is nearly up" in end.log


def assert_whole_study(end: Ended) -> None:
    assert end.job["JobState"] == "COMPLETED", end.log
    assert end.result["open"] == 0
    assert {row["ranks"] for row in end.result["rows"]} == {1, 2}


def test_strong_scaling(end: Ended) -> None:
    assert_whole_study(end)


def test_weak_scaling_under_mpirun(end: Ended) -> None:
    assert_whole_study(end)


def test_queued_study(end: Ended) -> None:
    assert_whole_study(end)


def test_sound_nodes(end: Ended) -> None:
    assert end.job["JobState"] == "COMPLETED", end.log
    assert [line for line in end.log.splitlines() if "equal" in line] == ["n2: equal", "n3: equal"]


def test_faulty_node(end: Ended) -> None:
    assert end.job["JobState"] == "FAILED", end.log
    assert "n2: equal\nn3: not equal\n" in end.log
    first = re.search(r"^metrics: step (\d+) is the first to differ, of 60 steps", end.log, re.MULTILINE)
    assert first, end.log
    assert 1 < int(first[1]) < STEPS
    assert "likely cause: nothing that is known of them explains it: look for memory errors, a faulty node" in end.log


def test_shell_scripts_are_sound(cluster: Cluster) -> None:
    assert cluster.call("sh", "-c", "shellcheck jobs/*.sh jobs/*.sbatch") == ""


def test_every_scenario_has_its_test() -> None:
    assert {function.__name__ for function in SCENARIOS} <= {name.removeprefix("test_") for name in globals()}
