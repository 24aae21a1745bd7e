"""Programs with a DataParallel as jobs of their own: the examples, and ranks that leave, fail or stall, unguarded."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conftest import launch

pytest.importorskip("torch")

from mpiml.examples import own_loop_torch

pytestmark = pytest.mark.contract

LOOP = """
import sys, time
import torch
import mpiml.torch

net = mpiml.torch.DataParallel(torch.nn.Linear(5, 3), stall_timeout=3)
for batch in range(6):
    if batch == 3 and mpiml.torch.rank() == 1:
        {does}
    net(torch.ones(2, 5)).sum().backward()
"""


def last_line(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


def test_exact_steps_have_the_same_bits_on_any_ranks_and_nodes() -> None:
    layouts = (0, ""), (3, "2,1"), (4, "")
    done = [launch(n, "-m", "mpiml.examples.own_loop_torch", MPIML_NODES=nodes) for n, nodes in layouts]
    assert len({text.stdout for text in done}) == 1
    word, digest = last_line(done[0])
    assert (word, len(digest)) == ("weights_sha256", 64)
    assert float(done[0].stdout.split()[1]) < 0.5
    assert len(Path(own_loop_torch.__file__).read_text().splitlines()) < 40


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("break", "rank 1 left after call 3; rank 0 came to backward(), call 4"),
        ("sys.exit(0)", "rank 1 left after call 3; rank 0 came to backward(), call 4"),
        ("raise ValueError('oh dear')", "ValueError: oh dear (rank 1, step 3, compute)"),
        ("time.sleep(60)", "rank 1 has made no progress for 3 s, in step 3 (compute)"),
    ],
)
def test_a_rank_that_comes_no_more_is_named(does: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(LOOP.format(does=does))
    done = launch(2, str(tmp_path / "loop.py"), limit=50)
    assert done.returncode
    assert f"loop.py: {said}" in done.stderr.replace("the ranks of a DataParallel are at different calls: ", "")


def test_torchrun_makes_no_ranks(tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(LOOP.format(does="pass"))
    done = launch(0, str(tmp_path / "loop.py"), TORCHELASTIC_RUN_ID="none", WORLD_SIZE="2")
    assert done.returncode
    assert "ConfigError: 2 processes were started, but" in done.stderr.splitlines()[-1]
