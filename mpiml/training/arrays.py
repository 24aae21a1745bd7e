"""The arrays of a checkpoint: what they are called, and how the ranks get them back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpiml import documents
from mpiml.config import Config
from mpiml.data.fill import Filling
from mpiml.data.normalize import Normalization
from mpiml.data.preparation import Preparation
from mpiml.nn.parameters import Layout, Parameter, Shape
from mpiml.parallel.slices import Range
from mpiml.parallel.state import EMA, OUTER, VALUES
from mpiml.run import checkpoint, verified
from mpiml.run.checkpoint import Checkpoint
from mpiml.run.digests import Kind
from mpiml.run.segments import Segment
from mpiml.team import Team
from mpiml.training.constants import Constants
from mpiml.vectors import Vector

WORKER = re.compile(r"worker\.[0-9]+\.")  # how the names of a worker's vectors begin
PART = 1 << 22  # elements of a constant that are sent at once


def needed_kinds(layouts: Sequence[Layout], names: Sequence[str]) -> dict[str, Kind]:
    """The kinds of the arrays that vectors of all stages make up: weights under their names, their average as
    ema.(weight's name), state NAME as optimizer.NAME.(weight's name)."""
    return {
        name: (layout.dtype.name, p.shape)
        for vector in names
        for layout in layouts
        for p, name in _names(layout, vector).items()
    }


def _names(layout: Layout, vector: str) -> dict[Parameter, str]:
    """What the arrays of a vector are called in a checkpoint. What no optimizer changes has no state and no average of
    this kind."""
    of_worker = WORKER.match(vector)
    before, name = (of_worker[0], vector[of_worker.end() :]) if of_worker else ("", vector)
    prefix = before + {VALUES: "", EMA: documents.AVERAGE, OUTER: "outer."}.get(name, f"optimizer.{name}.")

    def there(parameter: Parameter) -> bool:
        if name != VALUES:
            return parameter.optimised
        return not (of_worker and parameter.frozen)

    return {p: prefix + p.first.name for p in layout.parameters if there(p)}


def segments(
    layout: Layout,
    vector: str,
    ranges: Mapping[Range, Vector],
    other: Callable[[str], str] = lambda name: name,
    once: bool = False,
) -> list[Segment]:
    """What a rank has of a vector of its stage, ranges of it, as segments of a checkpoint's arrays, which may have
    `other` names there; without arrays of which an earlier stage has the same, if each is to be there `once`."""
    found = []
    for parameter, name in _names(layout, vector).items():
        if once and parameter.first is not parameter:
            continue
        begin = layout.offsets[parameter]
        for (start, stop), view in ranges.items():
            first, last = max(start, begin), min(stop, begin + parameter.size)
            if first < last:
                found.append(Segment(other(name), first - begin, view[first - start : last - start]))
    return found


def restore_constants(constants: Constants, team: Team, saved: Mapping[str, Any]) -> None:
    """Give every rank the constants that it holds, from `saved`, a checkpoint's arrays on rank 0; collective.

    Ranks have compared their constants, so only those are sent that differ in the checkpoint; mostly there are none.
    """
    for name, size in team.on_rank_0(lambda: [(other, saved[other].size) for other in constants.changed(saved)]):
        for start in range(0, size, PART):
            part = team.broadcast(saved[name].reshape(-1)[start : start + PART] if saved else None)
            if name in constants.arrays:
                constants.arrays[name].flat[start : start + PART] = part


def preparations(saved: Checkpoint, config: Config, shape: Shape) -> list[Preparation]:
    """What is done to a model's inputs, of which a row has `shape`, by the values in its checkpoint. Raises OutputError
    if these are missing or of other inputs."""
    kinds: list[type[Preparation]] = [Filling] if config.fill is not None else []
    kinds += [Normalization] if config.normalize else []
    if not kinds:
        return []
    arrays = {name: array for name, array in saved.arrays.items() if name.startswith("data.")}
    needed = [name for kind in kinds for name in kind.NAMES]
    checkpoint.check_kinds(saved.origin, verified.kinds_of(arrays), dict.fromkeys(needed, ("float64", shape)))
    return [kind.of_arrays(arrays) for kind in kinds]
