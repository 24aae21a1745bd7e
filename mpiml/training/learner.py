"""A learner: the ranks that train one copy of the model, all of a run or those of a worker, and a step that they take
together; there is no other step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpiml.devices.host import HOST, Host
from mpiml.errors import ConfigError
from mpiml.nn.losses import Metric
from mpiml.parallel.grid import Grid
from mpiml.parallel.record import Record, agree
from mpiml.parallel.stage import Batch, TrainingStage
from mpiml.parallel.update import Update
from mpiml.partition import part_of
from mpiml.run import log
from mpiml.training.evaluation import not_finite
from mpiml.training.noise import NoiseScale
from mpiml.training.place import Agree


class Taken(NamedTuple):
    """A step that is taken: its record, its learning rate, and the norm and the noise of its gradient if they were
    computed."""

    record: Record
    rate: float
    norm: float | None
    noise: log.Noise | None = None


@dataclass(frozen=True)
class Learner:
    """A learner's part on this rank.

    Attributes:
        name: in front of messages; empty if it is the run's only one.
        first, microbatches: the number of its first micro-batch of a step, and how many it has on all its ranks.
        leaf: micro-batches of a leaf of the gradient sum.
        grid: its ranks.
        agree: (rows of this rank's micro-batches, not finite, stop) -> the step record, the same on all its ranks.
        rate: the learning rate of a step.
        noise: what measures the noise scale, if that is to be measured.
        device: on which this rank computes.
    """

    name: str
    first: int
    microbatches: int
    leaf: int
    grid: Grid
    stage: TrainingStage
    update: Update
    agree: Agree
    metric: Metric
    rate: Callable[[int], float]
    noise: NoiseScale | None
    device: Host = HOST

    def step(
        self,
        step: int,
        batches: Sequence[Batch],
        measured: bool,
        shown: bool,
        stop: Callable[[], bool] = lambda: False,
    ) -> Taken:
        """Forward, backward, agree, sum, update; collective over its ranks.

        Args:
            batches: this rank's.
            measured: whether the metric is to be worked out.
            shown: whether the norm is, and the new values are looked at: what is logged or saved has been looked at.
            stop: whether this rank asks to stop after the step; is asked once, when its gradients are there.

        Raises, on all its ranks alike, NotFiniteError if the loss, the gradient or the weights are not finite, and
        ConfigError if a decay of the user's own is not.
        """
        clock, update = self.grid.team.clock, self.update
        clock.step = step
        rows = self._rows(len(batches), measured)
        with self.device.named_memory("a step"):
            self.stage.train(step, batches, rows, measured)
        rate, wrong = self._rate(step)
        clock("communication")
        record = self.agree(rows, bool(wrong) or not update.finite, stop())
        if record.broken:
            self._check_rate(wrong)
        self._check_finite(step, record)
        shown = shown or record.stop
        norm = update.step(rate, record.weight, step, shown)
        self._check_finite(step, record, norm)
        if shown:  # else the next step's record will carry it
            self._check_finite(step + 1, agree(self.grid.comm, self._rows(0), not update.finite))
        clock("compute")
        noise = None
        if self.noise and measured:
            noise = self.noise.measured(rows[:, 1], record.weight, norm or 0.0, update.rows(step))
        return Taken(record, rate, norm, noise)

    def free(self) -> None:
        """Give back what the MPI library holds for it, but for its grid; collective."""
        if self.update.ties:
            self.update.ties.free()
        self.stage.sum.free()
        self.stage.sum.values.free()

    def _rate(self, step: int) -> tuple[float, ConfigError | None]:
        """The learning rate of a step, or what is wrong with a user's own decay there."""
        try:
            return self.rate(step), None
        except ConfigError as error:
            return math.nan, error

    def _check_rate(self, wrong: ConfigError | None) -> None:
        """End the run if the learning rate of a step is wrong on any rank; collective."""

        def check() -> None:
            if wrong:
                raise wrong

        try:
            self.grid.team.together(check)
        except ConfigError:
            self.stage.sum.drop()
            raise

    def _rows(self, entries: int, measured: bool = False) -> NDArray[np.float64]:
        """Rows of the step record for that many micro-batches, with columns for the metric only if it is to be
        measured: of many outputs they may be thousands."""
        return np.zeros((entries, 2 + (self.metric.columns if measured else 0)))

    def _check_finite(self, step: int, record: Record, norm: float | None = None) -> None:
        """End the run if the loss of this step or what its gradient did is not finite."""
        if record.broken:
            error = not_finite(f"{self.name}weights are not finite after step {step - 1}")
        elif record.bad_entry is not None:
            grid, entry = self.grid, record.bad_entry
            replica = part_of(entry, grid.replicas, self.microbatches, self.leaf)
            rank = grid.team.launched[grid.rank_of(grid.stages - 1, replica)]
            where = f"micro-batch {self.first + entry}, rank {rank}"
            error = not_finite(f"{self.name}the loss is not finite in step {step} ({where})", rank)
        elif norm is not None and not norm < float("inf"):
            error = not_finite(f"{self.name}the gradient is not finite in step {step}")
        else:
            return
        self.stage.sum.drop()
        raise error
