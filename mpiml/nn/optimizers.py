"""Optimizers: the state vectors that each keeps, and its formula, applied to a piece of the flat vectors in place."""

import math
from collections.abc import Sequence

from mpiml.vectors import Operands

LARGEST = 1e30  # trust ratio: the next ones would be beyond float32


class Optimizer:
    """The common part of all optimizers.

    `states` names the state vectors; each has the size of the values and starts at zero. `default_rate` is the
    learning rate that is used if none is given.

    If it is `layerwise`, the step of each matrix (a parameter with weight decay) is multiplied by a trust ratio, made
    of norms of the whole matrix. In each step it then first prepares all pieces, and updates them when the ratios are
    known.
    """

    states: tuple[str, ...] = ()
    default_rate = 0.0
    layerwise = False

    def __init__(self, weight_decay: float = 0.0):
        self.weight_decay = weight_decay

    def update(self, on: Operands, scale: float, rate: float, step: int) -> None:
        """Change the values and the states of a piece in place.

        The mean gradient of the batch is `on.total` times `scale`; `rate` is the learning rate; `step` counts from 1.
        """
        raise TypeError(f"{type(self).__name__} defines no update")

    def prepare(self, on: Operands, scale: float, step: int) -> None:
        """Change the states of a piece, and put into `on.total` what its matrix's second norm is to be of: by default
        it stays the summed gradient."""

    def trust_ratio(self, value: float, total: float, scale: float) -> float:
        """The trust ratio of a matrix, by its norm and that of its `on.total`."""
        return 1.0

    def _gradient(self, on: Operands, scale: float) -> None:
        """scratch[0] = scale * total + weight_decay * value. Overwrites scratch[1]."""
        xp = on.xp
        grad, spare = on.scratch
        xp.multiply(on.total, scale, out=grad)
        if self.weight_decay and on.decays:
            xp.multiply(on.value, self.weight_decay, out=spare)
            xp.add(grad, spare, out=grad)


class SGD(Optimizer):
    """value -= rate * (grad + weight_decay * value)."""

    default_rate = 0.1

    def update(self, on: Operands, scale: float, rate: float, step: int) -> None:
        xp = on.xp
        grad, _ = on.scratch
        if self.weight_decay and on.decays:
            self._gradient(on, scale)
            xp.multiply(grad, rate, out=grad)
        else:
            xp.multiply(on.total, scale * rate, out=grad)
        xp.subtract(on.value, grad, out=on.value)


class Momentum(Optimizer):
    """velocity = momentum * velocity + grad; value -= rate * velocity (Nesterov: grad + momentum * velocity).

    Weight decay joins the gradient: grad + weight_decay * value.
    Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013.
    """

    states = ("velocity",)
    default_rate = 0.05

    def __init__(self, weight_decay: float = 0.0, momentum: float = 0.9, nesterov: bool = False):
        super().__init__(weight_decay)
        self.momentum, self.nesterov = momentum, nesterov

    def update(self, on: Operands, scale: float, rate: float, step: int) -> None:
        xp = on.xp
        value, (velocity,), (grad, spare) = on.value, on.states, on.scratch
        self._gradient(on, scale)
        xp.multiply(velocity, self.momentum, out=velocity)
        xp.add(velocity, grad, out=velocity)
        if self.nesterov:
            xp.multiply(velocity, self.momentum, out=spare)
            xp.add(grad, spare, out=grad)
            xp.multiply(grad, rate, out=grad)
        else:
            xp.multiply(velocity, rate, out=grad)
        xp.subtract(value, grad, out=value)


class Adam(Optimizer):
    """mean and variance: moving averages of grad and grad^2; value -= rate * mean / (sqrt(variance) + epsilon), where
    both averages are first divided by 1 - beta^step, which corrects their start at zero.

    Weight decay joins the gradient; with `decoupled`, it shrinks the value instead (AdamW).
    Kingma and Ba, "Adam", ICLR 2015; Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.
    """

    states = ("mean", "variance")
    default_rate = 0.001

    def __init__(
        self,
        weight_decay: float = 0.0,
        betas: Sequence[float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        decoupled: bool = False,
    ):
        super().__init__(weight_decay)
        self.betas, self.epsilon, self.decoupled = betas, epsilon, decoupled

    def update(self, on: Operands, scale: float, rate: float, step: int) -> None:
        xp = on.xp
        value, (grad, spare) = on.value, on.scratch
        if self.decoupled:
            xp.multiply(on.total, scale, out=grad)
            if self.weight_decay and on.decays:
                xp.multiply(value, 1.0 - rate * self.weight_decay, out=value)
        else:
            self._gradient(on, scale)
        self._divide(on, step)
        xp.multiply(spare, rate / (1.0 - self.betas[0] ** step), out=spare)
        xp.subtract(value, spare, out=value)

    def _divide(self, on: Operands, step: int) -> None:
        """Add the gradient in scratch[0] to the averages; scratch[1] = mean / (sqrt(variance) + epsilon), where only
        the variance is corrected."""
        xp = on.xp
        (mean, variance), (grad, spare) = on.states, on.scratch
        first, second = self.betas
        xp.multiply(mean, first, out=mean)
        xp.multiply(grad, 1.0 - first, out=spare)
        xp.add(mean, spare, out=mean)
        xp.multiply(grad, grad, out=grad)
        xp.multiply(grad, 1.0 - second, out=grad)
        xp.multiply(variance, second, out=variance)
        xp.add(variance, grad, out=variance)
        xp.sqrt(variance, out=spare)
        xp.multiply(spare, 1.0 / math.sqrt(1.0 - second**step), out=spare)
        xp.add(spare, self.epsilon, out=spare)
        xp.divide(mean, spare, out=spare)


class LARS(Momentum):
    """Momentum with trust * (grad + weight_decay * value) in the place of the gradient. Of a matrix,
    trust = coefficient * |value| / (|grad| + weight_decay * |value| + epsilon), or 1 where one of the norms is 0; of
    other parameters it is 1.

    You, Gitman and Ginsburg, "Large batch training of convolutional networks", arXiv 1708.03888, 2017. Constants and
    default rate are those of the package timm; unlike there, matrices have their ratio also without weight decay.
    """

    default_rate = 1.0
    layerwise = True
    coefficient, epsilon = 0.001, 1e-8

    def trust_ratio(self, value: float, total: float, scale: float) -> float:
        if not value > 0 or not total > 0:
            return 1.0
        return self.coefficient * value / (total * scale + self.weight_decay * value + self.epsilon)

    def _gradient(self, on: Operands, scale: float) -> None:
        xp = on.xp
        super()._gradient(on, scale)
        xp.multiply(on.scratch[0], on.trust, out=on.scratch[0])


class LAMB(Adam):
    """value -= rate * trust * direction, where direction = mean / (sqrt(variance) + epsilon) + weight_decay * value;
    mean and variance are corrected as in Adam. Of a matrix, trust = |value| / |direction|, or 1 where one of the norms
    is 0 (or the direction next to nothing); of other parameters, which have no weight decay, it is 1.

    The direction takes the place of the gradient in memory until all norms are known.

    You et al., "Large batch optimization for deep learning: training BERT in 76 minutes", ICLR 2020, arXiv 1904.00962.
    Defaults are those of the package timm, without its limit of the gradient's norm, 1; unlike there, matrices have
    their ratio also without weight decay.
    """

    layerwise = True

    def __init__(self, weight_decay: float = 0.0, betas: Sequence[float] = (0.9, 0.999), epsilon: float = 1e-6):
        super().__init__(weight_decay, betas, epsilon)

    def prepare(self, on: Operands, scale: float, step: int) -> None:
        xp = on.xp
        direction, (grad, spare) = on.total, on.scratch
        xp.multiply(on.total, scale, out=grad)
        self._divide(on, step)
        xp.multiply(spare, 1.0 / (1.0 - self.betas[0] ** step), out=direction)
        if self.weight_decay and on.decays:
            xp.multiply(on.value, self.weight_decay, out=spare)
            xp.add(direction, spare, out=direction)

    def trust_ratio(self, value: float, total: float, scale: float) -> float:
        return value / total if 0 < value < LARGEST * total else 1.0

    def update(self, on: Operands, scale: float, rate: float, step: int) -> None:
        xp = on.xp
        _, spare = on.scratch
        xp.multiply(on.total, rate * on.trust, out=spare)
        xp.subtract(on.value, spare, out=on.value)


def build(name: str, momentum: float, weight_decay: float, betas: Sequence[float] = (0.9, 0.999)) -> Optimizer:
    """The optimizer called `name`: sgd, momentum, nesterov or lars; or adam, adamw or lamb, which have betas."""
    if name == "sgd":
        return SGD(weight_decay)
    if name in ("momentum", "nesterov"):
        return Momentum(weight_decay, momentum=momentum, nesterov=name == "nesterov")
    if name == "lars":
        return LARS(weight_decay, momentum=momentum)
    if name == "lamb":
        return LAMB(weight_decay, betas)
    return Adam(weight_decay, betas, decoupled=name == "adamw")


def default_decay(name: str) -> float:
    """The weight decay that the optimizer called `name` uses if none is given."""
    return 0.01 if name in ("adamw", "lamb") else 0.0


def default_rate(name: str) -> float:
    """The learning rate that the optimizer called `name` uses if none is given."""
    return build(name, 0.0, 0.0).default_rate
