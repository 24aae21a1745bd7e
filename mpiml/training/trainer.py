"""The package's own training step without log and checkpoints, for measuring, on any model and ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mpi4py import MPI
from numpy.typing import ArrayLike

from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.nn.layers import Layer
from mpiml.parallel import grid as grids
from mpiml.run.trace import clock_for
from mpiml.team import Team
from mpiml.training import resolve, run


class Trainer:
    """A run, of which `step` does one step after the other.

    Args:
        config: the settings, of which how many steps is not asked.
        data: the data set.
        layers: a model in place of config.model; every rank of `comm` gives it alike.
    """

    def __init__(self, comm: MPI.Intracomm, config: Config, data: Dataset, layers: Sequence[Layer] | None = None):
        replicas = comm.size // config.pipe
        config = resolve.resolve(config, len(data.train), data.classification, replicas)
        clock = clock_for(config.trace, comm.size)
        self.run = run.assemble(config, data, grids.build(Team(comm, clock), config.pipe), layers)
        self.number = 0

    def step(self) -> None:
        """One step, as in mpiml.train."""
        self.number += 1
        run = self.run
        table = run.record(run.config.microbatches or 1)
        run.stage.train(self.number, run.ahead.batches(self.number), table, measured=False)
        run.clock("communication")
        record = run.agree(table, not run.update.finite, False)
        run.update.step(run.learning_rate(self.number), record.weight, self.number, False)
        run.clock("compute")


def on_arrays(comm: MPI.Intracomm, layers: Sequence[Layer], x: ArrayLike, y: ArrayLike, **settings: object) -> Trainer:
    """A trainer of these layers on these rows; `settings` are of mpiml.config.Config."""
    data = Dataset.from_arrays(x, y, np.asarray(x)[:256], np.asarray(y)[:256])
    config = Config(steps=10**9, **settings)  # type: ignore[arg-type]
    return Trainer(comm, config, data, list(layers))
