"""Optimizers: which state each keeps, and its update of one piece of the flat vectors."""

from dataclasses import dataclass

from mpiml import vectors
from mpiml.vectors import Operands


@dataclass(frozen=True)
class Optimizer:
    """What all optimizers share.

    `states` names the state vectors; each has the values' size and starts at zero. `update` changes a piece of
    the values and of the states in place: its total times `scale` is the batch's mean gradient, `rate` is the
    learning rate, and `step` counts from 1.
    """

    weight_decay: float = 0.0

    states: tuple[str, ...] = ()
    default_rate = 0.0

    def update(self, on: Operands, scale: float, rate: float, step: int) -> None:
        raise TypeError(f"{type(self).__name__} defines no update")

    def _decay(self, on: Operands) -> float:
        return self.weight_decay if on.decays else 0.0


@dataclass(frozen=True)
class SGD(Optimizer):
    """Plain gradient descent."""

    default_rate = 0.1

    def update(self, on: Operands, scale: float, rate: float, step: int) -> None:
        vectors.sgd(on, scale, rate, self._decay(on))


@dataclass(frozen=True)
class Momentum(Optimizer):
    """Gradient descent with momentum, after Nesterov if so said."""

    momentum: float = 0.9
    nesterov: bool = False
    states: tuple[str, ...] = ("velocity",)
    default_rate = 0.05

    def update(self, on: Operands, scale: float, rate: float, step: int) -> None:
        vectors.momentum_sgd(on, scale, rate, self._decay(on), self.momentum, self.nesterov)


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam; with `decoupled` decay it is AdamW."""

    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    decoupled: bool = False
    states: tuple[str, ...] = ("mean", "variance")
    default_rate = 0.001

    def update(self, on: Operands, scale: float, rate: float, step: int) -> None:
        vectors.adam(on, scale, rate, self._decay(on), self.decoupled, self.betas, self.epsilon, step)


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
