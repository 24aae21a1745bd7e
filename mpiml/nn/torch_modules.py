"""PyTorch modules as layers: autograd does their backward passes, and everything else is as for other layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from mpiml.documents import check_regular
from mpiml.errors import ConfigError
from mpiml.nn.base import Array, At, Backward, Layer, described
from mpiml.nn.parameters import Gradients, Parameter, Shape
from mpiml.nn.torch_tensors import as_tensor, checksum, first_values, gradients, prepare_torch
from mpiml.nn.torch_trial import ROWS, Trial, attempt, check_parameters
from mpiml.random import keyed

T = TypeVar("T")


class TorchLayer(Layer):
    """y = module(x), for a module that takes one tensor, rows first, and returns one; x (rows, ...), y (rows, ...).

    The layer's parameters are the module's, under the same names; buffers, and parameters that require no gradient,
    are constants. Random numbers that the module draws are keyed as in other layers. A module that takes integers, as
    nn.Embedding does, gets integers.

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
        return modules | self.constants()

    def constants(self) -> dict[str, str]:
        """A checksum of each tensor that training does not change, by name."""
        named = dict([*self.module.named_parameters(), *self.module.named_buffers()])
        return {f"{self.path}.{n}": f"{checksum(t):08x}" for n, t in named.items() if n not in self.tensors}

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


def as_layers(model: Any, dtype: DTypeLike, threads: int) -> Any:
    """The layers of a user's model, with a TorchLayer for each torch module; a model without any is returned unchanged.
    Raises ConfigError for modules that cannot be trained as layers."""
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
    """Copies the weights of a checkpoint into the model's torch modules. Returns the model.

    `model` is what the function returns that the run's --model names. Parameters that require no gradient are not in a
    checkpoint and stay as they are. Raises ValueError for another model's checkpoint, OutputError if it is not a file.
    """
    from safetensors.numpy import load_file

    check_regular(Path(path))
    arrays = load_file(path)
    parts = parts_of(model)
    for index, part in enumerate(parts):
        for name, tensor in part.named_parameters() if is_module(part) else ():
            if not tensor.requires_grad:
                continue
            full_name = f"layers.{index}.{name}"
            values = arrays.pop(full_name, None)
            if values is None or values.shape != tensor.shape:
                saved = "not in it" if values is None else f"{values.shape} in it"
                raise ValueError(f"{path} is of another model: {full_name} is {saved}, and {tuple(tensor.shape)} here")
            tensor.detach().copy_(torch.from_numpy(values))
    others = tuple(f"layers.{index}." for index, part in enumerate(parts) if not is_module(part))
    if more := [name for name in arrays if name.startswith("layers.") and not name.startswith(others)]:
        raise ValueError(f"{path} is of another model: {min(more)} is in it, and not here")
    return model


def constants(layers: Sequence[Layer]) -> dict[str, str] | None:
    """A checksum, by name, of each tensor of torch modules that training does not change; None without such modules."""
    modules = [layer for layer in layers if isinstance(layer, TorchLayer)]
    return {name: text for layer in modules for name, text in layer.constants().items()} if modules else None


def _converted(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The module itself, with real tensors in `dtype` and complex ones in its complex counterpart; integers stay."""

    def convert(tensor: Tensor) -> Tensor:
        real = tensor.is_floating_point()
        return tensor.to(dtype if real else dtype.to_complex()) if real or tensor.is_complex() else tensor

    return module._apply(convert)  # module.to(dtype) would drop imaginary parts
