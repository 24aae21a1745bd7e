"""Steps with the same bits on any number of ranks: their micro-batches, what these contribute, and the update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mpiml.errors import ConfigError, NotFiniteError, first_few
from mpiml.loop.rows import Rows
from mpiml.random import global_generators, keyed
from mpiml.torch.average import Average
from mpiml.torch.buffers import compares_all


@dataclass(eq=False)
class MicroBatch:
    """Micro-batch number `m` of a step: the numbers of its rows, integers (rows,) to index tensors with."""

    step: int
    m: int
    rows: Tensor = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)


class Step:
    """A step: iterate over it for this rank's micro-batches that have rows.

    Attributes:
        number: of the step, from 1 on.
        done: whether the update has been made.
    """

    def __init__(self, average: Average, rows: Rows, number: int, count: int):
        self.number, self.done = number, False
        self._average, self._rows, self._count = average, rows, count
        self._open: MicroBatch | None = None
        # Of each micro-batch: its rows, and the buffers that it has changed and that are not averaged yet.
        self._observed: dict[int, tuple[float, dict[str, Tensor]]] = {}

    def __iter__(self) -> Iterator[MicroBatch]:
        """Within a micro-batch, the process's generators are keyed by the seed, the step and its number."""
        buffers = self._average.buffers
        self._before_step = buffers.copies(unchanged=self._count == 1)
        checksums = buffers.checksums(self._count)
        if compares_all(self._count):
            self._average.unchanged.look()
        self._average.unfinished = self.number
        drop_gradients(self._average)  # of other backward passes
        for m, rows in self._rows.mine(self.number):
            if not len(rows):
                self._average.put_nothing(m)
                self._observed[m] = 0.0, {}
                continue
            self._open = MicroBatch(self.number, m, torch.from_numpy(rows))
            self._before_forward = buffers.snapshot(checksums)
            try:
                with keyed(global_generators(), self._rows.seed, "loop", self.number, m):
                    yield self._open
            finally:
                drop_gradients(self._average)
            if self._open:
                raise ConfigError(f"step {self.number}, micro-batch {m}: net.backward(loss, m) is missing")

    def backward(self, loss: Tensor, m: MicroBatch) -> None:
        """As DataParallel.backward."""
        if m is not self._open:
            what = f"m={m.m}" if isinstance(m, MicroBatch) else repr(m)
            raise ConfigError(
                f"step {self.number}: net.backward(loss, {what}): to be called once for each m of `for m in step:`, "
                "before the next one"
            )
        self._check_loss(loss, m.m)
        average, buffers = self._average, self._average.buffers
        looks, where = compares_all(self._count), f"step {self.number}, micro-batch {m.m}"
        if looks:
            average.unchanged.check_loss(loss, where)
        loss.backward()
        if looks:
            average.unchanged.check(where)
        buffers.note_changes(self._before_forward)
        if new := sorted(buffers.changed - self._before_step.keys()):
            raise ConfigError(
                f"the forward pass changes {first_few(new)} in step {self.number}, and did not in the first: for a "
                "buffer to be averaged, every step must write to it"
            )
        average.write(average.slots[m.m - average.sum.own.start])
        average.sum.put(m.m, weight=len(m), loss=loss.item() * len(m))
        self._observed[m.m] = float(len(m)), {n: buffers[n].clone() for n in buffers.changed - set(buffers.averaged)}
        for name in buffers.changed:
            buffers.put(name, self._before_step[name])
        buffers.changed.clear()
        self._open = None

    def _check_loss(self, loss: Any, m: int) -> None:
        """Raise ConfigError for what has no backward pass."""
        what = f"step {self.number}: net.backward(loss, m={m})"
        if not isinstance(loss, Tensor):
            raise ConfigError(f"{what}: loss is a {type(loss).__name__}: must be a tensor")
        if loss.numel() != 1:
            raise ConfigError(f"{what}: loss has shape {tuple(loss.shape)}: must be one number, as loss.mean() is")
        if not loss.requires_grad:
            raise ConfigError(f"{what}: loss depends on no parameter: is there a torch.no_grad() or .detach() in it?")

    def update(self, optimizer: torch.optim.Optimizer) -> float:
        """As DataParallel.step."""
        average = self._average
        if not hasattr(optimizer, "zero_grad"):
            raise ConfigError(f"step {self.number}: net.step({optimizer!r}): must be an optimizer of torch.optim")
        drop_gradients(average)
        groups = getattr(optimizer, "param_groups", ())
        if outside := [p for group in groups for p in group["params"] if p.grad is not None]:
            what = f"a parameter {tuple(outside[0].shape)} with a gradient that is not summed over micro-batches"
            raise ConfigError(
                f"step {self.number}: the optimizer has {what}: let it be a part of the DataParallel's module"
            )
        average.meetings.meet("step")
        average.unfinished = 0
        if average.sum.bad_loss is not None:
            m = average.sum.bad_loss
            rank = average.sum.rank_of(m)
            average.sum.drop()
            raise NotFiniteError(
                f"step {self.number}: the loss of micro-batch {m}, on rank {rank}, is not finite"
            ).on_all_ranks(rank)
        total = average.mean()
        if bad := average.not_finite(total, self._before_step):
            raise NotFiniteError(f"step {self.number}: {bad} is not finite").on_all_ranks()
        loss, weight = average.sum.loss, average.sum.weight
        average.take_gradients(total)
        average.take_buffers(total, self._observed)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        drop_gradients(average)
        self.done = True
        return loss / (weight or 1.0)


def steps(average: Average, rows: Rows, start: int, last: int | None) -> Iterator[Step]:
    """The steps from `start` to `last`, by default the last of an epoch."""
    if start < 1:
        raise ConfigError(f"steps(start={start}): steps are counted from 1")
    if last is None:
        last = -(-start // rows.steps_per_epoch) * rows.steps_per_epoch
    average.prepare("steps", rows.microbatches)
    if rows.own != average.sum.own:
        raise ConfigError("steps(rows): the rows are those of another communicator than the DataParallel's")
    for count, number in enumerate(range(start, last + 1), start=1):
        step = Step(average, rows, number, count)
        yield step
        if not step.done:
            raise ConfigError(f"step {number}: net.step(optimizer) is missing")


def drop_gradients(average: Average) -> None:
    """Drop all gradients."""
    for parameter in average.trained:
        parameter.grad = None
