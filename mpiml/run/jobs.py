"""environment.json read back: what a run's jobs ran on, and after which step each of them began; no MPI."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Required, TypedDict, get_type_hints

from mpiml.documents import check_fields
from mpiml.run.directory import ENVIRONMENT, read_fields

JOBS = 1000  # of a run that are kept, the last ones
KINDS = {  # the types of the fields that are read back
    "data": list[list[str]],
    "ranks": list[dict[str, Any]],
    "packages": dict[str, str | None],
    "earlier": list[dict[str, Any]],
    "jobs": list[dict[str, Any]],
}


class Job(TypedDict, total=False):
    """A job of a run, in the list `jobs`."""

    after: Required[int]  # the step that it went on from; 0 for a run's first job
    ranks: int  # that worked
    pipe: int  # stages
    at: str  # when it began, as 2026-11-27T15:30:00Z


def read(run: Path) -> dict[str, Any]:
    """The content of environment.json in a run directory; empty if there is none. Raises OutputError if damaged."""
    return read_fields(run / ENVIRONMENT, KINDS, ())


def jobs_of(run: Path, content: Mapping[str, Any]) -> list[Job]:
    """The jobs of the run in a directory, in their order, by the content of its environment.json; none if an older
    version of mpiml has written it. Raises OutputError if the list is damaged."""
    kinds, origin = get_type_hints(Job), f"{run / ENVIRONMENT}, jobs,"
    return [check_fields(job, kinds, origin, ("after",)) for job in content.get("jobs", ())]  # type: ignore[misc]


def with_job(before: Mapping[str, Any], after: int, ranks: int, pipe: int) -> list[Job]:
    """The jobs that the last job's environment.json lists, and one that begins now, after a step."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return [*before.get("jobs", ()), Job(after=after, ranks=ranks, pipe=pipe, at=now)][-JOBS:]


def essentials(job: Mapping[str, Any]) -> dict[str, str]:
    """What bits may depend on, from the content of an environment.json that any version of mpiml wrote."""
    ranks = job.get("ranks", ())
    texts = {
        "processor": "; ".join(sorted({str(rank["cpu"]) for rank in ranks if "cpu" in rank})),
        "BLAS": "; ".join(sorted({str(rank["blas"]) for rank in ranks if "blas" in rank})),
        "NumPy": job.get("packages", {}).get("numpy"),
        "Python": job.get("python"),
        "MPI": job.get("mpi"),
        "mpiml": job.get("mpiml"),
    }
    return {name: str(text) for name, text in texts.items() if text}
