"""The doctor: what it makes of facts, and that it finds them on real ranks."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mpiml.doctor.facts import Facts, Place
from mpiml.doctor.judge import Finding, judge, screen
from tests.conftest import launch

GOOD = Place("n0", "Xeon", [0, 1, 2, 3], 4, "openblas 0.3 (Haswell)", 8 << 30, 1.0, {"NumPy": "2"})


def facts(ranks: int = 4, nodes: int = 1, **changes: object) -> Facts:
    """Of a job with nothing wrong: each rank bound to a core of its own."""
    per_node = ranks // nodes
    places = [
        dataclasses.replace(GOOD, host=f"n{rank // per_node}", cores=[rank % per_node, 99][: 1 + (ranks == 1)])
        for rank in range(ranks)
    ]
    base = Facts(
        mpi="MPICH 5",
        threads=True,
        node=[rank // per_node * per_node for rank in range(ranks)],
        places=places,
        gemm_alone=100e9,
        gemm=[95e9] * ranks,
        copy=[20e9] * ranks,
        allreduce=[(8, 2e-6)],
        inside=(1e-6, 5e9),
        between=(2e-6, 10e9) if nodes > 1 else None,
        skew={node * per_node: 0.0 for node in range(nodes)},
    )
    return dataclasses.replace(base, **changes)


def places(base: Facts, **changes: object) -> list[Place]:
    return [dataclasses.replace(place, **changes) for place in base.places]


def not_ok(findings: list[Finding]) -> dict[str, tuple[str, str]]:
    return {finding.name: (finding.verdict, finding.advice) for finding in findings if finding.verdict != "ok"}


@pytest.mark.parametrize(("ranks", "nodes"), [(2, 1), (4, 1), (8, 2), (64, 16)])
def test_nothing_wrong(ranks: int, nodes: int) -> None:
    findings = judge(facts(ranks, nodes))
    assert not_ok(findings) == {}
    assert len(screen(findings).splitlines()) <= 24


def test_one_rank_is_told_how_to_start_more() -> None:
    assert "mpirun" in not_ok(judge(facts(1)))["MPI"][1]


def test_ranks_bound_to_one_core() -> None:
    base = facts(4)
    shared = [dataclasses.replace(place, cores=[rank // 2]) for rank, place in enumerate(base.places)]
    verdict, advice = not_ok(judge(dataclasses.replace(base, places=shared)))["node n0"]
    assert (verdict, "--bind-to core" in advice) == ("problem", True)


def test_more_ranks_than_cores() -> None:
    base = facts(4)
    of_two = places(base, cores=[0, 1], node_cores=2)
    verdict, advice = not_ok(judge(dataclasses.replace(base, places=of_two)))["node n0"]
    assert (verdict, "more ranks than cores" in advice) == ("note", True)


def test_ranks_that_take_turns_while_cores_are_free() -> None:
    base = facts(4)
    findings = judge(dataclasses.replace(base, places=places(base, cores=[0, 1])))
    verdict, advice = not_ok(findings)["node n0"]
    assert (verdict, "bound to 2 of 4 cores" in advice) == ("problem", True)
    (line,) = (finding.value for finding in findings if finding.name == "node n0")
    assert "4 ranks, 2 of 4 cores, bound" in line


def test_more_threads_than_cores() -> None:
    findings = judge(facts(2, blas_threads=3))
    assert not_ok(findings)["node n0"][0] == "problem"  # bound to two cores of four
    base = facts(2, blas_threads=3)
    findings = judge(dataclasses.replace(base, places=places(base, cores=[0, 1, 2, 3])))
    verdict, advice = not_ok(findings)["node n0"]
    assert (verdict, "2 ranks of 3 threads need 6 cores" in advice) == ("problem", True)
    (line,) = (finding.value for finding in findings if finding.name == "node n0")
    assert "2 ranks of 3 threads, 4 cores" in line
    assert not_ok(judge(dataclasses.replace(base, places=places(base, cores=[0, 1, 2, 3]), blas_threads=2))) == {}


def test_different_software_is_a_problem() -> None:
    base = facts(4)
    mixed = [*base.places[1:], dataclasses.replace(base.places[0], software={"NumPy": "1"})]
    findings = not_ok(judge(dataclasses.replace(base, places=mixed)))
    assert {name: verdict for name, (verdict, _) in findings.items()} == {"NumPy": "problem"}


def test_ranks_that_may_use_all_cores_are_fine() -> None:
    base = facts(4)
    assert not_ok(judge(dataclasses.replace(base, places=places(base, cores=[0, 1, 2, 3])))) == {}


def test_a_slow_rank_is_named() -> None:
    findings = not_ok(judge(facts(4, gemm=[95e9, 95e9, 50e9, 95e9], copy=[20e9, 9e9, 20e9, 20e9])))
    assert "rank 2 (n0)" in findings["products"][1]
    assert "rank 1 (n0)" in findings["copying"][1]


def test_ranks_that_slow_each_other_down() -> None:
    assert "slow each other" in not_ok(judge(facts(4, gemm=[40e9] * 4)))["products"][1]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"inside": (80e-6, 5e9)}, "on a node"),
        ({"between": (300e-6, 1e8)}, "between nodes"),
        ({"skew": {0: 0.0, 2: -7.5}}, "node n1"),
        ({"threads": False}, "MPI"),
    ],
)
def test_what_else_can_be_wrong(changes: dict[str, object], name: str) -> None:
    assert set(not_ok(judge(facts(4, 2, **changes)))) == {name}


def test_differing_ranks() -> None:
    base = facts(4)
    mixed = [dataclasses.replace(base.places[0], cpu="EPYC", blas="mkl", age=60.0), *base.places[1:]]
    assert set(not_ok(judge(dataclasses.replace(base, places=mixed)))) == {"processor", "BLAS", "start"}


STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "0"}


@pytest.mark.contract
def test_processes_that_are_not_one_job() -> None:
    """As srun --mpi=none makes them: the first tells."""
    done = launch(0, "-m", "mpiml.doctor", **STEP, SLURM_PROCID="0")
    (line, advice) = done.stdout.splitlines()[:2]
    assert (done.returncode, line.split()[:2]) == (1, ["problem", "MPI"]), done.stderr
    assert "4 processes were started, but" in advice
    other = launch(0, "-m", "mpiml.doctor", **STEP, SLURM_PROCID="1")
    assert (other.returncode, other.stdout, other.stderr) == (0, "", "")


@pytest.mark.contract
@pytest.mark.parametrize(("flags", "named"), [(["--threads", "0"], "--threads"), (["--jsno"], "--jsno")])
def test_bad_commands_are_refused_once(flags: list[str], named: str) -> None:
    done = launch(2, "-m", "mpiml.doctor", *flags)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (78, "", 1), done.stderr
    assert named in done.stderr


@pytest.mark.contract
def test_on_real_ranks() -> None:
    done = launch(3, "-m", "mpiml.doctor", "--json", MPIML_NODES="2,1")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["facts"]["node"] == [0, 0, 2]
    assert len(content["facts"]["gemm"]) == 3
    assert all(rate > 1e8 for rate in content["facts"]["gemm"] + content["facts"]["copy"])
    assert all(1e-8 < seconds < 10 for _, seconds in content["facts"]["allreduce"])
    assert abs(content["facts"]["skew"]["2"]) < 0.1
    assert all(0.05 < place["age"] < 60 for place in content["facts"]["places"])
    assert {"MPI", "all-reduce", "between nodes", "on a node"} <= {line["name"] for line in content["findings"]}
