"""The model's constants, arrays that training does not change, in a checkpoint and out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiml.errors import OutputError
from mpiml.nn.base import Layer, constants
from mpiml.nn.constants import ARRAY, Constant
from mpiml.run import checkpoint, verified
from mpiml.run.checkpoint import Header
from mpiml.run.digests import Kind


@dataclass(frozen=True)
class Constants:
    """The constants of some layers.

    Attributes:
        arrays: those that checkpoints hold, by name. They are views of the layers' memory, so they take none, and to
            write to them changes the layers.
        entries: the text for each constant in a checkpoint's metadata: "array", or its checksum.
    """

    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    entries: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> Constants:
        """The constants of these layers, which have their names."""
        named = constants(layers)
        arrays = {name: constant.array for name, constant in named.items() if constant.saved}
        return cls(arrays, {name: constant.entry for name, constant in named.items()})

    def check(self, saved: Header, weights: Mapping[str, Kind]) -> None:
        """Raise OutputError unless a checkpoint is of the model with these constants and with arrays of the kinds
        `weights`, and its checksums are those of the constants that it does not hold."""
        entries = saved.constants or {}
        if saved.constants is not None:
            self._check_entries(saved.origin, entries)
        held = {name: array for name, array in self.arrays.items() if entries.get(name) == ARRAY or name in saved.kinds}
        checkpoint.check_kinds(saved.origin, saved.kinds, {**weights, **verified.kinds_of(held)})

    def _check_entries(self, origin: str, entries: Mapping[str, str]) -> None:
        what = "(a buffer, or a parameter that requires no gradient)"
        if more := entries.keys() - self.entries.keys():
            raise OutputError(f"{origin} is of another model: it has a constant {min(more)} {what}, the model has not")
        if more := self.entries.keys() - entries.keys():
            raise OutputError(f"{origin} is of another model: it has no constant {min(more)} {what}, the model has")
        if others := sorted(name for name, entry in entries.items() if not self._agrees(name, entry)):
            if entries[others[0]] == ARRAY:
                raise OutputError(f"{origin} holds {others[0]}, which is a buffer with persistent=False in the model")
            more_others = f" and {len(others) - 1} more" if len(others) > 1 else ""
            raise OutputError(
                f"{others[0]}{more_others}: not what the checkpoint was trained with: {origin} has the checksum alone "
                "(buffers with persistent=False, and indices of sparse ones, are in no checkpoint), so the model must "
                "come with the same"
            )

    def _agrees(self, name: str, entry: str) -> bool:
        """Whether a checkpoint's entry is that of the constant: it holds the array, or the checksums are equal."""
        if name in self.arrays and entry != ARRAY:  # older checkpoints have checksums alone
            return entry == Constant(self.arrays[name], saved=False).checksum
        return entry == self.entries[name]

    def changed(self, saved: Mapping[str, NDArray[Any]]) -> list[str]:
        """The names of those that have other values in a checkpoint's arrays."""
        return [n for n, own in self.arrays.items() if n in saved and not Constant(own, saved=True).equals(saved[n])]

    def take(self, saved: Mapping[str, NDArray[Any]]) -> None:
        """Give the layers the values that a checkpoint has."""
        # Others are left alone: their memory may be that of a file, which cannot be written to.
        for name in self.changed(saved):
            np.copyto(self.arrays[name], saved[name])
