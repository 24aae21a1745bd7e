"""A run in which gradients are summed at first and workers learn apart later, on one rank and on several."""

from __future__ import annotations

import pytest
from mpi4py import MPI

from mpiml.config import Config
from mpiml.data.dataset import open_dataset
from mpiml.errors import freed
from mpiml.training.run import unsaved

WORLD = MPI.COMM_WORLD


@pytest.mark.mpi
def test_bytes_sent_go_on_when_workers_begin_to_learn_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIML_NODES", ",".join("1" * WORLD.size))
    settings = Config(average_every=2, average_from=3, workers=WORLD.size, steps=8, log_every=1, eval_every=0)
    run = unsaved(WORLD, settings, open_dataset("digits"))
    with freed(run, WORLD.size), run.data.ahead:
        sent = [done.sent for step in (1, 2, 3, 5, 7) for done in run.advance(step).steps]
    assert sent == sorted(sent)
    assert WORLD.size == 1 or 0 < sent[0] < sent[1] < sent[3] < sent[5] < sent[7]
    assert sent[1] == sent[2]  # nothing within a round
