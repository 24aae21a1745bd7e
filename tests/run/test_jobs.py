"""environment.json read back: the jobs of a run, also as older versions have written it, or damaged."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mpiml.errors import OutputError
from mpiml.run import environment, jobs


def test_each_job_says_where_it_began() -> None:
    first = jobs.with_job({}, 0, 16, 4, 12, 119.5)
    second = jobs.with_job({"jobs": first}, 90, 6, 2, 12, 119.5)
    assert [(job["after"], job["ranks"], job["pipe"]) for job in second] == [(0, 16, 4), (90, 6, 2)]
    assert (second[1]["steps_per_epoch"], second[1]["rows_per_step"]) == (12, 119.5)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", second[1]["at"])
    assert jobs.jobs_of(Path("run"), {"jobs": second}) == second


def test_the_list_does_not_grow_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "JOBS", 3)
    before: dict[str, list[jobs.Job]] = {"jobs": []}
    for step in range(5):
        before = {"jobs": jobs.with_job(before, step, 1, 1, 1, 1.0)}
    assert [job["after"] for job in before["jobs"]] == [2, 3, 4]


def test_an_older_file_lists_none_and_a_damaged_list_is_one_line(tmp_path: Path) -> None:
    assert environment.read(tmp_path) == {}
    assert jobs.jobs_of(tmp_path, {"earlier": []}) == []
    (tmp_path / "environment.json").write_text(json.dumps({"jobs": 5}))
    with pytest.raises(OutputError, match=r"environment.json is damaged: jobs is 5"):
        environment.read(tmp_path)
    for job in ({"ranks": 1}, {"after": "0"}, {"after": 0, "at": 5}):
        with pytest.raises(OutputError, match=r"environment.json, jobs, is damaged: "):
            jobs.jobs_of(tmp_path, {"jobs": [job]})
