"""DataParallel: a module whose gradients are averaged over the ranks of an MPI job, as a backward pass ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor
from torch._dynamo.decorators import skip
from torch.nn import Module

from mpiml.errors import ConfigError
from mpiml.loop.checks import check_comm
from mpiml.loop.guard import clock
from mpiml.loop.rows import Rows
from mpiml.loop.until_exit import guard_until_exit
from mpiml.nn.torch_buffers import Snapshot
from mpiml.nn.torch_state import tensors
from mpiml.nn.torch_tensors import prepare_torch
from mpiml.team import Team
from mpiml.torch import alike, exact, keywords
from mpiml.torch.average import Average
from mpiml.torch.checkpoints import Checkpoints
from mpiml.torch.exact import MicroBatch, Step
from mpiml.torch.joining import joined
from mpiml.torch.passes import Passes

STALL_TIMEOUT = 1800.0  # seconds, as long as gloo waits
OF_CLOSED = "of a DataParallel that is closed"


class DataParallel(Module):  # type: ignore[misc]
    """A module in the place of DistributedDataParallel(module), in programs that mpirun starts; collective to make.

        net = mpiml.torch.DataParallel(net)

    When `loss.backward()` returns, for a loss of the module's outputs, each parameter's `.grad` is the mean over all
    ranks of what it would be there, and buffers that the forward pass has changed are the mean of what they are there;
    of integers, the nearest to it. A rank that has no gradient of a parameter counts as zero; if no rank has one,
    `.grad` stays None. Parameters and buffers start with the values of rank 0.

    Outside of `mpiml.api.guard`, ranks are watched as in a guard from here on until the program ends.

    Args:
        module: the same on all ranks, on the CPU or on the GPU that `mpiml.torch.device()` gives the rank.
        broadcast_buffers, forward_sync_buffers: whether buffers are averaged; if both are given, the second counts.
        init_sync: whether parameters and buffers start equal; if not, that is the caller's concern.
        comm: the ranks (default: all).
        memory: as of `mpiml.api.Sum`.
        stall_timeout: of the watch, in seconds, outside of a guard.
        device_ids, output_device, others: keywords of DistributedDataParallel, of which some are refused.

    Attributes:
        module: the module; in `state_dict` its names begin with "module.".

    Raises ConfigError, on all ranks alike, for modules that differ between ranks, naming what, and for a module that
    cannot be averaged; RunError, on all ranks alike, if ranks are at different calls, naming these.
    """

    def __init__(
        self,
        module: Module,
        device_ids: Any = None,
        output_device: Any = None,
        *,
        broadcast_buffers: bool | None = True,
        init_sync: bool = True,
        comm: MPI.Intracomm | None = None,
        memory: str = "auto",
        stall_timeout: float = STALL_TIMEOUT,
        forward_sync_buffers: bool | None = None,
        **others: Any,
    ):
        super().__init__()
        comm = check_comm(comm)
        guard = guard_until_exit(comm, stall_timeout)
        team = Team(comm, clock())
        others |= {"device_ids": device_ids, "output_device": output_device}
        switches = {
            "broadcast_buffers": broadcast_buffers,
            "forward_sync_buffers": forward_sync_buffers,
            "init_sync": init_sync,
        }
        tensor = next(module.parameters(), None) if isinstance(module, Module) else None
        gpus = [tensor.get_device()] if tensor is not None and tensor.is_cuda else []
        team.together(lambda: keywords.check(others, switches, stall_timeout, gpus))
        alike.compare(team, module)
        if init_sync:
            alike.broadcast(team, tensors(module).values())
        self.module = module
        self.require_backward_grad_sync = True  # False within no_sync
        averaged = broadcast_buffers if forward_sync_buffers is None else forward_sync_buffers
        self._average = Average(team, module, memory, buffers=averaged is None or bool(averaged))
        self._step: Step | None = None
        self._passes = Passes(module, self._average.trained, team.size > 1, self._backward_ended)
        self._at_end = guard.at_end
        self._at_end.append(self.close)
        self.closed = False
        if "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it to 1
            share = self._average.sum.cores // self._average.sum.node_ranks
            torch.set_num_threads(max(1, min(torch.get_num_threads(), share)))
        if comm.rank == 0:
            keywords.warn(others)

    @skip  # type: ignore[untyped-decorator]  # a compiled DataParallel begins at _outputs
    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The module's outputs."""
        before = self._before_forward()
        outputs = self._outputs(*inputs, **named)
        return outputs if self._step else self._after_forward(before, outputs)

    def _outputs(self, *inputs: Any, **named: Any) -> Any:
        return self.module(*inputs, **named)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_forward(self) -> Snapshot | None:
        clock().progress()
        if self._step:
            return None
        if torch.is_grad_enabled():
            self._passes.ignore()
        return self._average.buffers.snapshot() if self.module.training else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_forward(self, before: Snapshot | None, outputs: Any) -> Any:
        self._average.buffers.note_changes(before)
        follows = self.require_backward_grad_sync and torch.is_grad_enabled()
        return self._passes.follow(outputs) if follows else outputs

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within the block, backward passes of what is computed here leave each rank's own sum of gradients, which the
        next one after it averages with its own."""
        before, self.require_backward_grad_sync = self.require_backward_grad_sync, False
        try:
            yield
        finally:
            self.require_backward_grad_sync = before

    def join(
        self, divide_by_initial_world_size: bool = False, enable: bool = True, throw_on_early_termination: bool = False
    ) -> AbstractContextManager[None]:
        """A block for training on ranks that have different numbers of batches: one that is done with its own waits at
        the end, and means are those of the ranks that still have any. At last all get the parameters of a rank that had
        most, and its buffers if buffers are averaged; optimizers' states stay as they are. Collective to leave, unless
        by an error.

        Args:
            divide_by_initial_world_size: whether gradients are sums divided by the number of all ranks, as
                DistributedDataParallel's are by default.
            enable: whether to do anything.
        """
        if throw_on_early_termination:
            raise ConfigError("join(throw_on_early_termination=True): leave join() out, and uneven ranks are an error")
        return joined(self._average, divide_by_initial_world_size) if enable else nullcontext()

    def steps(self, rows: Rows, start: int = 1, last: int | None = None, threads: int = 1) -> Iterator[Step]:
        """Steps whose results have the same bits on any number of ranks and nodes; collective.

            for step in net.steps(rows):
                for m in step:
                    net.backward(loss_function(net(x[m.rows]), y[m.rows]), m)
                loss = net.step(optimizer)

        `m.rows` are the numbers of its rows, `len(m)` how many they are. What is drawn from PyTorch's, NumPy's and
        Python's generators for m is a function of the seed, the step and m alone. Each buffer that the forward pass
        changes becomes the mean over the rows of what their micro-batches make of the value before the step.

        Args:
            rows: the same number of micro-batches gives the same bits.
            start: the first step: of a run that goes on, the one after the last.
            last: the last step (default: that of the epoch in which `start` is).
            threads: of PyTorch on each rank, which the bits depend on.

        Raises ConfigError for rows of other ranks, and for a step without all its calls; RunError, on all ranks alike,
        if ranks are at different calls.
        """
        if self.closed:
            raise ConfigError(f"steps() {OF_CLOSED}")
        if self._step is not None and not self._step.done:
            where = f"steps() within step {self._step.number}"
            raise ConfigError(f"{where}: call net.step(optimizer) before, or leave the loop that the step is of")
        prepare_torch(threads, self._average.device)
        step = None
        try:
            for step in exact.steps(self._average, rows, start, last):
                clock().step = step.number
                self._step = step
                self._passes.ignore()
                yield step
        finally:
            if self._step is step:  # else another loop has begun
                self._step = None
                self._average.loop_left()

    def backward(self, loss: Tensor, m: MicroBatch) -> None:
        """The backward pass of `loss`, one number, the mean over the rows of micro-batch m of a step.

        Raises ConfigError outside of a step, for another micro-batch than the one that it has given, and for a module
        that is not the one that was wrapped any more.
        """
        self._within("backward(loss, m)").backward(loss, m)

    def step(self, optimizer: torch.optim.Optimizer) -> float:
        """Make the mean over all rows of the step the gradients, call `optimizer.step()`, and drop them; collective.
        Returns the mean loss of the step.

        Raises NotFiniteError, on all ranks alike, for losses or gradients that are not finite; nothing is changed then.
        RunError as `steps`.
        """
        return self._within("step(optimizer)").update(optimizer)

    def checkpoints(self, directory: str | os.PathLike[str], keep: int = 3) -> Checkpoints:
        """Checkpoints of the module and what trains it, the newest `keep` in a directory; collective.

        Raises as `mpiml.torch.checkpoints.Checkpoints`.
        """
        return Checkpoints(self.module, self._average, directory, keep)

    def close(self) -> None:
        """Agree with all ranks that nothing more is averaged, and give back what is held for it; collective. Otherwise
        the guard does so as it is left, or the program as it ends: programs with many call it for each."""
        if not self.closed:
            self.closed = True
            self._passes.close()
            if self.close in self._at_end:
                self._at_end.remove(self.close)
            self._average.end()

    def register_comm_hook(self, state: object, hook: object) -> None:
        """Refused: gradients travel as they are."""
        raise ConfigError("DataParallel has no communication hooks: gradients travel as they are")

    def join_hook(self, **_: Any) -> None:
        """Refused: what torch.distributed.algorithms.Join asks for."""
        raise ConfigError("torch.distributed's Join([net]) needs a process group: use `with net.join():`")

    def __getstate__(self) -> dict[str, Any]:
        raise ConfigError("a DataParallel cannot be copied or pickled: copy its .module, or save its state_dict()")

    def _within(self, what: str) -> Step:
        if self._step is None:
            raise ConfigError(f"net.{what}: only within `for step in net.steps(rows):`")
        return self._step

    def _backward_ended(self) -> None:
        if self.closed:
            raise ConfigError(f"a backward pass {OF_CLOSED}")
        if self._step is None and not self._average.backward_ended() and self._passes.forced:
            name = type(self.module).__name__
            raise ConfigError(
                f"what {name} returns depends on no parameter that requires a gradient, on any rank: is there a "
                "torch.no_grad() or .detach() in it?"
            )
