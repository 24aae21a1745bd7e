"""What a PyTorch module keeps besides its parameters: buffers, flags of training and evaluation, other attributes."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from mpiml.nn.torch_names import plain_name, uncompiled
from mpiml.nn.torch_tensors import checksum

Flags = Mapping[Module, tuple[bool, bool]]  # of each part, in evaluation and in training
Place = tuple[str, dict[str, Tensor | None], str]  # a tensor's name, and where a part holds it, under which key
KEPT_BY_TORCH = frozenset(vars(Module()))  # parameters, buffers, hooks and the like


def flags_of(roots: Sequence[Module]) -> Flags:
    """What `train` makes of the flag `training` of each part. Parts that eval() has frozen stay so, unless all of the
    model is in evaluation mode, as models come from a hub."""
    parts = [part for root in roots for part in root.modules()]
    frozen = {part for part in parts if not part.training} if any(root.training for root in roots) else set()
    for root in roots:
        root.train(False)
    evaluation = {part: part.training for part in parts}
    for root in roots:
        root.train(True)
    return {part: (evaluation[part], part.training and part not in frozen) for part in parts}


def set_flags(flags: Flags, training: bool) -> None:
    """Put parts into training or evaluation mode. It leaves out their `train`, which may also change weights."""
    for part, by_mode in flags.items():
        if part.training != by_mode[training]:
            part.training = by_mode[training]


class Buffers:
    """The buffers of a module by name, and its parameters that require no gradient, such as those of a copy of a part
    that follows it as an average. One tensor at several places is one buffer."""

    def __init__(self, module: Module):
        self.places: dict[str, list[tuple[Module, str]]] = {}
        names: dict[int, str] = {}
        for prefix, part in module.named_modules():
            frozen = [(key, tensor) for key, tensor in part._parameters.items() if not _is_trained(tensor)]
            for key, tensor in [*part._buffers.items(), *frozen]:
                if tensor is not None:
                    name = names.setdefault(id(tensor), plain_name(f"{prefix}.{key}".lstrip(".")))
                    self.places.setdefault(name, []).append((part, key))

    def place(self, name: str) -> Place:
        """Where a part holds the buffer; the first of several."""
        part, key = self.places[name][0]
        return name, part._buffers if key in part._buffers else part._parameters, key

    def __getitem__(self, name: str) -> Tensor:
        _, held, key = self.place(name)
        if (tensor := held.get(key)) is None:
            raise ValueError(f"its buffer {name} is None now; keep what comes and goes in a plain attribute")
        return tensor

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        for part, key in self.places[name]:
            if key in part._buffers:
                part._buffers[key] = tensor
            elif isinstance(tensor, torch.nn.Parameter):
                part._parameters[key] = tensor
            else:
                part._parameters[key] = torch.nn.Parameter(tensor, requires_grad=False)

    def tensors(self) -> dict[str, Tensor]:
        return {name: self[name] for name in self.places}

    def norms(self) -> dict[str, list[Module]]:
        """Of each buffer that torch's own normalisations change in training: these."""
        places = self.places.items()
        norms = {
            name: [part for part, key in all_of if key in part._buffers and _tracks(part)] for name, all_of in places
        }
        return {name: parts for name, parts in norms.items() if parts}

    @contextmanager
    def copied(self) -> Iterator[dict[str, Tensor]]:
        """Within the block the module has copies; the buffers themselves, which the block gets, come back after it."""
        own = self.tensors()
        try:
            for name, tensor in own.items():
                self[name] = tensor.detach().clone()
            yield own
        finally:
            for name, tensor in own.items():
                self[name] = tensor


class Snapshot:
    """How tensors of a module are now, to see later which of them have been written to or replaced.

    Args:
        checksums: of some of them, by name. These are compared by their values, too: what torch's normalisations do,
            and writes to `tensor.data`, shows in nothing else.
    """

    def __init__(self, places: Iterable[Place], checksums: Mapping[str, int] = MappingProxyType({})):
        self._seen = [
            (name, held, key, tensor, tensor._version, address(tensor), checksums.get(name))
            for name, held, key in places
            if (tensor := held.get(key)) is not None
        ]

    def changed(self) -> Iterator[tuple[str, bool]]:
        """The name of each that has changed, and whether only its values show that."""
        for name, held, key, tensor, version, place, values in self._seen:
            now = held.get(key)
            if now is not tensor or now._version != version or address(now) != place:
                yield name, False
            elif values is not None and checksum(now) != values:
                yield name, True


def fixed(module: Module, changing: set[tuple[Module, str]]) -> Iterator[Place]:
    """The parameters and buffers of a module that its calls must not change: all but those of `changing`."""
    for prefix, part in module.named_modules():
        for held in (part._parameters, part._buffers):
            for key in held:
                if (part, key) not in changing:
                    yield plain_name(f"{prefix}.{key}".lstrip(".")), held, key


def marks(module: Module) -> dict[str, int]:
    """For each attribute of a module's parts that is no part, parameter or buffer: a number that changes with it."""
    return {
        plain_name(f"{prefix}.{key}".lstrip(".")): _mark(value)
        for prefix, part in module.named_modules()
        if part is uncompiled(part)
        for key, value in vars(part).items()
        if key not in KEPT_BY_TORCH and value is not None
    }


def checksums(module: Module) -> dict[str, int]:
    """For each parameter by name: a number that changes with its values, and when they are written to or replaced."""
    return {
        plain_name(name): hash((checksum(tensor), tensor._version, address(tensor)))
        for name, tensor in module.named_parameters()
    }


def address(tensor: Tensor) -> int:
    """Where the values lie in memory, if they lie in one piece. Code that sets `tensor.data` changes it, and nothing
    else that tensors show."""
    return int(tensor.data_ptr()) if tensor.layout == torch.strided else 0


def differing(one: Mapping[str, int], other: Mapping[str, int]) -> list[str]:
    """The names, in order, under which the two do not have the same."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _mark(value: Any) -> int:
    try:
        return checksum(value) if isinstance(value, Tensor) else zlib.crc32(pickle.dumps(value))
    except Exception:  # whatever a user's object raises, or a tensor without memory that NumPy can read
        return zlib.crc32(repr(value).encode())


def attribute(module: Module, name: str) -> Any:
    """The attribute that `marks` names so."""
    attributes, key = _place(module, name)
    return attributes.get(key)


@contextmanager
def raised(module: Module, names: Sequence[str], by: int) -> Iterator[None]:
    """Within the block, attributes of these names are higher if they are numbers."""
    places = [_place(module, name) for name in names if type(attribute(module, name)) in (int, float)]
    before = [attributes[key] for attributes, key in places]
    for attributes, key in places:
        attributes[key] += by
    try:
        yield
    finally:
        for (attributes, key), value in zip(places, before, strict=True):
            attributes[key] = value


def _place(module: Module, name: str) -> tuple[dict[str, Any], str]:
    parts = {plain_name(prefix): part for prefix, part in module.named_modules()}
    prefix, _, key = name.rpartition(".")
    return vars(parts[prefix]), key


def _tracks(part: Module) -> bool:
    return isinstance(part, torch.nn.modules.batchnorm._NormBase) and bool(part.track_running_stats)


def _is_trained(tensor: Tensor | None) -> bool:
    return tensor is None or bool(tensor.requires_grad)
