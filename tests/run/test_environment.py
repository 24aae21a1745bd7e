"""What environment.json says of a run's jobs, what is read back from it, and what a job that runs elsewhere is told."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpiml
from mpiml.errors import OutputError
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


def test_different_processors_or_kernels_are_a_warning() -> None:
    one = {"cpu": "A", "blas": "openblas 1 (Zen)"}
    assert environment.warnings([one, one]) == []
    assert ["A; B" in text for text in environment.warnings([one, one | {"cpu": "B"}])] == [True]
    assert ["Zen); x" in text for text in environment.warnings([one, one | {"blas": "x"}])] == [True]


def test_another_device_is_a_change_and_an_unknown_one_is_none() -> None:
    on = {kind: job(ranks=[{"host": "a", "cpu": "EPYC", "device": kind}]) for kind in ("H100", "the processor")}
    _, (warning,) = environment.going_on(on["H100"], on["the processor"], 30)
    assert warning.startswith("since the last job device is the processor (was H100): bits may")
    assert environment.going_on(job(), on["H100"], 30)[1] == []  # a version that did not write it


@pytest.mark.parametrize("text", ["[]", '{"data": 5}', '{"data": "abc"}', '{"data": [["a", 1]]}', "[" * 100_000, "{"])
def test_a_damaged_environment_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "environment.json").write_text(text)
    with pytest.raises(OutputError, match=r"environment.json is damaged: .*; if you remove it"):
        environment.data(tmp_path)
    assert environment.host(tmp_path, 0) == "unknown"  # a name in a message: no reason to end a run


def test_the_environment_of_a_run(tmp_path: Path) -> None:
    assert environment.data(tmp_path) is None
    (tmp_path / "environment.json").write_text('{"data": [["a", "b"]], "ranks": [{"host": "n1"}, {"host": "n2"}]}')
    assert environment.data(tmp_path) == [["a", "b"]]
    assert [environment.host(tmp_path, rank) for rank in range(3)] == ["n1", "n2", "unknown"]


def test_what_the_file_does_not_say_is_not_known(tmp_path: Path) -> None:
    assert environment.read(tmp_path) == {}  # there is none
    assert environment.host(tmp_path, 0) == "unknown"
    (tmp_path / "environment.json").write_text("{}")
    assert environment.read(tmp_path) == {}
    assert environment.host(tmp_path, 0) == "unknown"


def test_what_a_rank_runs_on() -> None:
    rank = environment.of_rank(3)
    assert list(rank) == ["host", "cpu", "cores", "threads", "device", "blas", "pid"]
    assert [rank["device"], environment.of_rank(3, "H100")["device"]] == ["the processor", "H100"]
    assert (rank["host"], rank["threads"], rank["pid"]) == (os.uname().nodename, 3, os.getpid())
    assert rank["cores"] == len(os.sched_getaffinity(0))
    assert rank["blas"] == environment.blas()


def test_what_a_job_runs_on_can_be_read_back(tmp_path: Path) -> None:
    ranks = [environment.of_rank(1), environment.of_rank(2)]
    about = environment.of_job(ranks, "MPICH 5.0.2", [["x_train", "ab12"]])
    (tmp_path / "environment.json").write_text(json.dumps(about))
    assert environment.read(tmp_path) == about
    assert about["ranks"] == ranks
    assert about["packages"] == {name: version(name) for name in environment.PACKAGES}
    assert (about["mpiml"], about["python"]) == (mpiml.__version__, platform.python_version())
    assert list(environment.essentials(about)) == ["processor", "device", "BLAS", "NumPy", "Python", "MPI", "mpiml"]


def test_a_package_that_is_not_there_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("numpy", "no_such_package"))
    assert environment.of_job([], "", [])["packages"] == {"numpy": np.__version__, "no_such_package": None}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel name\t: A CPU: fast\nmodel name\t: another\n", "A CPU: fast"),
        ("processor\t: 0\n", os.uname().machine),
        (None, os.uname().machine),
    ],
    ids=["named", "not named", "no file"],
)
def test_the_processors_name(monkeypatch: pytest.MonkeyPatch, text: str | None, name: str) -> None:
    def read(path: Path) -> str:
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, "read_text", read)
    assert environment.cpu_model() == name


class Pools:
    """Thread pools as threadpoolctl tells of them."""

    def __init__(self, *libraries: dict[str, Any]):
        self.libraries = list(libraries)

    def info(self) -> list[dict[str, Any]]:
        return self.libraries


OPENMP = {"user_api": "openmp", "internal_api": "openmp", "version": None}
OPENBLAS = {"user_api": "blas", "internal_api": "openblas", "version": "0.3.31", "architecture": "Haswell"}
BLIS = {"user_api": "blas", "internal_api": "blis", "version": "0.9"}


@pytest.mark.parametrize(
    ("pools", "name"),
    [
        (Pools(OPENMP, OPENBLAS), "openblas 0.3.31 (Haswell)"),
        (Pools(OPENBLAS, BLIS), "openblas 0.3.31 (Haswell), blis 0.9 ()"),
        (Pools(OPENMP), "unknown"),
    ],
    ids=["one", "two", "none"],
)
def test_the_blas_library_and_its_kernels(monkeypatch: pytest.MonkeyPatch, pools: Pools, name: str) -> None:
    monkeypatch.setattr(environment, "thread_pools", lambda: pools)
    assert environment.blas() == name
