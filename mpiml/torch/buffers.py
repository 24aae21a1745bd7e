"""Buffers that a module's forward changes, such as running averages: which they are, and their values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module

from mpiml.nn.torch_buffers import Buffers, address

Mark = tuple[str, Tensor, int, int]  # a buffer's name, the tensor, its version and place in memory


class Changes:
    """Which buffers of a module its forward changes; among them, parameters that require no gradient.

    Those of torch's normalisations are known, and change when these are in training mode; with others it shows.

    Args:
        wanted: whether any are of interest.

    Attributes:
        riding: names of buffers that are averaged, because they have changed once, or will.
        quiet: names of those that have never changed.
        changed: names of those that have since the last average.
    """

    def __init__(self, module: Module, wanted: bool):
        self._buffers = Buffers(module)
        self._norms: dict[str, list[Module]] = {}
        self.riding: list[str] = []
        self.quiet: list[str] = []
        self.changed: set[str] = set()
        for name, places in self._buffers.places.items() if wanted else ():
            norms = [part for part, key in places if key in part._buffers and _averages(part)]
            if norms:
                self._norms[name] = norms
            (self.riding if norms else self.quiet).append(name)

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[name].detach()

    def values(self) -> list[Tensor]:
        """The buffers that are averaged."""
        return [self[name] for name in self.riding]

    def marks(self) -> list[Mark]:
        """How buffers are now, for `look` to compare."""
        return [
            (name, tensor := self._buffers[name], tensor._version, address(tensor))
            for name in [*self.riding, *self.quiet]
            if name not in self._norms
        ]

    def look(self, marks: list[Mark]) -> None:
        """Note what has changed since then."""
        self.changed |= {name for name, norms in self._norms.items() if any(norm.training for norm in norms)}
        for name, before, version, place in marks:
            now = self._buffers[name]
            if now is not before or now._version != version or address(now) != place:
                self.changed.add(name)

    def ride(self, names: list[str]) -> None:
        """Average these as well from now on."""
        self.riding += names
        self.quiet = [name for name in self.quiet if name not in names]

    def put(self, name: str, value: Tensor) -> None:
        """Give a buffer a value."""
        now = self._buffers[name]
        if now.shape == value.shape:
            with torch.no_grad():
                now.copy_(value)
        else:
            self._buffers[name] = value.clone()


def _averages(part: Module) -> bool:
    return isinstance(part, torch.nn.modules.batchnorm._NormBase) and bool(part.track_running_stats)
