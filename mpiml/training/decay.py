"""The learning rate of a run, by its settings or by a user's own function, which is tried before the first step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from mpiml.errors import ConfigError
from mpiml.nn.rates import DECAYS, Phase, learning_rate, starts
from mpiml.random import Draws, keyed
from mpiml.team import Team
from mpiml.training.resolve import Resolved, phases_of
from mpiml.usercode import called_with, named

TRIED = 100  # steps of a decay for which a function is tried
PURE = "it must be a function of these two numbers alone"


class OwnDecay:
    """The function that --decay names, (step, steps) -> factor, with checks of what it returns.

    Raises ConfigError if it is no such function; when called, if it raises an error or returns anything but a finite
    number, 0 or more.
    """

    def __init__(self, name: str, seed: int):
        self.flag, self.seed = f"--decay {name}", seed
        self.function: Callable[[int, int], Any] = called_with(named(name, "--decay"), self.flag, "step", "steps")
        self.draws = frozenset[str]()  # the generators of the process that it draws from

    def __call__(self, step: int, steps: int) -> float:
        with keyed(self.draws, self.seed, "decay", step, steps):
            return self._checked(step, steps)

    def tried(self, points: Iterable[tuple[int, int]]) -> dict[str, str]:
        """What it returns at each (step, steps), as text. Raises ConfigError if it returns something else when it is
        called again, in another order."""
        factors: dict[tuple[int, int], float] = {}
        for point in [*points, *reversed(list(points))]:
            with Draws(self.seed, "decay", *point) as draws:
                factor = self._checked(*point)
            self.draws |= draws.which
            if factors.setdefault(point, factor) != factor:
                where = f"{self.flag}: returns {factors[point]} for step {point[0]} of {point[1]}"
                raise ConfigError(f"{where}, and {factor} when it is called again; {PURE}")
        return {f"{self.flag} for step {step} of {steps}": repr(factor) for (step, steps), factor in factors.items()}

    def _checked(self, step: int, steps: int) -> float:
        try:
            value = self.function(step, steps)
            number = math.nan if isinstance(value, (str, bytes)) or np.shape(value) else float(value)
        except Exception as error:
            reason = (str(error).splitlines() or ["no reason given"])[0].rstrip(".")
            raise ConfigError(f"{self.flag}: {type(error).__name__}: {reason}, for step {step} of {steps}") from None
        if not 0 <= number < math.inf:
            wanted = "a finite number, 0 or more, is needed"
            raise ConfigError(f"{self.flag}: returns {value!r:.60} for step {step} of {steps}; {wanted}")
        return number


def rate_of(config: Resolved, team: Team) -> Callable[[int], float]:
    """The learning rate as a function of the step, the same on all ranks; collective.

    Raises, on all ranks alike, ConfigError for a function of the user's that cannot be used.
    """
    phases, factor = phases_of(config), DECAYS.get(config.decay)
    if factor:
        return learning_rate(phases, config.warmup_steps, factor)
    own = team.together(lambda: OwnDecay(config.decay, config.seed))
    points = spread(phases, config.warmup_steps)
    team.check_alike(team.together(lambda: own.tried(points)), PURE)
    return learning_rate(phases, config.warmup_steps, own)


def spread(phases: list[Phase], warmup: int) -> list[tuple[int, int]]:
    """(step, steps) at up to TRIED steps of the decay of each phase, from the first to the last."""
    lengths = [max(phase.decay_steps - start, 1) for phase, start in zip(phases, starts(phases, warmup), strict=True)]
    return [point for steps in lengths for point in dict.fromkeys(_steps(steps))]


def _steps(steps: int) -> Iterable[tuple[int, int]]:
    return ((1 + (steps - 1) * i // (TRIED - 1), steps) for i in range(TRIED))


def remarks(config: Resolved, rate: Callable[[int], float]) -> list[str]:
    """What a person should know: what --lr-scaling makes of the learning rate, how that of a run that was extended
    falls, and that it is 0 before the last step."""
    phases, notes = phases_of(config), list[str]()
    if config.lr_scaling != "none":
        ratio = f"{config.batch} / {config.base_batch}"
        factor = ratio if config.lr_scaling == "linear" else f"sqrt({ratio})"
        notes.append(f"learning rate {config.lr:g} x {factor} = {phases[-1].lr:g}, by --lr-scaling")
    if config.lr_history:
        texts = [f"from {phase.lr:g} towards {phase.lr_floor:g} until step {phase.decay_steps}" for phase in phases]
        ends = ["", *(f"; after step {phase.until} " for phase in phases)]
        falling = "".join(end + text for end, text in zip(ends, texts, strict=False))
        notes.append(f"the learning rate falls by --decay {config.decay} {falling}")
    steps, last = config.steps, config.decay_steps
    if steps > last and rate(steps) == 0:
        why = "by --decay-steps: nothing is learned"
        notes.append(f"warning: the learning rate is 0 from step {last} of {steps} on, {why}")
    return notes
