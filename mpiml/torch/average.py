"""The mean over ranks, or over micro-batches, of a module's gradients and of the buffers that its forward changes."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules import module as modules

from mpiml import vectors
from mpiml.devices import choice
from mpiml.devices.device import Device
from mpiml.errors import ConfigError, first_few
from mpiml.loop.guard import clock
from mpiml.loop.sums import Sum
from mpiml.nn.torch_names import plain_name
from mpiml.nn.torch_state import tensors
from mpiml.nn.torch_tensors import as_real
from mpiml.team import Team
from mpiml.torch import flat
from mpiml.torch.buffers import WHEN_MADE, Changes, compares_all
from mpiml.torch.flat import Arrays, Places, Slot, Vectors
from mpiml.torch.meetings import COLUMNS, Meetings
from mpiml.torch.unchanged import Unchanged

_registrations = [0]  # how often any module has been given a parameter or a part; a list, for the hooks to write to


def _registered(*_: object) -> None:
    _registrations[0] += 1


modules.register_module_parameter_registration_hook(_registered)
modules.register_module_module_registration_hook(_registered)

Observed = Mapping[int, tuple[float, Mapping[str, Tensor]]]  # of each micro-batch: its weight, and buffers by name


class Average:
    """The mean of gradients and buffers; collective to make.

    Flags ride along: of each parameter, whether a rank has a gradient of it; of each buffer, whether it has changed.

    Args:
        memory: as of `Sum`.
        buffers: whether buffers are averaged.

    Attributes:
        module: the module itself.
        device: on which the module is.
        trained: the parameters that required a gradient at first.
        unchanged: what exact steps must not change.
        slots: for each of this rank's micro-batches, the place of what it contributes.
        unfinished: the step whose micro-batches are being summed, or 0.
        by_all_ranks: whether sums of gradients are divided by the number of all ranks, those that have joined included.
    """

    def __init__(self, team: Team, module: Module, memory: str, buffers: bool):
        named = {plain_name(name): parameter for name, parameter in module.named_parameters()}
        self.names = [name for name, parameter in named.items() if parameter.requires_grad]
        self.trained = [named[name] for name in self.names]
        self._frozen = {name: parameter for name, parameter in named.items() if not parameter.requires_grad}
        self.device = choice.of_tensor(self.trained[0])
        self.module, self._registrations_seen, self._checks = module, _registrations[0], 0
        self._dtypes = [parameter.dtype for parameter in self.trained]
        self.unchanged = Unchanged(module, warns=team.rank == 0)
        self._with_buffers, self.buffers = buffers, Changes(module, buffers, warns=team.rank == 0)
        self.team, self.meetings, self._memory, self.by_all_ranks = team, Meetings(team), memory, False
        self.unfinished, self._to_be_dropped = 0, False
        self._arrays: Arrays = []  # of the total
        self._total: Slot | None = None  # views of the total, once there is one
        self._there: Vectors | None = None  # the vectors on the module's device, if it is on one
        self.slots: list[Slot] = []
        self._flags, self._flag_tensor = list[bool](), torch.zeros(0)  # that were written last
        self._make(team.size)

    def prepare(self, kind: str, microbatches: int) -> None:
        """Make ready to sum so many micro-batches; collective. After a step that was left, and if they were more or
        fewer before, ranks meet for it, in a call of this kind."""
        self._drop_step(kind)
        if self.sum.microbatches != microbatches:
            self.meetings.meet(kind)
            self.sum.close()
            self._make(microbatches)

    def checkpoint(self, kind: str) -> None:
        """Agree that all ranks are at this call of a checkpoint; collective."""
        if self.unfinished:
            raise ConfigError(f"{kind}() within step {self.unfinished}: only after net.step(optimizer)")
        if not self.meetings.over:
            self._drop_step(kind)
            self.meetings.meet(kind)

    def loop_left(self) -> None:
        """Note that a loop over steps has been left, perhaps before the end of a step."""
        self._to_be_dropped, self.unfinished = self._to_be_dropped or bool(self.unfinished), 0

    def _drop_step(self, kind: str) -> None:
        """Drop what has been put in a step that was left before its end; collective, in a meeting of this kind."""
        if self._to_be_dropped:
            self._to_be_dropped = False
            self.meetings.meet(kind)
            self.sum.drop()

    def backward_ended(self) -> bool:
        """Make each gradient the mean of all ranks' gradients, and changed buffers that of their buffers; collective,
        but for ranks that have joined. Returns whether any rank has a gradient."""
        self.prepare("backward", self.team.size)
        if self.team.size == 1:
            self._check()
            return True  # gradients and buffers are their own means
        self.write(self.slots[0])
        self.sum.put(self.sum.own.start)
        clock().step = 1 + self.meetings.number
        self.meetings.meet("backward")
        total = self.mean()
        used = self.take_gradients(total)
        self.take_buffers(total, {self.sum.own.start: (1.0, {})})
        return used

    def answer(self) -> bool:
        """Contribute nothing to what the other ranks do, as one that has joined; collective. Returns whether there are
        others."""
        self.prepare("backward", self.team.size)
        self.put_nothing(self.sum.own.start)
        if not self.meetings.answer():
            self.sum.drop()
            return False
        self.take_buffers(self.mean(), {self.sum.own.start: (0.0, {})})
        return True

    def put_nothing(self, m: int) -> None:
        """Add zeros with weight 0 for a micro-batch."""
        self.sum.put(m, weight=0.0)  # which makes zeros of what is in the slot

    def write(self, slot: Slot) -> None:
        """Write this rank's gradients, buffers and flags into a slot."""
        self._check()
        views, gradients = slot.tensors[: len(self.trained)], [parameter.grad for parameter in self.trained]
        flags = [gradient is not None for gradient in gradients]
        if not all(flags):
            for view, gradient in zip(views, gradients, strict=True):
                if gradient is None:
                    view.zero_()
            views, gradients = (list(itertools.compress(those, flags)) for those in (views, gradients))
        with torch.no_grad():
            flat.copy(views, [g if g.layout == torch.strided else g.to_dense() for g in gradients])
            flat.copy(slot.tensors[len(flags) :], self.buffers.values())
        flags += [name in self.buffers.changed for name in [*self.buffers.averaged, *self.buffers.unchanged]]
        if flags != self._flags:
            self._flags, self._flag_tensor = flags, torch.tensor(flags, dtype=slot.flags.dtype)
        slot.flags.copy_(self._flag_tensor)
        slot.written()

    def _check(self) -> None:
        """Raise ConfigError if other parameters are trained than those that are averaged."""
        if freed := [name for name, parameter in self._frozen.items() if parameter.requires_grad]:
            raise ConfigError(f"{first_few(freed)} requires a gradient now, and did not {WHEN_MADE}")
        for name, parameter, dtype in zip(self.names, self.trained, self._dtypes, strict=True):
            if parameter.dtype != dtype:
                raise ConfigError(f"{name} is {parameter.dtype} now, and was {dtype} {WHEN_MADE}")
        self._checks += 1
        if self._registrations_seen == _registrations[0] and not compares_all(self._checks):
            return
        self._registrations_seen, known = _registrations[0], {id(p) for p in (*self.trained, *self._frozen.values())}
        now = self.module.named_parameters()
        if new := [plain_name(name) for name, p in now if p.requires_grad and id(p) not in known]:
            raise ConfigError(f"{first_few(new)}: another parameter than {WHEN_MADE}, and not averaged: wrap later")

    def mean(self) -> Slot:
        """The mean; collective. It holds until something is put again."""
        self._arrays = self.sum.mean(copy=False)
        if self._there:
            return self._there.total(self._arrays)
        if self._total is None:
            self._total = _readable(self._places, self._arrays)
        return self._total

    def not_finite(self, total: Slot, before: Mapping[str, Tensor]) -> str:
        """The gradients whose mean is not finite, or else the buffers in which numbers have become so that were finite
        `before`: an extremum may start at infinity."""
        if all(map(vectors.is_finite, self._arrays)):
            return ""
        gradients, buffers = total.tensors[: len(self.names)], total.tensors[len(self.names) :]
        if bad := [name for name, view in zip(self.names, gradients, strict=True) if not view.isfinite().all()]:
            return f"the gradient of {first_few(bad)}"
        for name, view in zip(self.buffers.averaged, buffers, strict=True):
            if (as_real(before[name]).isfinite() & ~view.isfinite()).any():
                return f"the buffer {name}"
        return ""

    def take_gradients(self, total: Slot) -> bool:
        """Make the mean the gradient of each parameter that any rank has used. Returns whether there are such."""
        used, views = self.trained, total.tensors[: len(self.trained)]
        flags = total.flags[: len(used)].tolist()
        if not all(flags):
            used, views = (list(itertools.compress(those, flags)) for those in (used, views))
        for parameter in used:
            if parameter.grad is None or parameter.grad.layout != torch.strided:
                parameter.grad = torch.empty_like(parameter, requires_grad=False)
        gradients = [parameter.grad for parameter in used]
        with torch.no_grad():
            flat.take(gradients, views)
            if self.by_all_ranks:
                torch._foreach_mul_(gradients, self.sum.weight / self.team.size)
        return bool(used)

    def take_buffers(self, total: Slot, observed: Observed) -> None:
        """Give buffers that any rank has changed their mean; collective. Those that have changed for the first time
        were not in the sum, and get one of their own: of what was `observed`, or of what they are now."""
        first, averaged = len(self.trained), self.buffers.averaged
        flags = total.flags[first:].tolist()
        self.buffers.changed.clear()
        for name, view, flag in zip(averaged, total.tensors[first:], flags, strict=False):
            if flag:
                self._set_buffer(name, view)
        new = [name for name, flag in zip(self.buffers.unchanged, flags[len(averaged) :], strict=True) if flag]
        if new:
            self._average_new_buffers(new, observed)

    def _average_new_buffers(self, names: list[str], observed: Observed) -> None:
        places = Places([self.buffers[name] for name in names], 1)
        with Sum(self.team.comm, places.like, self.sum.microbatches, self._memory, finite=False) as once:
            for m, arrays in zip(once.own, once.slots, strict=True):
                weight, values = observed[m]
                slot = places.slot(arrays)
                slot.flags.zero_()
                flat.copy(slot.tensors, [values.get(name, self.buffers[name]) for name in names])
                once.put(m, weight=weight)
            for name, view in zip(names, _readable(places, once.mean()).tensors, strict=True):
                self._set_buffer(name, view)
        self.buffers.average_also(names)
        self.sum.close()
        self._make(self.sum.microbatches)

    def _set_buffer(self, name: str, value: Tensor) -> None:
        now = self.buffers[name].clone()
        flat.take([now], [value])
        self.buffers.put(name, now)

    def values(self) -> list[Tensor]:
        """What is the same on all ranks that have trained alike: parameters, and buffers if these are averaged."""
        return list(tensors(self.module).values()) if self._with_buffers else self.trained

    def end(self) -> None:
        """Agree with all ranks that nothing more is averaged, and let go of what it was summed in; collective."""
        self.meetings.end()
        self.slots.clear()
        self.device.unlock()
        self._there = None
        self._arrays, self._total = [], None

    def _make(self, microbatches: int) -> None:
        buffers = self.buffers
        flags = len(self.trained) + len(buffers.averaged) + len(buffers.unchanged)
        self._places = Places([*self.trained, *buffers.values()], flags)
        self.sum = self.meetings.sum = Sum(
            self.team.comm, self._places.like, microbatches, self._memory, finite=False, numbers=COLUMNS
        )
        device, slots = self.device, self.sum.slots.trees
        device.unlock()  # the slots before
        self._there = self._places.there(device) if isinstance(device, Device) else None
        if self._there:
            self._there.lock(*slots, self.sum.total)
        slot = self._there.slot if self._there else self._places.slot
        self.slots = [slot(arrays) for arrays in slots]
        self._total = None


def _readable(places: Places, arrays: Arrays) -> Slot:
    """Views of a total, which nothing writes to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that torch does not know of read-only memory
        return places.slot(arrays)
