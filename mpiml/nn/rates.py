"""Learning rates as functions of the step."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mpiml.errors import ConfigError

# (step, steps) -> what is left of the rate after `step` of the `steps` of a decay: 1, 2, ..., steps.
Factor = Callable[[int, int], float]

NUMBER = r"([0-9][0-9.e+-]{0,30})"
PHASE = re.compile(rf"until=([0-9]{{1,18}}) lr={NUMBER} lr-floor={NUMBER} decay-steps=([0-9]{{1,18}})")


def constant(step: int, steps: int) -> float:
    """It stays."""
    return 1.0


def linear(step: int, steps: int) -> float:
    """A line from 1 to 0."""
    return 1 - step / steps


def cosine(step: int, steps: int) -> float:
    """Half a cosine from 1 to 0. Loshchilov and Hutter, "SGDR", ICLR 2017."""
    return 0.5 * (1 + math.cos(math.pi * (step / steps)))


def stairs(step: int, steps: int) -> float:
    """Divided by 10 after one third of the steps, and again after two thirds."""
    return float(0.1 ** min(int(3 * (step / steps)), 2))


DECAYS: dict[str, Factor] = {"none": constant, "linear": linear, "cosine": cosine, "step": stairs}


class Phase(NamedTuple):
    """Steps of a run in which the rate falls once, from `lr` to `lr_floor` at step `decay_steps`, and then stays.

    `until` is the last of them. A run that was extended has several phases, each of which begins where the one before
    ends. Steps are counted from the run's first.
    """

    until: int
    lr: float
    lr_floor: float
    decay_steps: int

    def __str__(self) -> str:
        return " ".join(f"{name.replace('_', '-')}={value}" for name, value in self._asdict().items())


def history(texts: Sequence[str]) -> list[Phase]:
    """The phases that texts stand for, which are written as `str(phase)`. Raises ConfigError for texts that are not, or
    are not in order."""
    phases: list[Phase] = []
    for text in texts:
        phase, start = _parsed(text), phases[-1].until if phases else 0
        if min(phase.until, phase.decay_steps) <= start:
            raise ConfigError(f"--lr-history {text}: comes after until={start}, so its steps must be later ones")
        phases.append(phase)
    return phases


def _parsed(text: str) -> Phase:
    example = Phase(36, 0.001, 0.0, 36)
    problem = ConfigError(f"--lr-history {text!r:.120}: must be like '{example}', with a floor that is not above lr")
    match = PHASE.fullmatch(text)
    if not match:
        raise problem
    try:
        phase = Phase(int(match[1]), float(match[2]), float(match[3]), int(match[4]))
    except ValueError:
        raise problem from None
    if not phase.lr_floor <= phase.lr < math.inf:
        raise problem
    return phase


def starts(phases: Sequence[Phase], warmup: int) -> list[int]:
    """For each phase the step after which its decay begins: the first decay comes after the warm-up."""
    return [warmup, *(phase.until for phase in phases[:-1])]


def batch_factor(scaling: str, batch: int, base: int | None) -> float:
    """What a learning rate that was chosen for steps of `base` rows is multiplied by for steps of `batch` rows.

    `scaling` is "linear" (Goyal et al., "Accurate, large minibatch SGD", arXiv 1706.02677, 2017), "sqrt" or "none".
    Raises ConfigError if there is a base and no scaling, or the reverse.
    """
    if scaling == "none":
        if base is not None:
            raise ConfigError(f"--base-batch {base}: is of --lr-scaling, linear or sqrt; give that too")
        return 1.0
    if base is None:
        raise ConfigError(f"--lr-scaling {scaling}: say with --base-batch for which batch the learning rate is meant")
    return batch / base if scaling == "linear" else math.sqrt(batch / base)


def learning_rate(phases: Sequence[Phase], warmup: int, factor: Factor) -> Callable[[int], float]:
    """The learning rate as a function of the step, 1, 2, ...

    It rises linearly to the first phase's `lr` over the first `warmup` steps. Then it is floor + (lr - floor) * factor,
    in each phase with its own lr and floor; the factor is of the step and the number of steps of the phase's decay,
    both counted from where that begins. After the decay the rate stays.
    """
    ends, begins = [phase.until for phase in phases[:-1]], starts(phases, warmup)

    def rate(step: int) -> float:
        number = bisect_left(ends, step)
        phase, begin = phases[number], begins[number]
        if number == 0 and step <= warmup:
            return phase.lr * step / warmup
        steps = max(phase.decay_steps - begin, 1)
        return phase.lr_floor + (phase.lr - phase.lr_floor) * factor(min(step - begin, steps), steps)

    return rate
