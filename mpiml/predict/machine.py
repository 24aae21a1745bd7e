"""The times that a machine takes for the pieces of a training step, each measured by itself; no MPI.

`python -m mpiml.predict calibrate` measures them (mpiml.predict.calibration) and keeps them in a study's directory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mpiml import documents
from mpiml.errors import ConfigError, OutputError

MACHINE = "machine"  # in a study's directory: a file for each calibration
Curve = Sequence[float]  # seconds, by rows of a micro-batch
Part = TypeVar("Part", "Speeds", "Link")


@dataclass(frozen=True)
class Speeds:
    """Seconds that a rank takes for the pieces of a step.

    Attributes:
        inputs, loss: to read inputs; to read labels and compute the loss.
        forward, backward: for each layer's passes.
        update: to sum and update one element that it owns; add: to add one element to another.
        microbatch: overhead of a micro-batch; step: overhead of a step, such as the step record.
    """

    inputs: Curve
    loss: Curve
    forward: Sequence[Curve]
    backward: Sequence[Curve]
    update: float
    add: float
    microbatch: float
    step: float


def _mixed(mix: Callable[[Any], Any], first: Part, *others: Part) -> Part:
    """Combine speeds, or links, number by number: `mix` gets an array with one of them along its first axis."""
    numbers = {name: [getattr(one, name) for one in (first, *others)] for name in asdict(first)}
    return type(first)(**{name: mix(np.array(of_each)).tolist() for name, of_each in numbers.items()})


@dataclass(frozen=True)
class Link:
    """Messages between two ranks: `seconds` for each of `sizes` in bytes, in rising order; measured or assumed."""

    sizes: Sequence[float]
    seconds: Sequence[float]

    @classmethod
    def assumed(cls, latency: float, bandwidth: float) -> Link:
        return cls([0.0, bandwidth], [latency, latency + 1.0])

    @property
    def latency(self) -> float:
        return self.seconds[0]

    @property
    def bandwidth(self) -> float:
        """Bytes per second of a large message."""
        return (self.sizes[-1] - self.sizes[0]) / max(self.seconds[-1] - self.seconds[0], 1e-12)

    def time(self, size: float) -> float:
        return interpolated(self.sizes, self.seconds, size)


@dataclass(frozen=True)
class Machine:
    """A calibration of one node of a machine, and of the network.

    Attributes:
        settings: the settings of the measured model, as TOML.
        layers: its layers' names and kinds.
        rows: the numbers of rows of a micro-batch that were measured, rising.
        cores: cores of the node.
        alone, busy: speeds of one rank while the others rest, and while all `ranks` compute.
        inside, between: messages on a node, and between two; None without a second rank, or node.
    """

    mpiml: str
    cpu: str
    settings: str
    layers: Sequence[str]
    rows: Sequence[int]
    cores: int
    ranks: int
    alone: Speeds
    busy: Speeds
    inside: Link | None
    between: Link | None

    def speeds(self, ranks: int) -> Speeds:
        """The speeds of a rank if this many compute on its node."""
        fraction = min((ranks - 1) / max(self.ranks - 1, 1), 1.0)
        return _mixed(lambda pair: pair[0] + fraction * (pair[1] - pair[0]), self.alone, self.busy)

    def seconds(self, curve: Curve, rows: float) -> float:
        """Seconds for a micro-batch of `rows` rows on average; below one row, some are empty and take no time."""
        return interpolated(self.rows, curve, rows) if rows >= 1 else rows * curve[0]

    @classmethod
    def from_json(cls, content: Any) -> Machine:
        """The reverse of `to_json`, parsed. Raises ValueError, TypeError or KeyError for other content."""
        links = {name: Link(**content[name]) if content[name] else None for name in ("inside", "between")}
        speeds = {name: Speeds(**content[name]) for name in ("alone", "busy")}
        return cls(**content | links | speeds)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def load_machine(directory: Path) -> Machine:
    """The median of each number over all calibrations in a study's directory. Raises ConfigError if there are none."""
    machines = []
    for path in sorted((directory / MACHINE).glob("*.json")):
        try:
            machines.append(Machine.from_json(documents.from_json(documents.read(path), str(path))))
        except (OutputError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path} cannot be used: {error}; delete it, or calibrate another study") from None
    if not machines:
        remedy = f"python -m mpiml.predict calibrate {directory} makes one"
        raise ConfigError(f"{directory} has no calibration of the machine: {remedy}")
    if len({(len(one.rows), len(one.layers), one.ranks, one.cores) for one in machines}) > 1:
        raise ConfigError(f"{directory / MACHINE}: measured on different numbers of ranks, or on different machines")

    def median(name: str) -> Any:
        parts = [getattr(machine, name) for machine in machines]
        return _mixed(lambda values: np.median(values, axis=0), *parts) if parts[0] else None

    return replace(machines[0], **{name: median(name) for name in ("alone", "busy", "inside", "between")})


def interpolated(places: Sequence[float], values: Sequence[float], at: float) -> float:
    """Interpolate linearly between known places; beyond the last, extrapolate from the last two, never falling."""
    if at > places[-1] and len(places) > 1:
        (a, b), (low, high) = places[-2:], values[-2:]
        return high + (at - b) * max(high - low, 0.0) / (b - a)
    return float(np.interp(at, places, values))
