"""What environment.json keeps of a run's jobs, and what a job that runs elsewhere is told."""

from __future__ import annotations

from typing import Any

import pytest

from mpiml.run import environment


def job(numpy: str = "2.4.0", cpu: str = "EPYC", **others: Any) -> dict[str, Any]:
    rank = {"host": "a", "cpu": cpu, "blas": "openblas 1 (Zen)", "pid": 1}
    about = {"mpiml": "0.1", "python": "3.11.7", "mpi": "MPICH 5.0.2", "packages": {"numpy": numpy}}
    return {**about, "ranks": [rank, rank | {"host": "b"}], **others}


def test_the_same_environment_is_no_change() -> None:
    moved = job(ranks=[{"host": "c", "cpu": "EPYC", "blas": "openblas 1 (Zen)", "pid": 7}])
    assert environment.going_on(job(), moved, 30) == ({**moved, "earlier": []}, [])


def test_what_bits_depend_on_is_told_and_kept() -> None:
    second, (warning,) = environment.going_on(job(), job(numpy="2.5.0", cpu="Xeon"), 30)
    assert warning.startswith("since the last job processor is Xeon (was EPYC), NumPy is 2.5.0 (was 2.4.0): bits may")
    assert second["earlier"] == [{"until": 30, "processor": "EPYC", "NumPy": "2.4.0"}]
    third, (warning,) = environment.going_on(second, job(cpu="Xeon", mpi="Open MPI v5.0.11"), 70)
    assert "NumPy is 2.4.0 (was 2.5.0), MPI is Open MPI v5.0.11 (was MPICH 5.0.2)" in warning
    assert third["earlier"][1:] == [{"until": 70, "NumPy": "2.5.0", "MPI": "MPICH 5.0.2"}]
    assert environment.going_on(third, job(cpu="Xeon", mpi="Open MPI v5.0.11"), 90) == (third, [])


def test_the_history_does_not_grow_for_ever() -> None:
    now = job()
    for step in range(2 * environment.HISTORY):
        now, _ = environment.going_on(now, job(numpy=str(step)), step)
    assert [entry["until"] for entry in now["earlier"]] == list(range(environment.HISTORY, 2 * environment.HISTORY))


@pytest.mark.parametrize(
    "odd",
    [{}, {"data": []}, {"ranks": [{}], "packages": {"numpy": None}}, {"ranks": [], "packages": {}, "earlier": []}],
    ids=str,
)
def test_what_an_odd_file_does_not_say_is_no_change(odd: dict[str, Any]) -> None:
    assert environment.going_on(odd, job(), 5) == (job(earlier=[]), [])
