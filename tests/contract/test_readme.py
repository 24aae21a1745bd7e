"""Every command, picture and piece of Python in the README does what it says."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mpiml.parallel.schedules import one_f_one_b
from mpiml.parallel.simulator import draw, simulate
from tests.conftest import mpirun

pytestmark = pytest.mark.contract

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def shell(text: str, cwd: Path) -> None:
    """Run the lines of a block with this Python, and the mpirun beside it, first on the PATH."""
    path = f"{Path(sys.executable).parent}:{Path(mpirun(1)[0]).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-ec", text], check=False, cwd=cwd, env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr


def test_commands(tmp_path: Path) -> None:
    for block in blocks("python"):
        named = re.match(r"# (\w+\.py)\n", block)
        (tmp_path / (named[1] if named else "page.py")).write_text(block)
    shell("python page.py", tmp_path)
    commands = [block for block in blocks("sh") if "mpiml" in block]
    assert len(commands) == 8
    for block in commands:
        if "mynet" not in block or importlib.util.find_spec("torch"):  # an extra that takes minutes to install
            shell(block, tmp_path)


def test_make_targets_exist() -> None:
    (block,) = (block for block in blocks("sh") if "make" in block)
    for target in re.findall(r"make ([\w-]+)", block):
        done = subprocess.run(["make", "-n", target], check=False, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_picture_is_the_simulators() -> None:
    assert draw(simulate(one_f_one_b, 4, 8)) + "\n" in blocks("text")


def test_exit_codes_are_the_programs() -> None:
    from mpiml import errors

    told = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.RunError)]
    assert told == {0, errors.SAVED} | {kind.exit_code for kind in kinds}
