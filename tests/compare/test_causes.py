"""What is named as the cause of another result, for runs that are described and not made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpiml.compare.causes import explain
from mpiml.compare.sides import RUN, Side

DATA = [["digits.npz", "56,779 bytes, samples 3c"]]


def side(name: str, settings: dict[str, Any] | None = None, cpu: str = "EPYC", **others: Any) -> Side:
    rank = {"host": f"n{name}", "cpu": cpu, "blas": "openblas 1 (Zen)"}
    about = {"mpiml": "0.1", "python": "3.11.7", "mpi": "MPICH 5.0.2", "packages": {"numpy": "2.4.0"}, "data": DATA}
    return Side(name, Path(name), RUN, settings=settings or {"seed": 0}, environment=about | {"ranks": [rank]} | others)


def likely(a: Side, b: Side) -> list[str]:
    return explain(a, b).likely


def test_nothing_explains_equal_descriptions() -> None:
    (where,) = likely(side("A"), side("B"))
    assert where == (
        "nothing that is known of them explains it: look for memory errors, a faulty node or disk; "
        "A ran on nA, B ran on nB"
    )


def test_code_of_the_user_may_be_the_cause() -> None:
    (where,) = likely(*(side(name, {"model": "mymodel:wide"}) for name in "AB"))
    assert "a faulty node, or code of your own (mymodel:wide) that has changed or is not deterministic" in where


def test_causes_come_in_the_order_in_which_they_explain() -> None:
    a = side("A", {"microbatches": 4, "seed": 0, "log-every": 1})
    b = side("B", {"microbatches": 2, "seed": 1, "log-every": 2}, cpu="Xeon", data=[["digits.npz", "9 bytes"]])
    assert likely(a, b) == [
        "other micro-batches: --microbatches 4 in A, 2 in B; equal bits need equal ones",
        "other settings: --seed 0 in A, 1 in B",
        "other data: digits.npz has 56,779 bytes, samples 3c in A, but 9 bytes in B",
        "another processor: processor EPYC in A, Xeon in B",
    ]
    assert [str(setting) for setting in explain(a, b).others] == ["--log-every 1 in A, 2 in B"]


@pytest.mark.parametrize(
    ("one", "other", "changes"),
    [
        ({"init": "/a"}, {}, True),
        ({"pipe": 2}, {"pipe": 1}, False),
        ({"threads": 2}, {}, True),  # another version of mpiml may not write what is at its default
        ({"threads": 1}, {}, False),
        ({"decay-steps": 5}, {"decay-steps": 9}, False),
        ({"decay-steps": 5, "decay": "cosine"}, {"decay-steps": 9, "decay": "cosine"}, True),
        ({"steps": 5}, {"steps": 9}, False),
        ({"steps": 5, "average-every": 4}, {"steps": 9, "average-every": 4}, True),
        ({"out": "a"}, {"out": "b"}, False),
        ({"data": "/a/digits.npz"}, {"data": "/b/digits.npz"}, False),  # by their fingerprint they are the same
        ({"betas": [0.9, 0.95]}, {"betas": [0.9, 0.999]}, True),
    ],
)
def test_which_settings_change_results(one: dict[str, Any], other: dict[str, Any], changes: bool) -> None:
    assert bool(explain(side("A", {"seed": 0} | one), side("B", {"seed": 0} | other)).arithmetic) == changes


def test_settings_of_one_job_are_not_those_of_a_run() -> None:
    causes = explain(side("A", {"out": "a", "seed": 0}), side("B", {"out": "b", "seed": 0}))
    assert causes.others == causes.arithmetic == []


def test_without_a_fingerprint_the_path_of_the_data_counts() -> None:
    a, b = side("A", {"data": "/a/x.npz"}), side("B", {"data": "/b/x.npz"}, data=[])
    assert likely(a, b) == ["other settings: --data /a/x.npz in A, /b/x.npz in B"]


def test_the_sum_of_the_mpi_library_explains_other_layouts() -> None:
    ranks = [{"host": "nB", "cpu": "EPYC", "blas": "openblas 1 (Zen)"}] * 4
    mpi = {"allreduce": "mpi"}
    (first,) = likely(side("A", mpi), side("B", mpi, ranks=ranks))
    assert first.startswith("--allreduce mpi with another layout: ranks 1 in A, 4 in B")
    (first,) = likely(side("A", mpi), side("B", mpi))
    assert first.startswith("--allreduce mpi: two runs on the same ranks may differ")


def test_where_a_run_was_before_counts() -> None:
    b = side("B", earlier=[{"until": 30, "NumPy": "2.3.0"}])
    assert likely(side("A"), b) == ["another NumPy: NumPy 2.4.0 in A, 2.3.0 until step 30; then 2.4.0 in B"]


def test_python_and_mpi_are_said_but_explain_nothing() -> None:
    causes = explain(side("A"), side("B", python="3.12.1", mpi="Open MPI v5.0.3"))
    assert [fact.what for fact in causes.environment] == ["Python", "MPI"]
    assert causes.likely[0].startswith("nothing")


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"ranks": []},
        {"ranks": [{}], "packages": {"numpy": None}, "data": [["a"]]},
        {"earlier": [{"NumPy": "1"}], "ranks": [{"host": 5}]},
    ],
    ids=str,
)
def test_an_odd_environment_explains_nothing(odd: dict[str, Any]) -> None:
    b = Side("B", Path("b"), RUN, settings={"seed": 0}, environment=odd)
    assert likely(side("A"), b)[0].startswith("nothing that is known of them")


def test_what_is_not_known_is_said() -> None:
    (where,) = likely(side("A"), Side("B", Path("b"), RUN))
    assert "(settings and environment of B (b) are not known)" in where
