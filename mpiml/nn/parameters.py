"""Parameters, and the one flat vector of which all of them are views."""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpiml import vectors
from mpiml.errors import ConfigError
from mpiml.random import generator
from mpiml.vectors import Block, Vector

Shape = tuple[int, ...]
Init = Callable[[np.random.Generator, int], NDArray[np.float64]]
CHUNK = 1 << 18  # elements that are initialised at once, from one generator: they are drawn in float64, 2 MiB


class Parameter:
    """An array that training changes. Its layer declares it; a Layout places it.

    Args:
        shape: of the array; for a linear weight (inputs, outputs).
        init: (generator, count) -> the next `count` first values, float64; called until the array is full, with
            another generator for each chunk of the array. The calls for an array are made in order by one rank, and
            may be made twice, because ranks compare checksums of first values.
        decay: whether weight decay applies; by default only if the array has more than one axis.

    Attributes:
        name: such as "layers.3.weight": the layer's path and the attribute.
        value: a view of the flat vector of values; set by `Layout.bind`.
        momentum: of a running average (Statistic); None if the optimizer changes the array.
        rate: factor of the learning rate; 0: the array is not trained.
        places: where the array stands in several layers, a Parameter for each place, in layer order (mpiml.nn.places).
    """

    momentum: float | None = None
    rate: float = 1.0
    places: Sequence[Parameter] = ()
    _compared: int | None = None  # checksum of the first values, as ranks have compared it

    def __init__(self, shape: Shape, init: Init, decay: bool | None = None):
        self.shape = shape
        self.size = math.prod(shape)
        self.init = init
        self.decay = len(shape) > 1 if decay is None else decay
        self.name = ""
        self.value: NDArray[np.floating]

    @property
    def optimised(self) -> bool:
        """Whether an optimizer changes the array."""
        return self.momentum is None and self.rate > 0

    @property
    def first(self) -> Parameter:
        """The parameter at the first place of the array: its name is the array's."""
        return self.places[0] if self.places else self

    @property
    def frozen(self) -> bool:
        """Whether nothing changes the array; running averages go on."""
        return self.momentum is None and self.rate == 0

    def initialise(self, values: Vector, seed: int, elements: range) -> None:
        """Write the first values of `elements`, one of `drawn_apart`, to their places in `values`. Raises ConfigError
        if they differ from those that ranks have compared."""
        checksum = self._draw(seed, elements, values)
        if self.first._compared not in (None, checksum):
            what = f"{self.name} gets different first values each time they are drawn"
            raise ConfigError(f"{what}; its init must draw them from the generator that it is called with")
        self.first._compared = None

    def drawn_apart(self) -> list[range]:
        """Elements that different ranks may initialise: chunks, or the whole array where `init` may know how often it
        has been called."""
        length = CHUNK if isinstance(self.init, NamedInit) else max(self.size, 1)
        return [range(start, min(start + length, self.size)) for start in range(0, self.size, length)]

    def described(self, seed: int) -> str:
        """A text that must be equal on all ranks: shape, kind, and how first values are drawn, or their checksum."""
        if self.first is not self:
            return f"the array of {self.first.name}"
        self._compared = None if isinstance(self.init, NamedInit) else self._draw(seed, range(self.size))
        how = self.init.text if isinstance(self.init, NamedInit) else f"checksum {self._compared:08x}"
        kind = f", momentum {self.momentum}" if self.momentum is not None else ", decays" if self.decay else ""
        return f"{self.shape}{kind}{'' if self.rate == 1 else f', rate x {self.rate}'}, {how}"

    def _draw(self, seed: int, elements: range, out: Vector | None = None) -> int:
        """Draw the first values of some chunks, each a function of (seed, name, number of the chunk), and write them to
        `out` if given. Returns their checksum, or 0 if `init` is NamedInit."""
        checksum = 0
        for start in elements[::CHUNK]:
            count = min(CHUNK, elements.stop - start)
            chunk = self.init(generator(seed, "init", self.first.name, start // CHUNK), count)
            if np.size(chunk) not in (1, count):
                raise ConfigError(f"{self.name}: its init gives {np.size(chunk)} first values where {count} are needed")
            if out is not None:
                out[start : start + count] = chunk
            if not isinstance(self.init, NamedInit):
                checksum = zlib.crc32(np.ascontiguousarray(chunk).data, checksum)
        return checksum


class Statistic(Parameter):
    """A running average, such as a running mean: an array that training averages and does not optimise.

    Instead of a gradient, backward writes the micro-batch's observation times its number of rows. A step of n rows
    then does value += momentum * (sum / n - value). Gradient norm, clipping, weight decay and optimizer leave it out.
    """

    def __init__(self, shape: Shape, init: Init, momentum: float):
        super().__init__(shape, init, decay=False)
        self.momentum = momentum


class Gradients:
    """A flat vector for the gradients of one micro-batch: `gradients[parameter]` is the parameter's view of it. For a
    parameter that is frozen it is memory that nobody reads.

    Args:
        complete: complete(offset) is called during the backward pass: from this offset on the vector is final.
    """

    def __init__(self, layout: Layout, vector: Vector, complete: Callable[[int], None] | None = None):
        self.vector, self.complete = vector, complete
        self._layout, self._offsets = layout, layout.gradients
        self._views = {p: vector[start : start + p.size].reshape(p.shape) for p, start in self._offsets.items()}
        self.begin()

    def __getitem__(self, parameter: Parameter) -> NDArray[np.floating]:
        view = self._views.get(parameter)  # of frozen parameters there is none
        return self._layout.unread[parameter] if view is None else view

    def begin(self) -> None:
        """Begin a backward pass: no gradient counts as written."""
        self._written: set[Parameter] = set()
        self._missing = list(self._offsets) if self.complete else []

    def finished(self, parameters: Iterable[Parameter]) -> None:
        """Note that the gradients of these parameters are written. Layers may finish in any order: `complete` gets the
        end of the last parameter in the vector that is still missing."""
        if self.complete:
            self._written.update(parameters)
            while self._missing and self._missing[-1] in self._written:
                self._missing.pop()
            self.complete(self._offsets[self._missing[-1]] + self._missing[-1].size if self._missing else 0)

    def later(self, function: Callable[[], object]) -> None:
        """Run a function that writes gradients by weights, which nobody waits for: at once."""
        function()


class Layout:
    """The offset of each of a list of parameters in a flat vector.

    Every parameter starts on a `boundary`, in bytes. The padding is zero in every vector and stays so, since no update
    changes a zero whose gradient is zero. Statistics come first, then parameters without decay, so that updates work
    on long runs of one kind. Parameters with decay, nearly all elements, follow in layer order, so that a backward
    pass completes the vector from its end. Behind all that is updated lie the parameters that are frozen: vectors of
    gradients and of optimizer state end before them.

    Arrays that stand in several layers (`Parameter.places`) begin the vector. A place after the first of these layers
    has the values of the first, and for its gradient memory behind all others in vectors of gradients.

    If the optimizer is `layerwise`, blocks say which matrix (with weight decay) they are of. If it `decays` nothing,
    they are all of one kind, so that an update goes through them at once.

    Attributes:
        parameters: without further places of an array.
        further: further places, with the first one of the array in this layout.
        offsets: of the parameters in the vector of values; gradients: of what is updated in vectors of gradients, of
            further places, too.
        size: of the vector of values; updated: of its first part, which is updated; summed: of a vector of gradients.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        dtype: DTypeLike,
        layerwise: bool = False,
        decays: bool = True,
        boundary: int = vectors.ALIGNMENT,
    ):
        firsts: dict[Parameter, Parameter] = {}
        for parameter in parameters:
            firsts.setdefault(parameter.first, parameter)
        self.parameters = list(firsts.values())
        self.further = {p: firsts[p.first] for p in parameters if firsts[p.first] is not p}
        self.dtype, self.layerwise, self.decays = np.dtype(dtype), layerwise, decays
        self.offsets: dict[Parameter, int] = {}
        self.size = self.updated = 0
        for parameter in sorted(self.parameters, key=lambda p: (p.frozen, not p.places, p.momentum is None, p.decay)):
            self.offsets[parameter] = self.size
            self.size += vectors.padded(parameter.size, self.dtype, boundary)
            if not parameter.frozen:
                self.updated = self.size
        self.summed = self.updated
        self.gradients = {parameter: offset for parameter, offset in self.offsets.items() if not parameter.frozen}
        for parameter in self.further:
            if not parameter.frozen:
                self.gradients[parameter] = self.summed
                self.summed += vectors.padded(parameter.size, self.dtype, boundary)

    def blocks(self) -> list[Block]:
        """All blocks of what is updated, in the order of the vector; each parameter begins a new block."""
        numbers = itertools.count()
        return [
            block
            for p, offset in self.offsets.items()
            if not p.frozen
            for matrix in [next(numbers) if self.layerwise and p.decay else None]
            for block in self._blocks(p, offset, matrix)
        ]

    def further_blocks(self) -> list[list[Block]]:
        """Of each further place of an array that is updated, the blocks of its gradient."""
        return [self._blocks(p, self.gradients[p], None) for p in self.further if p.size and not p.frozen]

    def _blocks(self, p: Parameter, offset: int, matrix: int | None) -> list[Block]:
        """The blocks of one parameter. Where an earlier stage has the array, sums over all stages leave them out."""
        array = p.first.name if p.places else None
        kind = p.decay and self.decays, p.momentum, p.rate, matrix, array, p is p.first
        return vectors.blocks(offset, offset + p.size, *kind)

    def views(self, vector: Vector) -> Iterator[tuple[Parameter, NDArray[np.floating]]]:
        """Each parameter, in layer order, with its view of `vector`, one of values; without those that are frozen if it
        is only as long as what is updated."""
        for parameter in self.parameters:
            offset = self.offsets[parameter]
            if not parameter.frozen or len(vector) == self.size:
                yield parameter, vector[offset : offset + parameter.size].reshape(parameter.shape)

    @functools.cached_property
    def unread(self) -> dict[Parameter, NDArray[np.floating]]:
        """Where layers write gradients of frozen parameters. It takes memory only where one does."""
        memory = vectors.empty(self.size - self.updated, self.dtype)
        frozen = {parameter: offset - self.updated for parameter, offset in self.offsets.items() if parameter.frozen}
        frozen |= {parameter: frozen[first] for parameter, first in self.further.items() if parameter.frozen}
        return {p: memory[start : start + p.size].reshape(p.shape) for p, start in frozen.items()}

    def zeros(self, gradients: bool = False) -> Vector:
        """A vector of zeros for values, or for gradients."""
        return vectors.zeros(self.summed if gradients else self.size, self.dtype)

    def bind(self, values: Vector) -> None:
        """Make every parameter's value its view of `values`."""
        for parameter, view in self.views(values):
            parameter.value = view
        for parameter, first in self.further.items():
            parameter.value = first.value

    def initialise(self, values: Vector, seed: int, worker: int = 0, workers: int = 1) -> None:
        """Write first values, each a function of seed, name of the parameter and number of the chunk alone.

        Worker `worker` of `workers` that write into one vector initialises its share.
        """
        for parameter, elements in self.shares(workers)[worker]:
            offset = self.offsets[parameter]
            parameter.initialise(values[offset : offset + parameter.size], seed, elements)

    def shares(self, workers: int) -> list[list[tuple[Parameter, range]]]:
        """What each of so many workers initialises: about equally many elements."""
        shares: list[list[tuple[Parameter, range]]] = [[] for _ in range(workers)]
        least = [(0, worker) for worker in range(workers)]  # a heap of (elements, worker)
        apart = [(parameter, elements) for parameter in self.parameters for elements in parameter.drawn_apart()]
        for parameter, elements in sorted(apart, key=lambda each: len(each[1]), reverse=True):
            count, worker = least[0]
            shares[worker].append((parameter, elements))
            heapq.heapreplace(least, (count + len(elements), worker))
        return shares


@dataclass(frozen=True)
class NamedInit:
    """An init whose values depend on the generator and on `text` alone, so that ranks need to compare only `text`."""

    text: str
    draw: Init

    def __call__(self, random: np.random.Generator, count: int) -> NDArray[np.float64]:
        return self.draw(random, count)


def constant(value: float) -> Init:
    """An init that sets every element to `value`."""
    return NamedInit(f"all {value}", lambda _, count: np.full(count, value))


def uniform(bound: float) -> Init:
    """An init that draws uniformly from [-bound, bound)."""
    return NamedInit(f"uniform to {bound}", lambda random, count: random.uniform(-bound, bound, count))


def normal(deviation: float) -> Init:
    """An init that draws from the normal distribution with mean 0 and standard deviation `deviation`."""
    return NamedInit(f"normal of deviation {deviation}", lambda random, count: random.normal(0.0, deviation, count))
