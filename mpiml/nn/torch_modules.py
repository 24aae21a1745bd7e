"""PyTorch modules as layers: autograd does their backward passes, and everything else is as for other layers."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from mpiml.devices.device import Device
from mpiml.devices.host import HOST, Host
from mpiml.errors import ConfigError, first_few
from mpiml.nn import torch_state
from mpiml.nn.base import Array, At, Backward, Layer, check_shape, described, is_optimised
from mpiml.nn.constants import Constant
from mpiml.nn.parameters import Gradients, Parameter, Shape, Statistic
from mpiml.nn.torch_buffers import Buffers, Flags, Snapshot, fixed, flags_of, set_flags
from mpiml.nn.torch_checks import check_parameters, converted, types_besides
from mpiml.nn.torch_inputs import INTEGERS, Inputs, split_inputs
from mpiml.nn.torch_names import plain_name, uncompiled
from mpiml.nn.torch_parts import Joined, is_module, parts_of
from mpiml.nn.torch_stack import TorchStack, through
from mpiml.nn.torch_tensors import (
    arrays,
    as_kind_of,
    as_real,
    constant,
    first_values,
    is_whole,
    kept,
    parts,
    prepare_torch,
    real_shape,
    tensor_on,
    write,
)
from mpiml.nn.torch_trial import ROWS, Trial, attempt
from mpiml.random import global_generators, keyed


class TorchLayer(Layer):
    """y = module(x), for a module that takes one tensor, rows first, and returns one; x (rows, ...), y (rows, ...).

    The layer's parameters are the module's, under the same names, and running averages for the buffers that its forward
    pass changes: a step makes each the mean over its rows of what their micro-batches make of it. Other buffers, and
    parameters that require no gradient, are constants, which checkpoints hold unless they are buffers with
    persistent=False. Random numbers that the module draws are keyed as in other layers. A module that takes integers,
    as nn.Embedding does, gets integers.

    `output_shape` is called once before the parameters are placed: it tries the module, which shows what it changes.

    Args:
        flags: of the module's parts, in evaluation and in training; by default what `train` makes them.
        names: of the tensors in the user's module that this one is a part of.
        device: on which the module computes; it is on the host until it is called.
        autocast: whether PyTorch may compute in bfloat16 what it deems safe in that.

    Raises ConfigError for a module that cannot be trained as a layer.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        dtype: DTypeLike = np.float32,
        flags: Flags | None = None,
        names: Mapping[Tensor, Sequence[str]] = MappingProxyType({}),
        device: Host = HOST,
        autocast: bool = False,
    ):
        check_parameters(module, device.kind)
        self.device, self.arrays, self._autocast = device, not device.there, autocast
        self.torch_names = torch_state.by_name(module, torch_state.names_of(module))
        self.torch_own_names = torch_state.by_name(module, names)
        self.dtype = torch.from_numpy(np.empty(0, dtype)).dtype
        self._types = types_besides(module, self.dtype)
        self.module = converted(module, self.dtype)
        flags = flags_of([module]) if flags is None else flags
        self._flags = {p: flags.get(p, (False, True)) for p in module.modules() if p is uncompiled(p)}
        self.tensors = {plain_name(n): tensor for n, tensor in module.named_parameters() if tensor.requires_grad}
        self.parameters: dict[str, Parameter] = {
            name: Parameter(real_shape(tensor), first_values(tensor), decay=tensor.ndim > 1)
            for name, tensor in self.tensors.items()
        }
        self._state: dict[str, Statistic] = {}  # by the names of the buffers that the forward pass changes
        self._first = torch_state.tensors(module)
        self._bound: list[Array] | None = None
        self._mode: bool | None = None  # whether parts are as in training
        self.frozen: list[Tensor] = []  # parameters that are not trained
        self._trials: dict[Shape, Trial] = {}
        if isinstance(joined := uncompiled(module), Joined):
            self.joined, self.notes = joined.text, [joined.text]

    def own_parameters(self) -> Mapping[str, Parameter]:
        return self.parameters

    @property
    def given(self) -> torch.nn.Module:
        return self.module[0] if isinstance(self.module, Joined) else self.module

    @property
    def stack(self) -> Callable[[Sequence[Any]], Layer] | None:
        """A module that draws again in its backward pass stands alone, because it needs numbers of its own there."""
        return None if any(trial.redraws for trial in self._trials.values()) else TorchStack

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        return through([self], x, at)

    def forward(self, x: Tensor, at: At) -> tuple[Tensor, dict[str, Tensor]]:
        """The module's outputs; and in training, what it makes of each buffer that it changes, times the rows."""
        trial = self._trial(tuple(x.shape[1:]))
        self._bind()
        if self._mode != at.training:
            set_flags(self._flags, at.training)
            self._mode = at.training
        self._fill_buffers()
        if trial.wants_leaf and not x.requires_grad and is_optimised(self):
            x = x.detach().requires_grad_(at.training)
        frozen, draws = self.frozen if at.training else [], keyed(trial.draws, at.seed, *self._purpose(at))
        with draws, torch.set_grad_enabled(at.training), constant(frozen):
            y = self._run(x, trial)
        self._check_unchanged(at)
        check_shape(self, "outputs", tuple(y.shape), (len(x), *trial.output), "its output_shape says")
        return y, self._observed(len(x)) if at.training else {}

    def begin_backward(self) -> None:
        """Be ready for a backward pass, and for a forward pass that is computed again in it, from the same buffers."""
        for tensor in self.tensors.values():
            tensor.grad = None
        self._fill_buffers()

    def write(self, observed: Mapping[str, Tensor], grads: Gradients) -> None:
        """Write the gradients that a backward pass has left, and what has been observed."""
        for name, tensor in self.tensors.items():
            gradient, tensor.grad = tensor.grad, None
            if not self.parameters[name].frozen:
                write(grads[self.parameters[name]], None if gradient is None else as_real(gradient.to_dense()))
        for name, value in observed.items():
            write(grads[self._state[name]], value)

    def redrawn(self, x: Array, at: At) -> AbstractContextManager[None]:
        """What the backward pass of a call with rows x runs in: random numbers that it draws are keyed."""
        return keyed(self._trial(tuple(x.shape[1:])).redraws, at.seed, *self._purpose(at), "backward")

    def takes_ids(self, x: Array) -> bool:
        """Whether rows like those of x must be integers."""
        return self._trial(tuple(x.shape[1:])).takes_ids

    def _purpose(self, at: At) -> tuple[str, str, int, int]:
        return "torch", self.path, at.step, at.microbatch

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        with super().unchanged(), Buffers(self.module).copied(), kept(list(self.tensors.values())):
            yield
        self._bound = None
        vars(self).pop("_values", None)

    def described(self) -> dict[str, str]:
        named = {plain_name(name): part for name, part in self.module.named_modules()}
        modules = {f"{self.path}.{name}".rstrip("."): described(part) for name, part in named.items()}
        return modules | {f"{self.path}.{name}": own.checksum for name, own in self.own_constants().items()}

    def own_constants(self) -> Mapping[str, Constant]:
        saved = torch_state.saved_names(self.module)
        return {
            name + part: Constant(array, name + part in saved)
            for name, tensor in torch_state.tensors(self.module).items()
            if name not in self.parameters
            for part, array in arrays(tensor).items()
        }

    def state_dict(self) -> dict[str, Any]:
        """The module's state dict with the layer's values, in memory of its own."""
        self._give_values()
        state = self.module.state_dict()
        return {plain_name(n): value.clone() if isinstance(value, Tensor) else value for n, value in state.items()}

    def evaluated(self) -> torch.nn.Module:
        """The module itself, with the layer's values, as an evaluation calls it."""
        self._give_values()
        set_flags(self._flags, False)
        return self.module

    def _give_values(self) -> None:
        """Copy the layer's values into the module."""
        named = torch_state.tensors(self.module)
        torch_state.copy((parts(named[name])[""], parameter.value) for name, parameter in self.parameters.items())

    def output_shape(self, shape: Shape) -> Shape:
        return self._trial(shape).output

    def flops(self, shape: Shape) -> int:
        return self._trial(shape).flops

    def check_place(self, shape: Shape, tokens: int) -> None:
        trial = self._trial(shape)
        if is_optimised(self) and not any(self.parameters[name].optimised for name in trial.reached):
            raise ConfigError(f"{self._name()} gives no gradient to any of its parameters: its output is detached")
        if self.needs_dx and not trial.reaches_input:
            raise ConfigError(f"{self._name()} gives no gradient to the layers before it: its output is detached")
        if trial.takes_ids and tokens:
            set_flags(self._flags, False)
            try:
                with keyed(global_generators(), 0), torch.no_grad(), self.device.lent(self.module):
                    ids = tensor_on(self.device, np.full((ROWS[0], *shape), tokens - 1))
                    with Buffers(self.module).copied(), self.device.checked_indices():
                        uncompiled(self.module)(ids)
            except IndexError as error:
                tables = [m for m in self.module.modules() if isinstance(m, torch.nn.Embedding)]
                small = ", ".join(str(table) for table in tables if table.num_embeddings < tokens)
                raise ValueError(f"{self._name()} cannot take token ids up to {tokens - 1}: {small or error}") from None

    def _run(self, x: Tensor, trial: Trial) -> Tensor:
        if trial.takes_ids:
            x = x.long()
        elif trial.writes_input:
            x = x.clone()
        with torch.autocast(torch.device(self.device.torch).type, torch.bfloat16) if self._autocast else nullcontext():
            y = self.module(x)
        return y.to(self.dtype).contiguous().resolve_neg()

    def _bind(self) -> None:
        """Make the module's parameters views of the flat vector of values, which frees their own memory. On a device,
        all else that the module keeps is moved there."""
        values = [parameter.value for parameter in self.parameters.values()]
        if self._bound is not None and all(map(operator.is_, values, self._bound)):
            return
        self._bound = values
        self.frozen = [tensor for name, tensor in self.tensors.items() if self.parameters[name].frozen]
        self._values = {n: self._there(value) for n, value in zip(self.parameters, values, strict=True)}
        if isinstance(self.device, Device):
            self.device.place(self.module)
        for name, tensor in self.tensors.items():
            tensor.data = as_kind_of(tensor, self._values[name])
        self._buffers = Buffers(self.module)
        changing = {place for name in self._state for place in self._buffers.places[name]}
        self._fixed = Snapshot(fixed(self.module, changing))

    def _there(self, value: Any) -> Tensor:
        """A parameter's value where the module computes: a view, or of arrays on the host a copy on its device."""
        return tensor_on(self.device, value) if self.device.there else torch.from_numpy(value)

    def _fill_buffers(self) -> None:
        """Give the module new buffers, with the values before the step, for a call that may change them. Those of
        another micro-batch may still be needed in its backward pass."""
        for name in self._state:
            self._buffers[name] = as_kind_of(self._first[name], self._values[name].clone())

    def _observed(self, rows: int) -> dict[str, Tensor]:
        """What a call with so many rows has made of the buffers that it changes, times these."""
        return {name: as_real(self._buffers[name]).to(self.dtype) * rows for name in self._state}

    def _check_unchanged(self, at: At) -> None:
        """Raise ConfigError if a call has changed what no trial has seen it change."""
        for name, _ in self._fixed.changed():
            when = f"in step {at.step}" if at.training else "in evaluation"
            raise ConfigError(
                f"{self._name()} changes its {name} {when}, though it did not when it was tried before step 1; for a "
                "buffer to be averaged and saved, every call in training must write to it, if only the value that it "
                "has"
            )

    def _trial(self, shape: Shape) -> Trial:
        """How the module treats rows of this shape. Raises as `attempt`."""
        if shape not in self._trials:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # what matters comes again in training
                trial = self._trials[shape] = self._tried(shape)
            self.least_rows, self.notes = trial.least_rows, [*self.notes, *self._frozen(), *trial.notes]
            self._first = torch_state.tensors(self.module)
            for name in trial.state:
                tensor = self._first[name]
                if is_whole(tensor) and (tensor.to(self.dtype).to(tensor.dtype) != tensor).any():
                    raise ConfigError(f"{self._name()} changes {name}: {self.dtype} cannot hold such large integers")
                statistic = Statistic(real_shape(tensor), first_values(tensor), momentum=1.0)
                statistic.name = f"{self.path}.{name}"
                self._state[name] = self.parameters[name] = statistic
        return self._trials[shape]

    def _tried(self, shape: Shape) -> Trial:
        """The module, tried. Parameters of another type than the run's are in a note, and in its error."""
        cast = f"parameters come as {self._types} and are trained as {self.dtype}, by --dtype" if self._types else ""
        try:
            with self.device.lent(self.module):
                trial = attempt(self.module, self._flags, shape, self.dtype, self._name(), self.device)
        except ValueError as error:
            if not cast:
                raise
            kind = ConfigError if isinstance(error, ConfigError) else ValueError
            raise kind(f"{error}; its {cast}") from error
        trial.notes += [f"{self._name()}: its {cast}"] if cast else []
        return trial

    def _frozen(self) -> list[str]:
        """A note on parts that are in evaluation mode in training, too."""
        parts = [
            plain_name(n) for n, part in self.module.named_modules() if not self._flags.get(part, (False, True))[1]
        ]
        what = "" if "" in parts else f" in its parts {first_few(parts)}"
        return [f"{self._name()} stays in evaluation mode{what}, as the model function left it"] if parts else []

    def _name(self) -> str:
        return f"{self.path}, {type(uncompiled(self.module)).__name__},".lstrip(", ")


def as_layers(
    model: Any,
    dtype: DTypeLike,
    threads: int,
    inputs: Inputs | None = None,
    bounds: Sequence[int] = (),
    device: Host = HOST,
    autocast: bool = False,
) -> Any:
    """The layers of a user's model, with a TorchLayer for each torch module; a model without any is returned unchanged.

    The first takes `inputs`, with integers within `bounds`, if rows have several. `device`, `autocast` as of
    TorchLayer. Raises ConfigError for modules that cannot be trained as layers.
    """
    roots = [root for root in ([model] if is_module(model) else parts_of(model)) if is_module(root)]
    if not roots:
        return model
    prepare_torch(threads, device)
    flags, parts = flags_of(roots), parts_of(model)
    names = torch_state.names_of(model) if is_module(model) else {}
    if inputs and is_module(parts[0]):
        split_inputs(parts[0], inputs, bounds)
    return [TorchLayer(part, dtype, flags, names, device, autocast) if is_module(part) else part for part in parts]


def integers(layers: Sequence[Layer]) -> list[slice]:
    """The values of packed rows that the first layer, if it is a torch module, takes as integers."""
    return INTEGERS.get(layers[0].module, []) if isinstance(layers[0], TorchLayer) else []
