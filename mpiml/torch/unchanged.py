"""What micro-batches of exact steps must leave as it is: otherwise the bits depend on how many of them a rank has."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import Tensor
from torch.nn import Module, Parameter

from mpiml.errors import ConfigError, first_few
from mpiml.nn.torch_buffers import Snapshot, attribute, differing, fixed, marks
from mpiml.nn.torch_checks import GENERATORS
from mpiml.nn.torch_tensors import checksum


class Unchanged:
    """A module's trained parameters, and its attributes that are no part, parameter or buffer, as they are at `look`.

    Args:
        warns: whether this rank warns of attributes, of each once.
    """

    def __init__(self, module: Module, warns: bool):
        self._module, self._warns = module, warns
        self._named = set[str]()  # of attributes

    def look(self) -> None:
        """Look at how everything is now, before the micro-batches of a step."""
        places = [place for place in fixed(self._module, set()) if _is_trained(place[1].get(place[2]))]
        checksums = {name: checksum(held[key]) for name, held, key in places}
        self._parameters, self._names = Snapshot(places, checksums), list(checksums)
        self._marks = marks(self._module)

    def check_loss(self, loss: Tensor, where: str) -> None:
        """Raise ConfigError if a loss depends on a parameter that is not the module's: its gradient is not summed."""
        own = {id(parameter) for parameter in self._module.parameters()}
        for other in (parameter for parameter in _parameters_of(loss) if id(parameter) not in own):
            raise ConfigError(
                f"{where}: the loss depends on a parameter {tuple(other.shape)} outside of the DataParallel's module, "
                "whose gradient is not summed over micro-batches: let it be a part of the module, or call its "
                "requires_grad_(False) if it is not trained here"
            )

    def check(self, where: str) -> None:
        """Raise ConfigError if parameters, or the module's own generators, have changed; warn of other attributes."""
        if changed := sorted(name for name, _ in self._parameters.changed()):
            raise ConfigError(
                f"{where} changes {first_few(changed)}, which only the optimizer may do: compute with a changed copy, "
                "or call the module once before DataParallel, with the same rows on all ranks, if it takes first "
                "values from them"
            )
        before, self._marks = self._marks, marks(self._module)
        kept = differing(before, self._marks)
        if drawn := [name for name in kept if isinstance(attribute(self._module, name), GENERATORS)]:
            raise ConfigError(
                f"{where} draws from {first_few(drawn)}: draw from the generators of torch, numpy.random or random, "
                "which are keyed for each micro-batch"
            )
        if (new := [n for n in kept if n not in self._named and not self._is_computed(n)]) and self._warns:
            self._named.update(new)
            warnings.warn(
                f"{where} changes {first_few(new)}: if what the module returns depends on what was there before, so "
                "do the bits on the number of ranks; make it a buffer (register_buffer) then",
                stacklevel=4,
            )

    def _is_computed(self, name: str) -> bool:
        """Whether each call computes an attribute from parameters anew, as torch's spectral_norm and weight_norm do: a
        weight from weight_orig, or from weight_g and weight_v."""
        from_these = (parameter for parameter in self._names if parameter.startswith(f"{name}_"))
        return isinstance(attribute(self._module, name), Tensor) and any(from_these)


def _is_trained(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def _parameters_of(loss: Tensor) -> Iterator[Tensor]:
    """The parameters to which a backward pass of the loss comes, but for those in re-entrant checkpoints."""
    seen, left = set(), [loss.grad_fn]
    while left:
        if (node := left.pop()) is not None and node not in seen:
            seen.add(node)
            left += [below for below, _ in node.next_functions]
            if isinstance(parameter := getattr(node, "variable", None), Parameter):
                yield parameter
