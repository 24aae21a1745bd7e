"""Optimizers: which state each keeps, and its update of one piece of the flat vectors."""

from collections.abc import Sequence
from dataclasses import dataclass

from mpiml import vectors
from mpiml.vectors import Scratch, Vector


@dataclass(frozen=True)
class Optimizer:
    """What all optimizers share.

    `states` names the state vectors; each has the values' size and starts at zero. `update` changes a piece of
    the values and of the states in place: `total` times `scale` is the batch's mean gradient; `scratch` is two
    vectors of the piece's length, of which the first may be `total` itself; `rate` is the learning rate, `decay`
    whether weight decay applies to the piece, and `step` counts from 1.
    """

    weight_decay: float = 0.0

    states: tuple[str, ...] = ()
    default_rate = 0.0

    def update(
        self,
        value: Vector,
        total: Vector,
        scale: float,
        scratch: Scratch,
        states: Sequence[Vector],
        rate: float,
        decay: bool,
        step: int,
    ) -> None:
        raise TypeError(f"{type(self).__name__} defines no update")


@dataclass(frozen=True)
class SGD(Optimizer):
    """Plain gradient descent."""

    default_rate = 0.1

    def update(
        self,
        value: Vector,
        total: Vector,
        scale: float,
        scratch: Scratch,
        states: Sequence[Vector],
        rate: float,
        decay: bool,
        step: int,
    ) -> None:
        vectors.sgd(value, total, scale, scratch, rate, self.weight_decay if decay else 0.0)


@dataclass(frozen=True)
class Momentum(Optimizer):
    """Gradient descent with momentum, after Nesterov if so said."""

    momentum: float = 0.9
    nesterov: bool = False
    states: tuple[str, ...] = ("velocity",)
    default_rate = 0.05

    def update(
        self,
        value: Vector,
        total: Vector,
        scale: float,
        scratch: Scratch,
        states: Sequence[Vector],
        rate: float,
        decay: bool,
        step: int,
    ) -> None:
        wd = self.weight_decay if decay else 0.0
        vectors.momentum_sgd(value, total, scale, scratch, states, rate, wd, self.momentum, self.nesterov)


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam; with `decoupled` decay it is AdamW."""

    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    decoupled: bool = False
    states: tuple[str, ...] = ("mean", "variance")
    default_rate = 0.001

    def update(
        self,
        value: Vector,
        total: Vector,
        scale: float,
        scratch: Scratch,
        states: Sequence[Vector],
        rate: float,
        decay: bool,
        step: int,
    ) -> None:
        wd = self.weight_decay if decay else 0.0
        vectors.adam(value, total, scale, scratch, states, rate, wd, self.decoupled, self.betas, self.epsilon, step)


def build(name: str, momentum: float, weight_decay: float) -> Optimizer:
    """The optimizer of that name: sgd, momentum, nesterov, adam or adamw."""
    if name == "sgd":
        return SGD(weight_decay)
    if name in ("momentum", "nesterov"):
        return Momentum(weight_decay, momentum=momentum, nesterov=name == "nesterov")
    return Adam(weight_decay, decoupled=name == "adamw")


def default_rate(name: str) -> float:
    """The learning rate that is used where none is given."""
    return build(name, 0.0, 0.0).default_rate
