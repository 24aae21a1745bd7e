"""When jobs/train_resume.sbatch starts a run again, where SLURM's commands are stand-ins."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.test_site import JOB, ROOT, executable, told

SRUN = """
[[ "$*" != *stand_by* ]] || exit
if [[ "$*" == *SLURMD_NODENAME* ]]; then printf '%s\\n' $LEFT; exit; fi
echo "start $*" >>CALLS
mkdir -p OUT/checkpoints
[[ -z $SAVES ]] || touch OUT/checkpoints/step-$(wc -l <CALLS).safetensors
exit $CODE"""
STAND_INS = {
    "srun": SRUN,
    "squeue": "echo n0,n1,n2",
    "scontrol": "if [[ $1 == requeue ]]; then echo requeue >>CALLS; exit 1; fi; echo $3 | tr , '\\n'",
    "python": "exit 1",  # there is no result.json
}


def calls(path: Path, **environment: str) -> list[str]:
    """What a job of three nodes and six ranks does: starts of the run, with the flags of the launcher, and requeues."""
    for name, script in STAND_INS.items():
        executable(path / "programs" / name, script.replace("CALLS", f"{path}/calls").replace("OUT", f"{path}/run"))
    job = {"SLURM_NTASKS": "6", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "n0,n1,n2", "SLURMD_NODENAME": "n0"}
    env = os.environ | JOB | job | {"OUT": str(path / "run"), "PYTHON": "python", "TMPDIR": str(path), "LAUNCH": "srun"}
    env |= {"PATH": f"{path}/programs:{os.environ['PATH']}", "SAVES": "", "CODE": "137"} | environment
    subprocess.run(
        ["bash", "jobs/train_resume.sbatch"], check=False, capture_output=True, env=env, cwd=ROOT, timeout=120
    )
    lines = (path / "calls").read_text().splitlines()
    return [line.partition(" python")[0].removeprefix("start ") for line in lines]


def test_a_run_that_has_saved_starts_again_on_the_nodes_that_answer(tmp_path: Path) -> None:
    """Once, for then none of them is missing; the next job has all nodes again."""
    fewer = "--nodes=2 --ntasks=4 --nodelist=n0,n2"
    assert calls(tmp_path, LEFT="n0 n2", SAVES="yes") == ["start", fewer, "requeue"]


@pytest.mark.parametrize("environment", [{"SAVES": ""}, {"SAVES": "yes", "MAX_RESTARTS": "0"}])
def test_not_without_progress_and_not_for_ever(tmp_path: Path, environment: dict[str, str]) -> None:
    """Without progress the job goes back to the queue; when it may not start again at all, not even that."""
    expected = ["start", "requeue"][: 1 if "MAX_RESTARTS" in environment else 2]
    assert calls(tmp_path, LEFT="n0 n2", **environment) == expected


@pytest.mark.parametrize("code", ["65", "73", "74", "78"])
def test_not_after_an_error_that_another_start_would_repeat(tmp_path: Path, code: str) -> None:
    assert calls(tmp_path, LEFT="n0 n2", SAVES="yes", CODE=code) == ["start"]


@pytest.mark.parametrize("left", ["n0 n1 n2", ""])
def test_not_if_no_node_is_known_to_be_lost(tmp_path: Path, left: str) -> None:
    assert calls(tmp_path, LEFT=left, SAVES="yes") == ["start"]


@pytest.mark.parametrize(("nodes", "seconds", "code"), [("n0,n2", 90, "137"), ("n0,n1,n2", 2, "0")])
def test_a_launcher_that_outlives_a_node_is_killed(tmp_path: Path, nodes: str, seconds: int, code: str) -> None:
    executable(tmp_path / "programs/squeue", f"echo {nodes}")
    executable(tmp_path / "programs/scontrol", STAND_INS["scontrol"])
    launcher = f"sleep {seconds} & launcher=$!; end_if_stuck $launcher & wait $launcher; echo $?; kill $! 2>/dev/null"
    environment = {"SLURM_JOB_NODELIST": "n0,n1,n2", "POLL": "0.2", "PATH": f"{tmp_path}/programs:{os.environ['PATH']}"}
    assert told(tmp_path, f"source jobs/nodes.sh; {launcher}", **environment) == code
