"""Buffers that a module's forward changes, such as running averages: which they are, and their values."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import Module

from mpiml.errors import ConfigError, first_few
from mpiml.nn.torch_buffers import Buffers, Snapshot
from mpiml.nn.torch_names import plain_name
from mpiml.nn.torch_tensors import checksum

WIDE = (torch.int64, torch.uint64)
LARGEST = 2.0**48  # sums of more would be rounded, in float64, by more than the nearest integer
WHEN_MADE = "when DataParallel was made"


class Changes:
    """Which buffers of a module its forward changes; among them, parameters that require no gradient.

    Those of torch's normalisations are known, and change when these are in training mode. With others PyTorch counts
    the writes, but not those to `tensor.data` and by functions such as batch_norm. Checksums of the values show these:
    of all buffers in some forward passes (`compares_all`), of buffers that have changed so in every one.

    Args:
        wanted: whether any are of interest.
        warns: whether this rank warns of buffers that are not averaged.

    Attributes:
        averaged: names of buffers that are averaged, because they have changed once, or will.
        unchanged: names of those that have never changed.
        changed: names of those that have since the last average.
    """

    def __init__(self, module: Module, wanted: bool, warns: bool):
        self._module, self._warns = module, wanted and warns
        self._buffers = Buffers(module)
        trained = (name for name, _ in module.named_parameters(remove_duplicate=False))
        self._names = {*self._buffers.places, *map(plain_name, trained)}
        self._known = self._buffers.tensors() if wanted else {}  # the tensors that are the module's own
        self._shapes = {name: tensor.shape for name, tensor in self._known.items()}
        self._norms = {name: norms for name, norms in self._buffers.norms().items() if wanted}
        self._counted: dict[str, bool] = {}  # of others that have changed: whether PyTorch has counted it every time
        self.averaged = list(self._norms)
        self.unchanged = [name for name in self._known if name not in self._norms]
        self.changed: set[str] = set()
        self._count = 0  # of forward passes

    def __getitem__(self, name: str) -> Tensor:
        """A buffer that is averaged. Raises ConfigError if it is None, or has another shape than it had."""
        _, held, key = self._buffers.place(name)
        tensor, shape = held.get(key), self._shapes[name]
        if tensor is None or tensor.shape != shape:
            now = "None" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise ConfigError(
                f"the buffer {name} is {now} now, and was of shape {tuple(shape)} {WHEN_MADE}: buffers that the "
                "forward pass changes are averaged; make it as long as it will be, or a plain attribute, or pass "
                "broadcast_buffers=False"
            )
        return tensor.detach()

    def values(self) -> list[Tensor]:
        """The buffers that are averaged."""
        return [self[name] for name in self.averaged]

    def copies(self, unchanged: bool) -> dict[str, Tensor]:
        """Copies of the buffers that are averaged, and, if asked for, of those that are not yet."""
        names = [*self.averaged, *(self.unchanged if unchanged else ())]
        return {name: tensor.detach().clone() for name, tensor in self._present(names)}

    def checksums(self, count: int) -> dict[str, int]:
        """Of the buffers that are to be compared by value in the forward pass, or step, of this number."""
        if compares_all(count):
            self._warn_of_new()
        names = self.averaged + self.unchanged if compares_all(count) else self.averaged
        uncounted = [n for n in names if n not in self._norms and (compares_all(count) or not self._counted.get(n))]
        return {name: checksum(tensor) for name, tensor in self._present(uncounted)}

    def _present(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Those of these that are not None: a cache may come and go in evaluation."""
        for name, held, key in map(self._buffers.place, names):
            if (tensor := held.get(key)) is not None:
                yield name, tensor

    def _warn_of_new(self) -> None:
        new = sorted(Buffers(self._module).places.keys() - self._names) if self._warns else []
        if new:
            self._warns = False
            text = f"{first_few(new)}: no buffer {WHEN_MADE}, and not averaged: call the module once before, or keep a "
            warnings.warn(text + "cache in a plain attribute", stacklevel=4)

    def snapshot(self, checksums: Mapping[str, int] | None = None) -> Snapshot:
        """How buffers are now, before a forward pass, for `note_changes`; without `checksums` the next of all."""
        if checksums is None:
            self._count += 1
            checksums = self.checksums(self._count)
        names = (name for name in self._known if name not in self._norms)
        return Snapshot(map(self._buffers.place, names), checksums)

    def note_changes(self, before: Snapshot | None) -> None:
        """Note what has changed since then, or, without a snapshot, which normalisations are in training mode. Raises
        ConfigError for buffers that cannot be averaged any more."""
        self.changed |= {name for name, norms in self._norms.items() if any(norm.training for norm in norms)}
        for name, only_values in before.changed() if before else ():
            self[name]  # which raises
            self.changed.add(name)
            self._counted[name] = self._counted.get(name, True) and not only_values

    def average_also(self, names: Iterable[str]) -> None:
        """Average these as well from now on."""
        self.averaged += names
        self.unchanged = [name for name in self.unchanged if name not in self.averaged]

    def _check_size(self, name: str, *integers: Tensor) -> None:
        if any((tensor.double().abs() > LARGEST).any() for tensor in integers):
            raise ConfigError(
                f"the buffer {name} has integers above 2**48, which would lose digits as they are averaged: keep it in "
                "a plain attribute, or pass broadcast_buffers=False"
            )

    def put(self, name: str, value: Tensor) -> None:
        """Give a buffer a value. Raises ConfigError for integers that are too large for an exact mean."""
        now = self._buffers[name]
        if name not in self._norms and value.dtype in WIDE:
            self._check_size(name, value, now)
        if now is not self._known[name]:  # the forward pass has put it there: a tensor that others may hold, too
            self._buffers[name] = value.clone()
            self._known[name] = self._buffers[name]
        elif self._counted.get(name):
            with torch.no_grad():
                now.copy_(value)
        else:  # nor is this counted, as a write to what further backward passes have saved
            now.data.copy_(value)


def compares_all(count: int) -> bool:
    """Whether all buffers are compared by value in the forward pass, or step, of this number: 1, 2, 4, 8, and so on."""
    return count & (count - 1) == 0
