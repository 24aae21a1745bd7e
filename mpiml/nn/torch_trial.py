"""A trial of a PyTorch module on a few rows: what it makes of them, what it changes, and whether it can be trained."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.flop_counter import FlopCounterMode

from mpiml.devices.device import Device
from mpiml.devices.host import HOST, Host
from mpiml.errors import ConfigError, first_few
from mpiml.nn.parameters import Shape
from mpiml.nn.torch_buffers import (
    Buffers,
    Flags,
    Snapshot,
    attribute,
    checksums,
    differing,
    marks,
    raised,
    set_flags,
)
from mpiml.nn.torch_checks import not_repeated, output_shape, refuse_rows
from mpiml.nn.torch_names import plain_name, uncompiled
from mpiml.nn.torch_tensors import checksum, drawn, is_whole, naming
from mpiml.random import Draws

ROWS = 2, 4  # rows in two calls: an axis of fixed length cannot have both lengths, so it is not taken for the rows
Contents = tuple[int, torch.Size, torch.dtype]  # a checksum of values, their shape and type


@dataclass
class Trial:
    """How a module treats rows of one shape.

    Attributes:
        output: the shape of a row that it returns.
        takes_ids: whether the rows must be integers, as token ids are.
        flops: of the forward pass, for one row.
        writes_input: whether it writes to the rows that it gets.
        reached: the parameters to which a backward pass gives a gradient.
        reaches_input: whether one gives the rows a gradient.
        wants_leaf: whether parameters are only reached if the rows need a gradient, as under re-entrant checkpointing.
        least_rows: with which it can be called in training.
        state: the buffers that it changes.
        draws, redraws: the generators that forward and backward passes draw from.
        notes: what a person should know.
    """

    output: Shape
    takes_ids: bool
    flops: int = 0
    writes_input: bool = False
    reached: set[str] = field(default_factory=set)
    reaches_input: bool = False
    wants_leaf: bool = False
    least_rows: int = 1
    state: list[str] = field(default_factory=list)
    draws: frozenset[str] = frozenset()
    redraws: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)


def attempt(module: Module, flags: Flags, shape: Shape, dtype: torch.dtype, name: str, device: Host = HOST) -> Trial:
    """Call the module, `name` in messages, on the device where it is, on rows of `shape` in `dtype`, or else on
    integers.

    A compiled module is called as it is without, and then once compiled: it would be compiled for each kind of call.

    Raises ValueError if it can take neither, ConfigError if it cannot be trained.
    """
    original, errors = uncompiled(module), list[Exception]()
    for kind, zeros in ((dtype, True), (torch.long, True), (dtype, False)):
        try:
            tried = _Tried(original, flags, shape, kind, name, device, zeros)
            first = [tried.call(tried.rows(ROWS[0])), tried.call(tried.rows(ROWS[1]), leaf=False)]
            break
        except ConfigError:
            raise
        except Exception as error:  # some modules take no rows of zeros
            errors.append(error)
    else:
        refuse_rows(errors, shape, ROWS, name)
    trial = tried.all(*first)
    if module is not original:
        compiled = _Tried(module, flags, shape, kind, name, device)
        naming(f"{name} cannot be compiled:", lambda: compiled.call(compiled.rows(ROWS[0])), Exception)
    set_flags(flags, True)
    return trial


@dataclass
class _Call:
    """What a call of a module has shown."""

    output: int  # a checksum
    state: dict[str, Contents]  # what all buffers hold after it
    changed: set[str]  # the buffers that it has written to
    gradients: dict[str, int]  # checksums, of the parameters that the backward pass reaches
    reaches_input: bool


class _Tried:
    """A module that is called on rows of a shape and dtype; its buffers are the same before each call, and after it."""

    def __init__(
        self,
        module: Module,
        flags: Flags,
        shape: Shape,
        dtype: torch.dtype,
        name: str,
        device: Host,
        zeros: bool = True,
    ):
        self.module, self.flags, self.shape, self.dtype, self.name = module, flags, shape, dtype, name
        self.device = device
        self.rows = self.zeros if zeros else self.drawn
        self.before, self.parameters = marks(module), checksums(module)
        self.memory = [tensor.detach() for tensor in module.parameters()]  # which is not used for others meanwhile
        self.buffers, self.changed = Buffers(module), set[str]()
        self.checksums: dict[str, int] = {}  # of buffers
        self.draws, self.redraws, self.kept = set[str](), set[str](), set[str]()
        self.output: Shape | None = None  # of a row, as the first call has it
        self.writes_input = False

    def zeros(self, rows: int) -> Tensor:
        return self._there(torch.zeros((rows, *self.shape), dtype=self.dtype))

    def drawn(self, rows: int) -> Tensor:
        return self._there(drawn((rows, *self.shape), self.dtype))

    def _there(self, rows: Tensor) -> Tensor:
        return self.device.tensor(rows) if isinstance(self.device, Device) else rows

    def _indices(self) -> AbstractContextManager[object]:
        """What calls run in, so that values which the module cannot take as indices are an error and not the end. A
        compiled module, which is called as it is first, would not be compiled in it."""
        return self.device.checked_indices() if self.module is uncompiled(self.module) else nullcontext()

    def call(self, source: Tensor, training: bool = True, key: int = 0, leaf: bool = True, learn: bool = True) -> _Call:
        """Forward, and if `learn` backward too, as training does it, or forward as evaluation does it. `leaf`: the rows
        need a gradient. Raises ValueError for what is no output of a layer."""
        set_flags(self.flags, training)
        source = source.clone().requires_grad_(leaf and training and self.dtype.is_floating_point)
        x = source.clone()  # the module may write to it, which a leaf that requires a gradient does not allow
        with self.buffers.copied() as own:
            for name in own.keys() - self.checksums.keys():
                self.checksums[name] = checksum(own[name])
            before = Snapshot(map(self.buffers.place, own), self.checksums)
            with Draws(key, "trial") as draws, torch.set_grad_enabled(training), self._indices():
                y = self.module(x)
            after, changed = self.buffers.tensors(), {name for name, _ in before.changed()}
            sums = self.checksums | {name: checksum(after[name]) for name in changed}
            state = {name: (sums[name], tensor.shape, tensor.dtype) for name, tensor in after.items()}
        self.output = output_shape(y, len(x), self.output)
        self.changed |= changed
        self.draws |= draws.which
        self.writes_input |= x._version > 0
        gradients = self._backward(y) if training and learn else {}
        return _Call(checksum(y), state, changed, gradients, source.grad is not None)

    def _backward(self, y: Tensor) -> dict[str, int]:
        tensors = {plain_name(name): tensor for name, tensor in self.module.named_parameters()}
        for tensor in tensors.values():
            tensor.grad = None
        if y.requires_grad:
            with self.buffers.copied(), Draws(0, "trial") as draws:
                y.backward(torch.ones_like(y))
            self.redraws |= draws.which
        gradients = {name: checksum(tensor.grad) for name, tensor in tensors.items() if tensor.grad is not None}
        for tensor in tensors.values():
            tensor.grad = None
        return gradients

    def check_parameters(self) -> None:
        """Raise ConfigError if calls have changed parameters, or would if these had other values, as they will have: a
        copy follows them then, and bounds are reached."""
        tensors = {plain_name(n): tensor for n, tensor in self.module.named_parameters() if tensor.requires_grad}
        own, changed = [tensor.data for tensor in tensors.values()], differing(self.parameters, checksums(self.module))
        for tensor in tensors.values():
            tensor.data = tensor.data * 10 + 100
        with suppress(Exception):  # such values may be none that it can take
            self.call(self.rows(ROWS[0]), learn=False)
        for (name, tensor), first in zip(tensors.items(), own, strict=True):
            changed += [] if torch.equal(tensor.data, first * 10 + 100) or name in changed else [name]
            tensor.data = first
        if new := first_few(sorted(tensors.keys() - self.parameters.keys())):
            raise ConfigError(f"{self.name} makes its {new} when it is called; make all parameters in __init__")
        if changed:
            raise ConfigError(
                f"{self.name} changes {first_few(changed)} in its forward pass, which only the optimizer may do; "
                "compute with a changed copy, or make it a buffer (nn.Embedding: without max_norm, scale its output)"
            )

    def all(self, first: _Call, more: _Call) -> Trial:
        """All that is to be known of the module. It has been called on rows of zeros, which may have made buffers, and
        on more that need no gradient."""
        assert self.output is not None, "it has been called"
        self.buffers, floats = Buffers(self.module), self.dtype.is_floating_point
        trial = Trial(self.output, not floats, reaches_input=first.reaches_input)
        trial.wants_leaf = floats and not first.gradients.keys() <= more.gradients.keys()
        trial.least_rows = ROWS[0]
        with suppress(Exception):  # an assertion, say
            self.call(self.rows(1), learn=False)
            trial.least_rows = 1
        calls = self._again(training=True)
        self._evaluation()
        self.check_parameters()
        trial.reached = set(first.gradients).union(*(call.gradients for call in calls))
        trial.reaches_input |= calls[0].reaches_input
        trial.flops = self._flops() + math.prod(self.shape)
        trial.notes += self._kept()
        later = self.call(self.rows(ROWS[0]), key=1, learn=False)
        if first.changed != later.changed and not self.draws:
            self._refuse(self._kept_names())
        self._check_counts()
        self._find_state(trial, [first, later, more, *calls])
        trial.draws, trial.redraws = frozenset(self.draws), frozenset(self.redraws)
        trial.writes_input = self.writes_input
        return trial

    def _evaluation(self) -> None:
        """Raise ConfigError unless the module gives rows of the same shape in evaluation mode."""
        what = f"{self.name} in evaluation mode:"
        try:
            naming(what, lambda: self._again(training=False))
        except ConfigError:
            raise
        except Exception as error:  # of the user's own code
            error.add_note(f"{what} it fails on rows of shape {self.shape}")
            raise

    def _again(self, training: bool) -> list[_Call]:
        """Three calls with equal rows, buffers and draws. Raises ConfigError if outputs or gradients differ."""
        try:
            return self._calls(self.drawn(ROWS[0]), training)
        except ConfigError:
            raise
        except Exception:  # random token ids may be none that it takes, nor numbers beyond a range
            return self._calls(self.rows(ROWS[0]), training)

    def _calls(self, rows: Tensor, training: bool) -> list[_Call]:
        calls, seen = list[_Call](), [marks(self.module)]
        for _ in range(3):
            calls.append(self.call(rows, training))
            seen.append(marks(self.module))
        changed = [differing(one, other) for one, other in itertools.pairwise(seen)]
        self.kept.update(*changed[1:])
        one, *others = [(call.output, call.gradients, call.state) for call in calls]
        if any(other != one for other in others):
            self._refuse(sorted(set().union(*changed)))
        return calls

    def _refuse(self, changed: Sequence[str]) -> NoReturn:
        """Raise ConfigError for a module that gives other outputs when it is called again."""
        self.check_parameters()
        raise ConfigError(not_repeated(self.name, {name: attribute(self.module, name) for name in changed}))

    def _check_counts(self) -> None:
        """Raise ConfigError if outputs depend on a number that each call changes, once it is high, as warmups have."""
        outputs = set()
        with suppress(Exception):
            for count in (0, 10**6):
                with raised(self.module, sorted(self.kept), count):
                    outputs.add(self.call(self.drawn(ROWS[0]), learn=False).output)
        if len(outputs) > 1:
            self._refuse(sorted(self.kept))

    def _kept(self) -> list[str]:
        """A note on attributes that calls change or make, though the outputs do not depend on them. Tensors may be what
        a call computes from parameters anew, as spectral_norm does."""
        what = "from call to call; checkpoints do not hold that, and outputs must never depend on it"
        return [f"{self.name} keeps {first_few(kept)} {what}"] if (kept := self._kept_names()) else []

    def _kept_names(self) -> list[str]:
        now = marks(self.module)
        new = [name for name in differing(self.before, now) if not isinstance(attribute(self.module, name), Tensor)]
        return sorted(self.kept.union(new, now.keys() - self.before.keys()))

    def _find_state(self, trial: Trial, calls: Sequence[_Call]) -> None:
        """Which buffers are state, and a note on those whose averages torch itself does not define."""
        trained = {part for part, (_, training) in self.flags.items() if training}
        torchs = {name for name, norms in self.buffers.norms().items() if not trained.isdisjoint(norms)}
        averaged = list[str]()
        trial.state = [name for name in self.buffers.places if name in self.changed | torchs]
        for name in trial.state:
            contents = {call.state[name] for call in calls if name in call.state}
            what = f"{self.name} changes its buffer {name}"
            if {(shape, kind) for _, shape, kind in contents} != {(self.buffers[name].shape, self.buffers[name].dtype)}:
                raise ConfigError(f"{what} in shape or type; it must keep both")
            if len(contents) == 1 or name in torchs:
                continue
            averaged.append(name)
            if is_whole(self.buffers[name]):
                raise ConfigError(
                    f"{what}, of integers, by what the rows are or how many; micro-batches have no common value then: "
                    "make it a floating-point buffer, which is averaged over them, or count calls"
                )
        what = f"{self.name} changes {first_few(averaged)} by what the rows are"
        trial.notes += [f"{what}: a step takes the average over its micro-batches"] if averaged else []

    def _flops(self) -> int:
        """Operations for a row, as torch counts them; where it cannot, two for each element of a parameter."""
        try:
            with FlopCounterMode(display=False) as counter:
                self.call(self.rows(ROWS[1]), learn=False)
            return int(counter.get_total_flops()) // ROWS[1]
        except Exception:  # its hooks fail in modules that call autograd themselves, which may be trained all the same
            return 2 * sum(int(tensor.numel()) for tensor in self.module.parameters())
