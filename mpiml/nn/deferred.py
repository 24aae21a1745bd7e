"""Gradients of a backward pass in two parts: the gradient by the input first, those by weights later."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from mpiml.nn.parameters import Gradients, Parameter


class DeferredGradients(Gradients):
    """The gradients of one micro-batch whose backward pass has two parts. In the first, nothing is written to the
    vector: `deferred[parameter]` is an array of its own, and `later` keeps functions. `write` is the second part."""

    def __init__(self, gradients: Gradients):
        self.vector, self.complete = gradients.vector, gradients.complete
        self._gradients = gradients
        self._kept: dict[Parameter, NDArray[np.floating]] = {}
        self._functions: list[Callable[[], object]] = []
        self._writing = False

    def __getitem__(self, parameter: Parameter) -> NDArray[np.floating]:
        if self._writing or parameter.frozen:
            return self._gradients[parameter]
        if parameter not in self._kept:
            self._kept[parameter] = np.empty_like(self._gradients[parameter])
        return self._kept[parameter]

    def finished(self, parameters: Iterable[Parameter]) -> None:
        """As of Gradients, after what was left for later before."""
        self.later(lambda: self._gradients.finished(parameters))

    def later(self, function: Callable[[], object]) -> None:
        """Keep the function for `write`."""
        if self._writing:
            function()
        else:
            self._functions.append(function)

    def write(self) -> None:
        """Write all gradients into the vector."""
        self._gradients.begin()
        self._writing = True
        for parameter, kept in self._kept.items():
            np.copyto(self._gradients[parameter], kept)
        for function in self._functions:
            function()
        self._kept, self._functions = {}, []
