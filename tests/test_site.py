"""What jobs/site.sh tells of runs and studies, without SLURM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
JOB = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "x", "SLURM_JOB_END_TIME": "0"}


def told(out: Path, command: str, python: str = sys.executable) -> str:
    env = os.environ | JOB | {"OUT": str(out), "PYTHON": python}
    script = ["bash", "-c", f"source jobs/site.sh; {command}"]
    return subprocess.run(script, check=False, capture_output=True, text=True, env=env, cwd=ROOT).stdout.strip()


@pytest.mark.parametrize(("reason", "end"), [(None, "step 7"), ("asked to stop", "step 7, asked to stop")])
def test_a_run_has_a_reason_or_none(tmp_path: Path, reason: str | None, end: str) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"status": "stopped", "step": 7, "reason": reason}))
    assert told(tmp_path, "outcome 75") == f"exit code 75; {tmp_path}: stopped, {end}"


@pytest.mark.parametrize(("count", "end"), [(None, "unknown, for there is no report"), (0, "0"), (3, "3")])
def test_open_jobs_of_a_study_are_told(tmp_path: Path, count: int | None, end: str) -> None:
    report = "true" if count is None else f"""echo '{{"open": {count}}}' > {tmp_path}/scaling.json"""
    python = tmp_path / "python"  # runs no study
    python.write_text(f'#!/bin/bash\n[[ $1 != -c ]] || exec {sys.executable} "$@"\n[[ $3 != report ]] || {report}\n')
    python.chmod(0o755)
    assert (
        told(tmp_path, "study weak", str(python)).splitlines()[-1].endswith(f"jobs of the study that are open: {end}")
    )
