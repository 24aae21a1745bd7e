"""Learning rates as functions of the step."""

import math
from collections.abc import Callable


def learning_rate(peak: float, warmup: int, decay: str, decay_steps: int) -> Callable[[int], float]:
    """The learning rate as a function of the step, 1, 2, ...

    It rises linearly to `peak` over the first `warmup` steps. Then, depending on `decay`, it stays ("none"), falls
    along half a cosine to zero at step `decay_steps` ("cosine"; Loshchilov and Hutter, "SGDR", ICLR 2017), or is
    divided by 10 after one third and again after two thirds of the steps until `decay_steps` ("step").
    """

    def rate(step: int) -> float:
        if step <= warmup:
            return peak * step / warmup
        progress = min((step - warmup) / max(decay_steps - warmup, 1), 1.0)
        if decay == "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
        if decay == "step":
            return peak * 0.1 ** min(int(3 * progress), 2)
        return peak

    return rate
