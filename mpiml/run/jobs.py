"""The jobs of a run in its environment.json: after which step each of them began; no MPI."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Required, TypedDict, get_type_hints

from mpiml.documents import check_fields
from mpiml.run.directory import ENVIRONMENT

JOBS = 1000  # of a run that are kept, the last ones


class Job(TypedDict, total=False):
    """A job of a run, in the list `jobs`."""

    after: Required[int]  # the step that it went on from; 0 for a run's first job
    ranks: int  # that worked
    pipe: int  # stages
    steps_per_epoch: int
    rows_per_step: float  # on average
    at: str  # when it began, as 2026-11-27T15:30:00Z


def jobs_of(run: Path, content: Mapping[str, Any]) -> list[Job]:
    """The jobs of the run in a directory, in their order, by the content of its environment.json; none if an older
    version of mpiml has written it. Raises OutputError if the list is damaged."""
    kinds, origin = get_type_hints(Job), f"{run / ENVIRONMENT}, jobs,"
    return [check_fields(job, kinds, origin, ("after",)) for job in content.get("jobs", ())]  # type: ignore[misc]


def with_job(
    before: Mapping[str, Any], after: int, ranks: int, pipe: int, steps_per_epoch: int, rows_per_step: float
) -> list[Job]:
    """The jobs that the last job's environment.json lists, and one that begins now, after a step."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    job = Job(after=after, ranks=ranks, pipe=pipe, steps_per_epoch=steps_per_epoch, rows_per_step=rows_per_step, at=now)
    return [*before.get("jobs", ()), job][-JOBS:]
