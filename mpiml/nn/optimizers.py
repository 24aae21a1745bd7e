"""Optimizers: which state each keeps, and its update of one piece of the flat vectors."""

from mpiml import vectors
from mpiml.vectors import Operands


class Optimizer:
    """What all optimizers share.

    `states` names the state vectors; each has the values' size and starts at zero. `update` changes a piece of
    the values and of the states in place: its total times `scale` is the batch's mean gradient, `rate` is the
    learning rate, and `step` counts from 1.
    """

    states: tuple[str, ...] = ()
    default_rate = 0.0

    def __init__(self, weight_decay: float = 0.0):
        self.weight_decay = weight_decay

    def update(self, on: Operands, scale: float, rate: float, step: int) -> None:
        raise TypeError(f"{type(self).__name__} defines no update")

    def _decay(self, on: Operands) -> float:
        return self.weight_decay if on.decays else 0.0


class SGD(Optimizer):
    """Plain gradient descent."""

    default_rate = 0.1

    def update(self, on: Operands, scale: float, rate: float, step: int) -> None:
        vectors.sgd(on, scale, rate, self._decay(on))


class Momentum(Optimizer):
    """Gradient descent with momentum, after Nesterov if so said."""

    states = ("velocity",)
    default_rate = 0.05

    def __init__(self, weight_decay: float = 0.0, momentum: float = 0.9, nesterov: bool = False):
        super().__init__(weight_decay)
        self.momentum, self.nesterov = momentum, nesterov

    def update(self, on: Operands, scale: float, rate: float, step: int) -> None:
        vectors.momentum_sgd(on, scale, rate, self._decay(on), self.momentum, self.nesterov)


class Adam(Optimizer):
    """Adam; with `decoupled` decay it is AdamW."""

    states = ("mean", "variance")
    default_rate = 0.001

    def __init__(
        self,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        decoupled: bool = False,
    ):
        super().__init__(weight_decay)
        self.betas, self.epsilon, self.decoupled = betas, epsilon, decoupled

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
