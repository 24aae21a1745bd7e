"""What a machine needs for the pieces of a training step: constants that are measured, each by itself; no MPI.

`python -m mpiml.predict calibrate` measures them (mpiml.predict.calibration) and puts them beside a study's points.
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

MACHINE = "machine"  # of a study's directory: what was measured, a file for each time
Curve = Sequence[float]  # seconds, by rows of a micro-batch
Part = TypeVar("Part", "Pace", "Link")


@dataclass(frozen=True)
class Pace:
    """Seconds that a rank needs.

    Attributes:
        inputs, loss: to read inputs; to read labels and compute the loss.
        forward, backward: of each layer.
        update: to sum and optimize, for each element that it owns; add: for an addition of an element.
        microbatch: what else a micro-batch takes; step: and a step: the step record, meeting the node's ranks.
    """

    inputs: Curve
    loss: Curve
    forward: Sequence[Curve]
    backward: Sequence[Curve]
    update: float
    add: float
    microbatch: float
    step: float

    def towards(self, other: Pace, way: float) -> Pace:
        """A pace that lies between two: at `way` 0 this one, at 1 the other."""
        return _mixed(lambda pair: pair[0] + way * (pair[1] - pair[0]), self, other)


def _mixed(mix: Callable[[Any], Any], first: Part, *others: Part) -> Part:
    """What `mix` makes of all numbers of some paces or links: along the first axis are those of each."""
    numbers = {name: [getattr(one, name) for one in (first, *others)] for name in asdict(first)}
    return type(first)(**{name: mix(np.array(of_each)).tolist() for name, of_each in numbers.items()})


@dataclass(frozen=True)
class Link:
    """Messages between two ranks: `seconds` for each of `sizes` in bytes, rising; measured, or assumed."""

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
    """A node of a machine, and what is known of the network.

    Attributes:
        settings: of the model that was measured, as TOML.
        layers: its layers' names and kinds.
        rows: of micro-batches that were measured, rising.
        cores: of a node, and `ranks` that computed at once in `busy`; `alone` one did.
        inside, between: messages on a node, and between two; None if there was nobody to send to.
    """

    mpiml: str
    cpu: str
    settings: str
    layers: Sequence[str]
    rows: Sequence[int]
    cores: int
    ranks: int
    alone: Pace
    busy: Pace
    inside: Link | None
    between: Link | None

    def pace(self, ranks: int) -> Pace:
        """With so many ranks on a node."""
        return self.alone.towards(self.busy, min((ranks - 1) / max(self.ranks - 1, 1), 1.0))

    def seconds(self, curve: Curve, rows: float) -> float:
        """Of micro-batches of `rows` rows on average; less than one means that some are empty and take no time."""
        return interpolated(self.rows, curve, rows) if rows >= 1 else rows * curve[0]

    @classmethod
    def typical(cls, found: Sequence[Machine]) -> Machine:
        """The median of each number of some measurements of one machine."""

        def median(name: str) -> Any:
            parts = [getattr(one, name) for one in found]
            return _mixed(lambda values: np.median(values, axis=0), *parts) if parts[0] else None

        return replace(found[0], **{name: median(name) for name in ("alone", "busy", "inside", "between")})

    @classmethod
    def from_json(cls, found: Any) -> Machine:
        """The reverse of `to_json`, parsed. Raises ValueError, TypeError or KeyError for another value."""
        links = {name: Link(**found[name]) if found[name] else None for name in ("inside", "between")}
        paces = {name: Pace(**found[name]) for name in ("alone", "busy")}
        return cls(**found | links | paces)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def load(directory: Path) -> Machine:
    """What was measured for a study, the median of all times. Raises ConfigError if nothing was."""
    found = []
    for path in sorted((directory / MACHINE).glob("*.json")):
        try:
            found.append(Machine.from_json(documents.from_json(documents.read(path), str(path))))
        except (OutputError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path} cannot be used: {error}; delete it, or calibrate another study") from None
    if not found:
        raise ConfigError(
            f"{directory} knows nothing of the machine: python -m mpiml.predict calibrate {directory} measures it"
        )
    if len({(len(one.rows), len(one.layers), one.ranks, one.cores) for one in found}) > 1:
        raise ConfigError(f"{directory / MACHINE}: measured on different numbers of ranks, or on different machines")
    return Machine.typical(found)


def interpolated(places: Sequence[float], values: Sequence[float], at: float) -> float:
    """The value at a place between known ones, or beyond the last, along the last two."""
    if at > places[-1] and len(places) > 1:
        (a, b), (low, high) = places[-2:], values[-2:]
        return high + (at - b) * max(high - low, 0.0) / (b - a)
    return float(np.interp(at, places, values))
