"""Memory that a rank needs on its device for vectors, from settings and the layout of its stage; no MPI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpiml.config import Config
from mpiml.nn import base as nn
from mpiml.nn.parameters import Layout
from mpiml.parallel.slices import MESSAGE, bounds, pieces, runs
from mpiml.vectors import bytes_of, padded

SCRATCH = 2  # vectors of a piece, in which an update computes


@dataclass(frozen=True)
class DeviceVectors:
    """Bytes of a rank's vectors on its device.

    Attributes:
        values: of all copies of the model that the rank has there.
        gradients: of vectors into which backward passes write.
        state, scratch: of the optimizer, with the average of --ema, and of the update; none if it is made on the host.
        constants: of what modules keep besides parameters.
    """

    values: int
    gradients: int
    state: int
    scratch: int
    constants: int

    @property
    def total(self) -> int:
        return self.values + self.gradients + self.state + self.scratch + self.constants


def owners(config: Config, node_ranks: int, node_devices: int | None = None) -> bool:
    """Whether each rank has a device to itself and updates its model there, as mpiml.training.place.owns finds it in a
    run; `node_devices`: those of a node, if known. Ranks that may share devices count as sharing them otherwise."""
    alone = not config.share_devices if node_devices is None else node_ranks <= node_devices
    return (alone or node_ranks == 1) and not config.average_every and config.allreduce == "ordered"


def vectors_on_device(
    layout: Layout, slots: int, states: int, owner: bool, copies: int = 1, constants: int = 0
) -> DeviceVectors:
    """The vectors of a stage on the device of a rank that needs `slots` vectors of gradients, `states` vectors for each
    vector of values, and `copies` of the model. `owner`: whether the update is made there."""
    item = layout.dtype.itemsize
    held = _held(layout) if owner else []
    return DeviceVectors(
        values=copies * bytes_of(layout.size, layout.dtype),
        gradients=slots * _summed(layout) * item,
        state=states * sum(stop - start for run, _ in held for start, stop in [run]) * item,
        scratch=SCRATCH * max((longest for _, longest in held), default=0) * item,
        constants=constants,
    )


def constants_of(layers: Sequence[nn.Layer]) -> int:
    """Bytes of what layers keep besides parameters."""
    return sum(one.array.nbytes for one in nn.constants(layers).values())


def _summed(layout: Layout) -> int:
    """The elements of a vector of gradients, as mpiml.parallel.values.Values has it."""
    last = [part[-1].stop for part in (layout.blocks(), *layout.further_blocks()) if part]
    return padded(last[-1], layout.dtype) if last else 0


def _held(layout: Layout) -> list[tuple[tuple[int, int], int]]:
    """What the owner of a whole vector updates: ranges, each with the elements of its longest piece."""
    from mpiml.devices.arithmetic import PIECE  # which needs PyTorch, as do models that compute on devices

    every = runs(layout.blocks(), min(max(layout.updated, 1), MESSAGE), 1)
    return [(bounds(run), max(piece.stop - piece.start for piece in pieces(run, PIECE))) for run in every]
