"""What jobs/site.sh tells of runs and studies, without SLURM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
JOB = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "x", "SLURM_JOB_END_TIME": "0"}


def told(out: Path, command: str, python: str = sys.executable, **more: str) -> str:
    env = os.environ | JOB | {"OUT": str(out), "PYTHON": python} | more
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


def executable(path: Path, script: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def small_environment(path: Path) -> Path:
    """The Python of a virtual environment that has the packages of this one, and no others."""
    site = path / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    site.mkdir(parents=True)
    (path / "bin").mkdir()
    (path / "bin/python").symlink_to(os.path.realpath(sys.executable))
    (path / "pyvenv.cfg").write_text(f"home = {Path(os.path.realpath(sys.executable)).parent}\n")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    return path / "bin/python"


def staged(tmp_path: Path, command: str) -> list[str]:
    """What a job with STAGE prints, where sbcast and srun are stand-ins that note how they are called."""
    calls, programs = tmp_path / "calls", tmp_path / "programs"
    executable(programs / "sbcast", f'echo sbcast >>{calls}; cp "$2" "$3"')
    executable(programs / "srun", f"echo srun >>{calls}; while [[ $1 == --* ]]; do shift; done; " + 'exec "$@"')
    (tmp_path / "node").mkdir()
    path = f"{programs}:{os.environ['PATH']}"
    python = str(small_environment(tmp_path / "venv"))
    return told(tmp_path, command, python, STAGE=str(tmp_path / "node"), PATH=path).splitlines()


def test_software_that_is_staged_is_all_on_the_node(tmp_path: Path) -> None:
    """One archive is unpacked; then mpiml comes from there, but modules in the job's directory are seen too."""
    where = "import mpiml, tests.test_site, sys; print(sys.prefix, mpiml.__file__, tests.__file__, sep=chr(10))"
    program = f'cat {tmp_path}/calls; "$PYTHON" -c "{where}"; ls {tmp_path}/node'
    *calls, prefix, package, tests, left = staged(tmp_path, program)
    copy = tmp_path / "node/mpiml-1"
    assert (calls, prefix, left) == (["sbcast", "srun", "srun"], str(copy), copy.name)
    assert Path(package).is_relative_to(copy)
    assert Path(tests).is_relative_to(ROOT)
    assert not list((tmp_path / "node").iterdir())


def test_software_that_cannot_be_staged_stays_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert told(tmp_path, "echo $PYTHON", STAGE=str(tmp_path / "file")) == sys.executable
