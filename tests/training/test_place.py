"""Where the vectors of workers lie in memory, on ranks that differ in what they can share."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.config import Config
from mpiml.data.dataset import open_dataset
from mpiml.errors import ConfigError, freed
from mpiml.parallel import memory
from mpiml.training.run import unsaved

pytestmark = pytest.mark.mpi
WORLD = MPI.COMM_WORLD


@pytest.fixture(autouse=True)
def _last_node_shares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes with a worker each; no memory can be shared on the second."""

    def full() -> tuple[int, str]:
        raise OSError(errno.ENOSPC, "no space left")

    half = WORLD.size // 2
    monkeypatch.setenv("MPIML_NODES", f"{half},{WORLD.size - half}")
    if WORLD.rank >= half:
        monkeypatch.setattr(memory, "_nameless", full)
        monkeypatch.setattr(memory, "_named", full)


def settings(kind: str) -> Config:
    return Config(average_every=2, workers=2, microbatches=16, steps=4, hidden=(4,), memory=kind, eval_every=0)


@pytest.mark.skipif(WORLD.size % 2 > 0, reason="needs two nodes")
def test_all_workers_refuse_if_one_cannot_share() -> None:
    with pytest.raises(ConfigError, match=r"--memory shared: .* cannot be shared \(no space left\); auto") as caught:
        unsaved(WORLD, settings("shared"), open_dataset("digits"))
    assert caught.value.everywhere


@pytest.mark.skipif(WORLD.size % 2 > 0, reason="needs two nodes")
def test_all_workers_have_private_memory_if_one_cannot_share() -> None:
    run = unsaved(WORLD, settings("auto"), open_dataset("digits"))
    with freed(run, WORLD.size), run.data.ahead:
        sharing = WORLD.allgather(run.stage.sum.values.memory.ranks)
        steps = run.advance(1).steps
    assert sharing == [1] * WORLD.size
    assert [step.step for step in steps] == [1, 2]
    assert np.isfinite(run.stage.sum.values.vector).all()
