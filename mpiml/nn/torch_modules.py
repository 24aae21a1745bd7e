"""PyTorch modules as layers: autograd does their backward passes, and everything else is as for other layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from mpiml.errors import ConfigError
from mpiml.nn import torch_state
from mpiml.nn.base import Array, At, Backward, Layer, described
from mpiml.nn.parameters import Constant, Gradients, Parameter, Shape
from mpiml.nn.torch_inputs import INTEGERS, Inputs, split_inputs
from mpiml.nn.torch_tensors import arrays, as_tensor, first_values, gradients, parts, plain, prepare_torch
from mpiml.nn.torch_trial import ROWS, Trial, attempt, check_parameters
from mpiml.random import keyed

T = TypeVar("T")


class TorchLayer(Layer):
    """y = module(x), for a module that takes one tensor, rows first, and returns one; x (rows, ...), y (rows, ...).

    The layer's parameters are the module's, under the same names; buffers, and parameters that require no gradient,
    are constants, which checkpoints hold unless they are buffers with persistent=False. Random numbers that the module
    draws are keyed as in other layers. A module that takes integers, as nn.Embedding does, gets integers.

    Raises ConfigError for a module that cannot be trained as a layer.
    """

    def __init__(self, module: torch.nn.Module, dtype: DTypeLike = np.float32):
        check_parameters(module)
        self.dtype = torch.from_numpy(np.empty(0, dtype)).dtype
        self.module = _converted(module, self.dtype)
        self.tensors = {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}
        self.parameters = {name: Parameter(tuple(t.shape), first_values(t)) for name, t in self.tensors.items()}
        self._views: dict[str, NDArray[np.floating]] = {}
        self._trials: dict[Shape, Trial] = {}

    def own_parameters(self) -> Mapping[str, Parameter]:
        return self.parameters

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        self._bind()
        trial = self._trial(x.shape[1:])
        source = as_tensor(x)
        wanted = list(self.tensors.values())
        if wants_dx := self.needs_dx and not trial.takes_ids:
            wanted.append(source.requires_grad_(at.training))
        with (
            keyed(["PyTorch"], at.seed, "torch", self.path, at.step, at.microbatch),
            torch.set_grad_enabled(at.training),
        ):
            y = self._run(source, trial, at.training)

        def backward(dy: Array, grads: Gradients) -> Array | None:
            by_tensor = gradients(y, wanted, as_tensor(dy))
            for parameter, gradient in zip(self.parameters.values(), by_tensor, strict=False):
                np.copyto(grads[parameter], gradient.numpy())
            return by_tensor[-1].numpy() if wants_dx else None

        return y.detach().numpy(), backward

    def described(self) -> dict[str, str]:
        modules = {f"{self.path}.{name}".rstrip("."): described(part) for name, part in self.module.named_modules()}
        return modules | {f"{self.path}.{name}": own.checksum for name, own in self.own_constants().items()}

    def own_constants(self) -> Mapping[str, Constant]:
        saved = torch_state.saved_names(self.module)
        return {
            name + part: Constant(array, name + part in saved)
            for name, tensor in torch_state.tensors(self.module).items()
            if name not in self.tensors
            for part, array in arrays(tensor).items()
        }

    def state_dict(self) -> dict[str, Any]:
        """The module's state dict with the layer's values, in memory of its own."""
        named = torch_state.tensors(self.module)
        torch_state.copy((parts(named[name])[""], parameter.value) for name, parameter in self.parameters.items())
        state = self.module.state_dict()
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}

    def output_shape(self, shape: Shape) -> Shape:
        return self._trial(shape).output

    def flops(self, shape: Shape) -> int:
        return self._trial(shape).flops

    def check_place(self, shape: Shape, tokens: int) -> None:
        trial = self._trial(shape)
        if self.tensors and not trial.reaches_parameters:
            raise ConfigError(f"{self._name()} gives no gradient to any of its parameters: its output is detached")
        if self.needs_dx and not trial.reaches_input:
            raise ConfigError(f"{self._name()} gives no gradient to the layers before it: its output is detached")
        if trial.takes_ids and tokens:
            try:
                with keyed(["PyTorch"], 0), torch.no_grad():
                    self.module(torch.full((ROWS[0], *shape), tokens - 1))
            except IndexError as error:
                tables = [m for m in self.module.modules() if isinstance(m, torch.nn.Embedding)]
                small = ", ".join(str(table) for table in tables if table.num_embeddings < tokens)
                raise ValueError(f"{self._name()} cannot take token ids up to {tokens - 1}: {small or error}") from None

    def _run(self, x: Tensor, trial: Trial, training: bool) -> Tensor:
        if self.module.training != training:
            self.module.train(training)
        if trial.takes_ids:
            x = x.long()
        elif trial.writes_input:
            x = x.clone()
        return self.module(x).to(self.dtype).contiguous()

    def _bind(self) -> None:
        """Make the module's parameters views of the flat vector of values, which frees their own memory."""
        for name, parameter in self.parameters.items():
            if self._views.get(name) is not parameter.value:
                self.tensors[name].data = torch.from_numpy(parameter.value)
                self._views[name] = parameter.value

    def _trial(self, shape: Shape) -> Trial:
        """How the module treats rows of this shape. Raises as `attempt`."""
        if shape not in self._trials:
            self._trials[shape] = attempt(self.module, shape, self.dtype, self._name())
        return self._trials[shape]

    def _name(self) -> str:
        return f"{self.path}, {type(self.module).__name__},".lstrip(", ")


def as_layers(
    model: Any, dtype: DTypeLike, threads: int, inputs: Inputs | None = None, bounds: Sequence[int] = ()
) -> Any:
    """The layers of a user's model, with a TorchLayer for each torch module; a model without any is returned unchanged.

    The first takes `inputs`, with integers within `bounds`, if rows have several. Raises ConfigError for modules that
    cannot be trained as layers.
    """
    parts = parts_of(model)
    if not any(is_module(part) for part in [model, *parts]):
        return model
    prepare_torch(threads)
    owner: dict[Tensor, int] = {}
    for index, part in enumerate(parts):
        for name, tensor in part.named_parameters() if is_module(part) else ():
            if tensor.requires_grad and owner.setdefault(tensor, index) != index:
                raise ConfigError(
                    f"layers {owner[tensor]} and {index} of the model share {name}; only parts of one module can share "
                    f"parameters, so combine layers {owner[tensor]} to {index} into one module"
                )
    if inputs and is_module(parts[0]):
        split_inputs(parts[0], inputs, bounds)
    return [TorchLayer(part, dtype) if is_module(part) else part for part in parts]


def is_module(model: Any) -> bool:
    """Whether a user's model is a PyTorch module; unlike other things that can be called, it makes no model."""
    return isinstance(model, torch.nn.Module)


def parts_of(model: Any) -> list[Any]:
    """The parts of a model that become layers: children of an nn.Sequential, items of a list, another module whole."""
    if is_module(model):
        return list(model) if type(model).forward is torch.nn.Sequential.forward else [model]
    return list(model) if isinstance(model, Sequence) else [model]


def load_into(model: T, path: str | Path) -> T:
    """Copies a checkpoint into the model's torch modules: weights, parameters that require no gradient, and persistent
    buffers. Returns the model.

    `model` is what the function returns that the run's --model names. Buffers that are not persistent are in no
    checkpoint; they are compared with those of the run.

    Raises ValueError for another model's checkpoint, naming what is missing, has another shape or other values; the
    model is then unchanged. OutputError if it is not a file.
    """
    saved, parts, pairs = torch_state.read(path), parts_of(model), list[torch_state.Pair]()
    for index, part in enumerate(parts):
        if is_module(part):
            pairs += saved.pairs(part, f"layers.{index}.")
    others = tuple(f"layers.{index}." for index, part in enumerate(parts) if not is_module(part))
    if more := [name for name in saved.arrays if not name.startswith(others)]:
        raise ValueError(f"{path} is of another model: {min(more)} is in it, and not here")
    torch_state.copy(pairs)
    return model


def integers(layers: Sequence[Layer]) -> list[slice]:
    """The values of packed rows that the first layer, if it is a torch module, takes as integers."""
    return INTEGERS.get(layers[0].module, []) if isinstance(layers[0], TorchLayer) else []


def _converted(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The module itself, with real tensors in `dtype` and complex ones in its complex counterpart; integers stay."""

    def convert(tensor: Tensor) -> Tensor:
        real = tensor.is_floating_point()
        return plain(tensor.to(dtype if real else dtype.to_complex()) if real or tensor.is_complex() else tensor)

    return module._apply(convert)  # module.to(dtype) would drop imaginary parts
