"""How long the passes of each layer take on this rank; no MPI."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpiml.clock import unwatched
from mpiml.config import Config
from mpiml.devices.host import HOST, Host
from mpiml.errors import ConfigError
from mpiml.nn import base as nn
from mpiml.nn.parameters import Gradients, Layout
from mpiml.random import generator, global_generators, keyed
from mpiml.training.task import Task

REPEATS = 5


def layer_times(
    config: Config,
    layers: Sequence[nn.Layer],
    task: Task,
    moved: Callable[[], None] = unwatched,
    device: Host = HOST,
) -> list[int]:
    """Microseconds of a forward and a backward pass of each layer, for as many rows as a micro-batch has: the least of
    a few passes. Layers are timed one after another, each on what the one before returns for drawn rows, and with first
    values in memory that is freed before the next. `moved` is called after each pass. `device`: on which they compute.

    Raises ConfigError for a layer whose pass fails; it names the layer.
    """
    x, times = _rows(config, task), []
    with np.errstate(all="ignore"):
        for index, layer in enumerate(layers):
            try:
                x, seconds = _timed(config, layer, x, nn.updated(layers[:index]), moved, device)
            except ConfigError:
                raise
            except Exception as error:  # of the user's own code
                shape = tuple(x.shape[1:])
                raise ConfigError(
                    f"--balance measured: {layer.path}, {type(layer).__name__}, fails when it is timed on {len(x)} "
                    f"rows of shape {shape}: {type(error).__name__}: {' '.join(str(error).split())}; "
                    "--balance operations needs no timing"
                ) from error
            times.append(max(round(seconds * 1e6), 1))
    return times


def _rows(config: Config, task: Task) -> NDArray[Any]:
    """Rows for the first layer: token ids, or else numbers; zeros where integers may be among them."""
    shape, random = (-(-config.batch // (config.microbatches or 1)), *task.shape), generator(config.seed, "balance")
    if task.inputs:
        return np.zeros(shape, config.dtype)
    drawn = random.integers(task.vocabulary, size=shape) if task.vocabulary else random.standard_normal(shape)
    return drawn.astype(config.dtype)


def _timed(
    config: Config, layer: nn.Layer, x: Any, learned: bool, moved: Callable[[], None], device: Host
) -> tuple[Any, float]:
    """What a layer returns for rows x, and the seconds of its two passes; the layer is as before afterwards."""
    layout, at, least = Layout(nn.parameters([layer]), config.dtype), nn.At(True, config.seed, 1), np.inf
    with ExitStack() as stack:
        for each in nn.everything([layer]):
            stack.enter_context(each.unchanged())
        values = layout.zeros()
        layout.bind(values)
        layout.initialise(values, config.seed)
        gradients = Gradients(layout, device.vectors.zeros(layout.summed, config.dtype))
        dy: Any = None
        for _ in range(REPEATS):
            with keyed(global_generators(), config.seed, "balance", layer.path):
                began = perf_counter()
                y, backward = nn.forward([layer], x, at, learned)
                device.wait()
                seconds = perf_counter() - began
                if dy is None:
                    dy = generator(config.seed, "balance", layer.path).standard_normal(y.shape).astype(config.dtype)
                began = perf_counter()
                backward(dy, gradients)
                device.wait()
                seconds += perf_counter() - began + (seconds if layer.block is not None else 0.0)
                least = min(least, seconds)
            moved()
    return y, least
