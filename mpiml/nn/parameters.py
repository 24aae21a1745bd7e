"""Parameters, and the one flat vector of which all of them are views."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpiml import vectors
from mpiml.errors import ConfigError
from mpiml.random import generator
from mpiml.vectors import ALIGNMENT, BLOCK, Block, Vector

Shape = tuple[int, ...]
Init = Callable[[np.random.Generator, int], NDArray[np.float64]]
CHUNK = 1 << 18  # elements that are initialised at once: float64 copies of large matrices would be larger than they


class Parameter:
    """An array that training changes. Its layer declares it; a Layout places it.

    Args:
        shape: of the array; for a linear weight (inputs, outputs).
        init: (generator, count) -> the next `count` first values, float64; called until the array is full. All
            of it may be drawn twice, because ranks compare checksums of first values.
        decay: whether weight decay applies; by default to matrices and not to vectors.

    Attributes:
        name: "layers.3.weight", the path from the model's list of layers.
        value: a view of the flat vector of values, once that is allocated.
        momentum: of a running average; None where an optimizer makes the changes.
    """

    momentum: float | None = None
    _compared: int | None = None  # a checksum of the first values that ranks have compared

    def __init__(self, shape: Shape, init: Init, decay: bool | None = None):
        self.shape = shape
        self.size = math.prod(shape)
        self.init = init
        self.decay = len(shape) > 1 if decay is None else decay
        self.name = ""
        self.value: NDArray[np.floating]

    def initialise(self, values: Vector, seed: int) -> None:
        """Write first values, a function of (seed, name) alone. Raises ConfigError if they are not those that ranks
        have compared."""
        checksum = self._draw(seed, values)
        if self._compared not in (None, checksum):
            what = f"{self.name} gets other first values each time that they are drawn"
            raise ConfigError(f"{what}: they must follow from the generator that its init is called with")
        self._compared = None

    def described(self, seed: int) -> str:
        """What ranks must agree in: shape, kind, and how first values are drawn, or else their checksum."""
        self._compared = None if isinstance(self.init, Drawn) else self._draw(seed)
        how = self.init.text if isinstance(self.init, Drawn) else f"checksum {self._compared:08x}"
        kind = f", momentum {self.momentum}" if self.momentum is not None else ", decays" if self.decay else ""
        return f"{self.shape}{kind}, {how}"

    def _draw(self, seed: int, out: Vector | None = None) -> int:
        """Draw first values, write them to `out` if that is given, and return a checksum, of values of one's own."""
        random, checksum = generator(seed, "init", self.name), 0
        for start in range(0, self.size, CHUNK):
            count = min(CHUNK, self.size - start)
            part = self.init(random, count)
            if np.size(part) not in (1, count):
                raise ConfigError(f"{self.name}: its init gives {np.size(part)} first values where {count} are needed")
            if out is not None:
                out[start : start + count] = part
            if not isinstance(self.init, Drawn):
                checksum = zlib.crc32(np.ascontiguousarray(part).data, checksum)
        return checksum


class Statistic(Parameter):
    """An array that training averages and does not optimise, such as a running mean.

    In the place of a gradient, backward writes what the micro-batch finds times its rows. A step with n rows in all
    then does value += momentum * (sum / n - value). Norm, clipping, weight decay and optimizer pass it by.
    """

    def __init__(self, shape: Shape, init: Init, momentum: float):
        super().__init__(shape, init, decay=False)
        self.momentum = momentum


class Gradients:
    """A flat vector for the gradients of one micro-batch: `gradients[parameter]` is the parameter's view of it.

    Args:
        complete: is told during the backward pass from which offset on, to its end, the vector is written.
    """

    def __init__(self, layout: Layout, vector: Vector, complete: Callable[[int], None] | None = None):
        self.vector, self.complete = vector, complete
        self._views = dict(layout.views(vector))
        self._offsets = layout.offsets
        self.begin()

    def __getitem__(self, parameter: Parameter) -> NDArray[np.floating]:
        return self._views[parameter]

    def begin(self) -> None:
        """A backward pass begins: nothing is written yet."""
        self._written: set[Parameter] = set()
        self._missing = list(self._offsets) if self.complete else []

    def finished(self, parameters: Iterable[Parameter]) -> None:
        """The backward pass has written the gradients of these. In whatever order layers finish, the vector counts as
        complete down to the first parameter that is missing."""
        if self.complete:
            self._written.update(parameters)
            while self._missing and self._missing[-1] in self._written:
                self._missing.pop()
            self.complete(self._end_of(self._missing[-1]) if self._missing else 0)

    def _end_of(self, parameter: Parameter) -> int:
        return self._offsets[parameter] + parameter.size


class Layout:
    """Where each of a list of parameters lies in a flat vector.

    Every parameter starts on a 64-byte boundary, and the padding is zero in every vector, for ever: no update
    changes a zero whose gradient is zero. Statistics come first and then parameters without decay, so that an update
    meets long runs of one kind; parameters with decay, nearly all elements, follow in layer order: a backward pass
    completes the vector from its end.
    """

    def __init__(self, parameters: Sequence[Parameter], dtype: DTypeLike):
        self.parameters = list(parameters)
        self.dtype = np.dtype(dtype)
        self.offsets: dict[Parameter, int] = {}
        per_line = ALIGNMENT // self.dtype.itemsize
        self.size = 0
        for parameter in sorted(self.parameters, key=lambda p: (p.momentum is None, p.decay)):
            self.offsets[parameter] = self.size
            self.size += -(-parameter.size // per_line) * per_line

    def blocks(self) -> list[Block]:
        """All blocks in the order of the vector; each parameter is cut from its own start."""
        return [
            Block(offset + a, offset + min(a + BLOCK, parameter.size), parameter.decay, parameter.momentum)
            for parameter, offset in self.offsets.items()
            for a in range(0, parameter.size, BLOCK)
        ]

    def views(self, vector: Vector) -> Iterator[tuple[Parameter, NDArray[np.floating]]]:
        """Each parameter, in layer order, with its view of `vector`."""
        for parameter in self.parameters:
            offset = self.offsets[parameter]
            yield parameter, vector[offset : offset + parameter.size].reshape(parameter.shape)

    def named(self, vector: Vector) -> dict[str, NDArray[np.floating]]:
        """The views of `vector` under the parameters' names, in layer order."""
        return {parameter.name: view for parameter, view in self.views(vector)}

    def zeros(self) -> Vector:
        """A vector of zeros in this layout."""
        return vectors.zeros(self.size, self.dtype)

    def bind(self, values: Vector) -> None:
        """Make every parameter's value its view of `values`."""
        for parameter, view in self.views(values):
            parameter.value = view

    def initialise(self, values: Vector, seed: int, worker: int = 0, workers: int = 1) -> None:
        """Write first values, each parameter's a function of (seed, its name) alone.

        Worker `worker` of `workers` that write into one vector initialises every `workers`-th parameter.
        """
        for parameter in self.parameters[worker::workers]:
            offset = self.offsets[parameter]
            parameter.initialise(values[offset : offset + parameter.size], seed)


@dataclass(frozen=True)
class Drawn:
    """First values that follow from the generator and from what `text` says: ranks compare the text alone."""

    text: str
    draw: Init

    def __call__(self, random: np.random.Generator, count: int) -> NDArray[np.float64]:
        return self.draw(random, count)


def constant(value: float) -> Init:
    """Every element alike."""
    return Drawn(f"all {value}", lambda _, count: np.full(count, value))


def uniform(bound: float) -> Init:
    """Uniform in [-bound, bound)."""
    return Drawn(f"uniform to {bound}", lambda random, count: random.uniform(-bound, bound, count))


def normal(deviation: float) -> Init:
    """Normal with mean 0 and that standard deviation."""
    return Drawn(f"normal of deviation {deviation}", lambda random, count: random.normal(0.0, deviation, count))
