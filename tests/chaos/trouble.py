"""A user's module in which one rank gets into trouble: CHAOS_TROUBLE=PHASE:WAY:RANK says where, how and which."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from mpiml.data.dataset import Dataset, open_dataset
from mpiml.nn.layers import At, Flatten, Layer, Linear, ReLU
from mpiml.run.saving import Saver

PHASE, WAY, RANK = os.environ.get("CHAOS_TROUBLE", "none:none:-1").split(":")
HIT = MPI.COMM_WORLD.rank == int(RANK)
STEP, LAST = 5, 8  # the step with the trouble, where there is one, and the last of the run
WORD = "trouble of a user's own"
CALLS = 12  # calls of this rank that go well, where no step is known: more than a step has


def fail() -> None:
    raise RuntimeError(WORD)


def spin() -> None:
    while True:
        pass


WAYS: dict[str, Callable[[], Any]] = {
    "raise": fail,
    "sys.exit(0)": lambda: sys.exit(0),
    "sys.exit(3)": lambda: sys.exit(3),
    "os._exit(0)": lambda: os._exit(0),
    "os._exit(5)": lambda: os._exit(5),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSEGV": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "endless loop": spin,
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


class Trouble:
    """Comes once, in its phase, from a step on or after some calls."""

    def __init__(self) -> None:
        self.step = self.calls = 0
        self.over = False

    def at(self, phase: str, step: int = STEP) -> None:
        """The place of a phase has been reached."""
        if HIT and phase == PHASE and step >= STEP and not self.over:
            self.over = True
            WAYS[WAY]()

    def called(self, phase: str) -> None:
        """The place of a phase that is reached again and again."""
        self.calls += phase == PHASE
        if self.calls > CALLS:
            self.at(phase)

    def before(self, owner: Any, name: str, phase: str) -> None:
        """Make trouble come before a function is called, once the run has got as far as the step."""
        real = getattr(owner, name)

        def function(*args: Any, **more: Any) -> Any:
            self.at(phase, self.step)
            return real(*args, **more)

        setattr(owner, name, function)


trouble = Trouble()
trouble.at("import")
if PHASE == "atexit" and HIT:
    atexit.register(WAYS[WAY])
if PHASE == "checkpoint":
    trouble.before(Saver, "begin", PHASE)
if PHASE == "write":
    trouble.before(os, "fsync", PHASE)


def load() -> Dataset:
    trouble.at("data")
    return open_dataset("digits")


def transform(x: Any, y: Any, rng: Any) -> Any:
    trouble.called("transform")
    return x, y


class Passing(Layer):
    """Gives its input on."""

    def __call__(self, x: Any, at: At) -> Any:
        if at.training:
            trouble.step = at.step
            trouble.at("forward", at.step)
            trouble.at("last step", at.step - LAST + STEP)
        else:
            trouble.at("evaluation")

        def backward(dy: Any, grads: Any) -> Any:
            trouble.at("backward", at.step)
            return dy

        return x, backward


def model(shape: Any, outputs: int) -> list[Layer]:
    trouble.at("model")
    return [Flatten(), Linear(64, 8), Passing(), ReLU(), Linear(8, outputs)]


def loss(y: Any, labels: Any) -> Any:
    trouble.called("loss")
    odds = np.exp(y - y.max(axis=1, keepdims=True))
    share, rows = odds / odds.sum(axis=1, keepdims=True), np.arange(len(y))
    total = -np.log(share[rows, labels] + 1e-30).sum()
    share[rows, labels] -= 1
    return total, len(y), share


class Score:
    """The share of rows whose class is right."""

    name, columns = "score", 2

    def sums(self, y: Any, labels: Any) -> Any:
        trouble.called("metric")
        return np.array([(y.argmax(axis=1) == labels).sum(), len(y)], float)

    def value(self, totals: Any) -> Any:
        return totals[0] / totals[1]


def metric(outputs: int) -> Score:
    return Score()
