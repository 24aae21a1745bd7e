"""Learning rates as functions of the step."""

import math
from collections.abc import Callable


def learning_rate(peak: float, warmup: int, decay: str, decay_steps: int) -> Callable[[int], float]:
    """The learning rate of step 1, 2, ...

    It rises linearly to `peak` over the first `warmup` steps. Then it stays ("none"), falls along half a cosine to
    zero at `decay_steps` ("cosine"; Loshchilov and Hutter, "SGDR", ICLR 2017), or falls to a tenth at every third
    of the way there ("step").
    """

    def rate(step: int) -> float:
        if step <= warmup:
            return peak * step / warmup
        along = min((step - warmup) / max(decay_steps - warmup, 1), 1.0)
        if decay == "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * along))
        if decay == "step":
            return peak * 0.1 ** min(int(3 * along), 2)
        return peak

    return rate
