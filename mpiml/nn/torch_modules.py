"""PyTorch modules as layers: autograd does their backward passes, and all else is as for other layers."""

from __future__ import annotations

import math
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mpiml import vectors
from mpiml.documents import check_regular
from mpiml.errors import ConfigError
from mpiml.nn.base import Array, At, Backward, Layer, described
from mpiml.nn.parameters import Gradients, Init, Parameter, Shape
from mpiml.random import key

T = TypeVar("T")
ROWS = 2, 3  # of the two runs of a trial: an axis of one length cannot be taken for that of rows in both


@dataclass(frozen=True)
class Trial:
    """What a module did with rows of zeros.

    Attributes:
        output: the shape of a row that it gives.
        flops: of the forward pass for a row.
        ids: whether the rows had to be whole numbers, as token ids are.
        writes: whether it wrote to its input.
        learns, passes: whether it gives some parameter, and its input, a gradient.
    """

    output: Shape
    flops: int
    ids: bool
    writes: bool
    learns: bool
    passes: bool


class TorchLayer(Layer):
    """y = module(x), for a module that takes one tensor, rows first, and gives one.

    Its parameters are the module's, under the module's names for them; those that require no gradient are constants,
    as buffers are. Random numbers that it draws are keyed as those of other layers. Where it takes whole numbers, as
    nn.Embedding does, it gets them.

    Raises ConfigError for a module that cannot be trained as a layer.
    """

    def __init__(self, module: torch.nn.Module, dtype: DTypeLike = np.float32):
        self._check(module)
        self.dtype = torch.from_numpy(np.empty(0, dtype)).dtype
        self.module = _converted(module, self.dtype)
        self.tensors = {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}
        self.parameters = {
            name: Parameter(tuple(tensor.shape), first_values(tensor)) for name, tensor in self.tensors.items()
        }
        self._views: dict[str, NDArray[np.floating]] = {}
        self._trials: dict[Shape, Trial] = {}

    def own_parameters(self) -> Mapping[str, Parameter]:
        return self.parameters

    def __call__(self, x: Array, at: At) -> tuple[Array, Backward]:
        self._follow()
        trial = self._trial(x.shape[1:])
        source = as_tensor(x)
        wanted = list(self.tensors.values())
        if wants_dx := self.needs_dx and not trial.ids:
            wanted.append(source.requires_grad_(at.training))
        with keyed(at.seed, "torch", self.path, at.step, at.microbatch), torch.set_grad_enabled(at.training):
            y = self._run(source, trial, at.training)

        def backward(dy: Array, grads: Gradients) -> Array | None:
            found = _gradients(y, wanted, as_tensor(dy))
            for parameter, gradient in zip(self.parameters.values(), found, strict=False):
                np.copyto(grads[parameter], gradient.numpy())
            return found[-1].numpy() if wants_dx else None

        return y.detach().numpy(), backward

    def described(self) -> dict[str, str]:
        modules = {f"{self.path}.{name}".rstrip("."): described(part) for name, part in self.module.named_modules()}
        return modules | self.constants()

    def constants(self) -> dict[str, str]:
        """A checksum of each tensor that no training changes."""
        named = dict([*self.module.named_parameters(), *self.module.named_buffers()])
        return {f"{self.path}.{n}": f"{_checksum(t):08x}" for n, t in named.items() if n not in self.tensors}

    def output_shape(self, shape: Shape) -> Shape:
        return self._trial(shape).output

    def flops(self, shape: Shape) -> int:
        return self._trial(shape).flops

    def check_place(self, shape: Shape, tokens: int) -> None:
        trial = self._trial(shape)
        if self.tensors and not trial.learns:
            raise ConfigError(f"{self._name()} gives no gradient to any of its parameters: something is detached")
        if self.needs_dx and not trial.passes:
            raise ConfigError(f"{self._name()} gives no gradient to the layers before it: something is detached")
        if trial.ids and tokens:
            try:
                with keyed(0), torch.no_grad():
                    self.module(torch.full((ROWS[0], *shape), tokens - 1))
            except IndexError as error:
                tables = [m for m in self.module.modules() if isinstance(m, torch.nn.Embedding)]
                small = ", ".join(str(table) for table in tables if table.num_embeddings < tokens)
                raise ValueError(
                    f"{self._name()} takes no token ids as high as {tokens - 1}: {small or error}"
                ) from None

    def _run(self, x: Tensor, trial: Trial, training: bool) -> Tensor:
        if self.module.training != training:
            self.module.train(training)
        if trial.ids:
            x = x.long()
        elif trial.writes:
            x = x.clone()
        return self.module(x).to(self.dtype).contiguous()

    def _follow(self) -> None:
        """Make the module's parameters views of the flat values, wherever these are; its own memory is freed."""
        for name, parameter in self.parameters.items():
            if self._views.get(name) is not parameter.value:
                self.tensors[name].data = torch.from_numpy(parameter.value)
                self._views[name] = parameter.value

    def _trial(self, shape: Shape) -> Trial:
        """What the module does with rows of this shape. Raises ValueError if it cannot take them."""
        if shape not in self._trials:
            self._trials[shape] = self._try(shape)
        return self._trials[shape]

    def _try(self, shape: Shape) -> Trial:
        errors: list[Exception] = []
        for dtype in (self.dtype, torch.long):
            try:
                return self._run_zeros(shape, dtype)
            except ConfigError:
                raise
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                errors.append(error)
        # A module that takes whole numbers says so when it gets others, and only then what is really wrong.
        what = str(errors["long" in str(errors[0]).lower()]).splitlines()[0]
        raise ValueError(f"{self._name()} takes no rows of shape {shape}: {what}")

    def _run_zeros(self, shape: Shape, dtype: torch.dtype) -> Trial:
        before = _state(self.module)
        self.module.train()
        found: list[Shape] = []
        for rows in ROWS:
            source = torch.zeros((rows, *shape), dtype=dtype, requires_grad=dtype.is_floating_point)
            x = source.clone()  # which may be written to
            with keyed(0), torch.enable_grad(), FlopCounterMode(display=False) as counter:
                y = self.module(x)
            if not isinstance(y, Tensor):
                raise ValueError(f"it returns a {type(y).__name__}, but a layer gives one tensor")
            found.append(tuple(y.shape[1:]))
            if not y.is_floating_point() or not y.ndim or len(y) != rows or found[0] != found[-1]:
                raise ValueError(f"for {rows} rows it returns {y.dtype} of shape {tuple(y.shape)}")
        if changed := [name for name, number in _state(self.module).items() if before.get(name) != number]:
            raise ConfigError(
                f"{self._name()} changes {', '.join(changed[:3])} as it computes, and each rank would come to values "
                "of its own; GroupNorm would work, or BatchNorm with track_running_stats=False"
            )
        reached = _reached(y)
        return Trial(
            output=found[0],
            flops=counter.get_total_flops() // rows + math.prod(shape),
            ids=not dtype.is_floating_point,
            writes=x._version > 0,
            learns=any(tensor in reached for tensor in self.tensors.values()),
            passes=source in reached,
        )

    def _name(self) -> str:
        return f"{self.path}, {type(self.module).__name__},".lstrip(", ")

    def _check(self, module: torch.nn.Module) -> None:
        """Raise ConfigError for parameters that cannot lie in the flat vector."""
        for name, tensor in module.named_parameters():
            what = f"{type(module).__name__}: its parameter {name}"
            if torch.nn.parameter.is_lazy(tensor):
                raise ConfigError(f"{what} has no shape before the first call; give it one, for the function knows it")
            if tensor.device.type != "cpu":
                raise ConfigError(f"{what} is on {tensor.device}; modules are trained on the CPU")
            if tensor.requires_grad and tensor.is_complex():
                raise ConfigError(f"{what} is complex; real parameters are needed")


def as_layers(made: Any, dtype: DTypeLike, threads: int) -> Any:
    """What a user's function made, with torch modules as layers; what holds none is returned as it is.

    Raises ConfigError for modules that cannot be trained as layers.
    """
    parts = parts_of(made)
    if not any(is_module(part) for part in [made, *parts]):
        return made
    prepare_torch(threads)
    owner: dict[Tensor, int] = {}
    for index, part in enumerate(parts):
        for name, tensor in part.named_parameters() if is_module(part) else ():
            if tensor.requires_grad and owner.setdefault(tensor, index) != index:
                raise ConfigError(
                    f"layers {owner[tensor]} and {index} of the model share {name}; parameters can be shared only "
                    "inside one module, so put what lies between into one"
                )
    return [TorchLayer(part, dtype) if is_module(part) else part for part in parts]


def is_module(made: Any) -> bool:
    """Whether it is a PyTorch module, which can be called, but is no function that makes a model."""
    return isinstance(made, torch.nn.Module)


def parts_of(made: Any) -> list[Any]:
    """What becomes a layer each: children of an nn.Sequential, any other module, items of a list."""
    if is_module(made):
        return list(made) if type(made).forward is torch.nn.Sequential.forward else [made]
    return list(made) if isinstance(made, Sequence) else [made]


def load_into(made: T, path: str | Path) -> T:
    """Puts the weights of a checkpoint into what the function made that the run's --model names, and returns it.

    What requires no gradient is not in a checkpoint and stays as it is. Raises ValueError for another model's,
    OutputError for what is no file.
    """
    from safetensors.numpy import load_file

    check_regular(Path(path))
    arrays = load_file(path)
    parts = parts_of(made)
    for index, part in enumerate(parts):
        for name, tensor in part.named_parameters() if is_module(part) else ():
            if not tensor.requires_grad:
                continue
            found = arrays.pop(f"layers.{index}.{name}", None)
            if found is None or found.shape != tensor.shape:
                what = "none" if found is None else f"one of shape {found.shape}"
                raise ValueError(f"{path} is of another model: layers.{index}.{name} {tuple(tensor.shape)}, has {what}")
            tensor.detach().copy_(torch.from_numpy(found))
    others = tuple(f"layers.{index}." for index, part in enumerate(parts) if not is_module(part))
    if more := [name for name in arrays if name.startswith("layers.") and not name.startswith(others)]:
        raise ValueError(f"{path} is of another model: it has {min(more)}, which this one does not have")
    return made


def constants(layers: Sequence[Layer]) -> dict[str, str] | None:
    """A checksum of each tensor of modules among the layers that no training changes; None if there are no modules."""
    modules = [layer for layer in layers if isinstance(layer, TorchLayer)]
    found: dict[str, str] = {}
    for layer in modules:
        found |= layer.constants()
    return found if modules else None


def prepare_torch(threads: int) -> None:
    """Give torch `threads` threads, and nothing to do whose order they decide."""
    torch.set_num_threads(threads)
    with suppress(RuntimeError):  # too late if it has computed already; then nothing of it is in use here
        torch.set_num_interop_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a matter of finding faults, and slow


@contextmanager
def keyed(seed: int, *purpose: str | int) -> Iterator[None]:
    """In a block, what torch draws is a function of seed and purpose alone."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(key(seed, *purpose) >> 64)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def as_tensor(array: Array) -> Tensor:
    """The array as a tensor: of the same memory if that begins on a 64-byte boundary, for torch's bits depend on it.

    They may depend on strides too, and NumPy's are arbitrary for axes of length 1: so these are torch's.
    """
    flat = array.reshape(-1)
    if flat.ctypes.data % vectors.ALIGNMENT or not flat.flags.writeable:
        aligned = vectors.empty(flat.size, flat.dtype)
        vectors.copy(flat, aligned)
        flat = aligned
    return torch.from_numpy(flat).view(array.shape)


def first_values(tensor: Tensor) -> Init:
    """The tensor's values, some at each call, without keeping a tensor whose module another stage has."""
    held, taken = weakref.ref(tensor), 0

    def init(random: np.random.Generator, count: int) -> NDArray[np.float64]:
        nonlocal taken
        tensor = held()
        assert tensor is not None, "a stage that writes first values has the module that they come from"
        part: NDArray[np.float64] = tensor.detach().reshape(-1)[taken : taken + count].numpy()
        taken = (taken + count) % tensor.numel()
        return part

    return init


def _converted(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The module itself, its real numbers in `dtype`, complex ones in parts of it; whole numbers stay as they are."""

    def convert(tensor: Tensor) -> Tensor:
        real = tensor.is_floating_point()
        return tensor.to(dtype if real else dtype.to_complex()) if real or tensor.is_complex() else tensor

    return module._apply(convert)  # module.to(dtype) would drop imaginary parts


def _gradients(y: Tensor, wanted: Sequence[Tensor], dy: Tensor) -> Sequence[Tensor]:
    """Of y by each tensor; zeros where y does not depend on it."""
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if y.requires_grad:
        found = torch.autograd.grad(y, wanted, dy, allow_unused=True)
    return [torch.zeros_like(of) if g is None else g.to_dense() for of, g in zip(wanted, found, strict=True)]


def _reached(y: Tensor) -> set[Tensor]:
    """The tensors that a gradient by y goes on to."""
    nodes, seen = [y.grad_fn], set[Any]()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
    return {node.variable for node in seen if hasattr(node, "variable")}


def _state(module: torch.nn.Module) -> dict[str, int]:
    """For each parameter and buffer a number that another tells that it was written to."""
    versions = {name: tensor._version for name, tensor in module.named_parameters()}
    # By content: what torch's normalisations write does not count as a version.
    return versions | {name: _checksum(tensor) for name, tensor in module.named_buffers()}


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().contiguous().view(-1).numpy(force=True))
