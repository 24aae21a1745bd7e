"""The tensors of a PyTorch module in a checkpoint: which are saved, and how they get back into a module."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpiml.documents import AVERAGE, averaged, check_regular, texts
from mpiml.nn.constants import ARRAY, Constant
from mpiml.nn.torch_names import plain_name
from mpiml.nn.torch_parts import is_module, parts_of
from mpiml.nn.torch_tensors import arrays, parts, plain

T = TypeVar("T")
Array = NDArray[Any]
Pair = tuple[Tensor, Array]  # memory of a module, and the values that belong there


def tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    """The module's parameters and buffers by name; one that has several names under its first."""
    return {plain_name(name): tensor for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def names_of(module: torch.nn.Module) -> dict[Tensor, list[str]]:
    """All names of the module's parameters and buffers."""
    names: dict[Tensor, list[str]] = {}
    named = [module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)]
    for name, tensor in itertools.chain(*named):
        names.setdefault(tensor, []).append(plain_name(name))
    return names


def by_name(module: torch.nn.Module, names: Mapping[Tensor, Sequence[str]]) -> dict[str, Sequence[str]]:
    """Of each tensor of a module, by its name there, the `names` that it has."""
    return {name: names[tensor] for name, tensor in tensors(module).items() if tensor in names}


def saved_names(module: torch.nn.Module) -> set[str]:
    """The names of what checkpoints hold: parameters and persistent buffers; of sparse ones the values, but not the
    indices: those that somebody has forged would make torch read outside its memory."""
    parameters = {name for name, _ in module.named_parameters()}
    names = {plain_name(name) for name in parameters | set(module.state_dict(keep_vars=True))}
    return names | {f"{name}.values" for name in names}


@dataclass
class SavedState:
    """What a checkpoint says of the model.

    Attributes:
        arrays: those of the model by name; `pairs` takes them out.
        constants: the entry of each constant (Constant.entry); None if it has none.
        dtype: the one that the run trained in.
    """

    path: str
    arrays: dict[str, Array]
    constants: Mapping[str, str] | None
    dtype: torch.dtype

    def pairs(self, module: torch.nn.Module, prefix: str) -> Iterator[Pair]:
        """The module's memory with the arrays for it, whose names begin with `prefix`.

        Raises ValueError for one that is missing, or of another shape, and for a tensor of which the checkpoint has the
        checksum alone, which is another one.
        """
        module._apply(plain)
        saved = saved_names(module)
        for name, tensor in tensors(module).items():
            for part, memory in parts(tensor).items():
                full_name = f"{prefix}{name}{part}"
                values = None if part and name + part not in saved else self.arrays.pop(full_name, None)
                if values is None:
                    self._check_missing(full_name, memory, needed=tensor.requires_grad, saved=name + part in saved)
                elif values.shape != memory.shape:
                    raise self._other(full_name, f"{values.shape} in it, and {tuple(memory.shape)} here")
                elif not self._takes(full_name, memory, values):
                    raise self._other(full_name, f"{values.dtype} in it, and {memory.dtype} here")
                else:
                    yield memory, values

    def _takes(self, name: str, memory: Tensor, values: Array) -> bool:
        """Whether values may be written there: all precisions go together, and an average of integers is real."""
        kind = torch.empty(0, dtype=memory.dtype).numpy().dtype.kind if not memory.is_floating_point() else "f"
        average = values.dtype.kind == "f" and name not in (self.constants or {})
        return values.dtype.kind == kind or (average and kind in "iu")

    def _check_missing(self, name: str, memory: Tensor, needed: bool, saved: bool) -> None:
        entry = None if self.constants is None else self.constants.get(name, ARRAY if saved else None)
        if needed or entry == ARRAY:
            raise self._other(name, f"not in it, and {tuple(memory.shape)} here")
        as_trained = memory.to(self.dtype) if memory.is_floating_point() else memory
        if entry is not None and entry != Constant(arrays(as_trained)[""], saved=False).checksum:
            raise ValueError(
                f"{name} is not what {self.path} was trained with, which has the checksum alone "
                "(buffers with persistent=False, and indices of sparse ones, are in no checkpoint), so the model must "
                "come with the same"
            )

    def _other(self, name: str, difference: str) -> ValueError:
        return ValueError(f"{self.path} is of another model: {name} is {difference}")


def read(path: str | Path, average: bool) -> SavedState:
    """The model's arrays in a checkpoint, which is not verified; if `average`, with averages in the place of weights.
    Raises OutputError if it is not a file, or has no averages."""
    import safetensors

    check_regular(Path(path))
    kinds = ("layers.", AVERAGE) if average else ("layers.",)
    with safetensors.safe_open(path, framework="numpy") as file:
        held = {name: file.get_tensor(name) for name in file.keys() if name.startswith(kinds)}  # noqa: SIM118
        entries = (file.metadata() or {}).get("constants")
    held = averaged(held, str(path)) if average else held
    constants = texts(entries, f"{path}: constants") if entries else None
    trained = next((array.dtype for name, array in held.items() if name not in (constants or {})), np.float32)
    return SavedState(str(path), held, constants, torch.from_numpy(np.empty(0, trained)).dtype)


def copy(pairs: Iterable[Pair]) -> None:
    """Write values where they belong. An average of integers, which training keeps as a real number, is rounded."""
    with torch.no_grad():
        for memory, values in pairs:
            given = torch.from_numpy(values)
            whole = given.is_floating_point() and not memory.is_floating_point()
            memory.copy_(given.round() if whole else given)


def load_into(model: T, path: str | Path, average: bool = False) -> T:
    """Copies a checkpoint into the model's torch modules: weights or, if `average`, the average of them that a run with
    --ema keeps; parameters that require no gradient, and persistent buffers. Returns the model.

    `model` is what the function returns that the run's --model names. Buffers that are not persistent are in no
    checkpoint; they are compared with those of the run.

    Raises ValueError for another model's checkpoint, naming what is missing, has another shape or other values; the
    model is then unchanged. OutputError if it is not a file, or has no average.
    """
    saved, of_model, pairs = read(path, average), parts_of(model), list[Pair]()
    for index, part in enumerate(of_model):
        if is_module(part):
            pairs += saved.pairs(part, f"layers.{index}.")
    others = tuple(f"layers.{index}." for index, part in enumerate(of_model) if not is_module(part))
    if more := [name for name in saved.arrays if not name.startswith(others)]:
        raise ValueError(f"{path} is of another model: {min(more)} is in it, and not here")
    copy(pairs)
    return model
