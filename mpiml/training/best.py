"""Which evaluations of a run are the best so far, and whether enough of them were no better; no MPI."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpiml.config import Config
from mpiml.errors import ConfigError
from mpiml.nn.losses import Metric
from mpiml.run.directory import CHECKPOINTS
from mpiml.run.step_files import file_name
from mpiml.training.calendar import Calendar


class Best:
    """The best of a run's evaluations, a function of their scores in order, and so the same on all ranks and in a run
    that was killed and goes on. Of equal scores the first is the best.

    Args:
        name: of the scores, as in an evaluation's line of metrics.jsonl.
        what: the scores in words: "test loss".
        higher: whether higher ones are better.
        keep: how many of the best `steps` has.
        patience: evaluations in a row without a better one that are enough; 0: never.
        due: whether there is an evaluation after a step wherever the run ends. One after another step is made because
            it ends there, and does not count if it goes on longer after all, so that until then the checkpoint whose
            place it took is kept.

    Attributes:
        since: how many evaluations there were after the best one.
    """

    def __init__(self, name: str, what: str, higher: bool, keep: int, patience: int, due: Callable[[int], bool]):
        self.name, self.what, self.higher, self.keep, self.patience = name, what, higher, keep, patience
        self.since, self.due = 0, due
        self._ranked: list[tuple[float, int]] = []  # (score, step), the best first
        self._displaced: list[tuple[float, int]] = []  # one that was in `_ranked`, at most

    def add(self, step: int, score: float | None) -> bool:
        """Add the next evaluation. Returns whether it is among the best `keep`; a score that is not finite never is."""
        self.since += 1
        self._displaced = []
        if score is None or not math.isfinite(score):
            return False
        entry = (score, step)
        ranked = sorted([*self._ranked, entry], key=lambda one: -one[0] if self.higher else one[0])
        places = max(self.keep, 1)
        self._ranked = ranked[:places]
        if self.keep and not self.due(step):
            self._displaced = [one for one in ranked[places:] if one is not entry]
        if self._ranked[0] is entry:
            self.since = 0
        return step in self.steps

    @property
    def steps(self) -> list[int]:
        """Whose checkpoints are kept: of the best `keep` evaluations, the best first."""
        return [step for _, step in self._ranked[: self.keep] + self._displaced]

    @property
    def enough(self) -> bool:
        """Whether training is to end."""
        return 0 < self.patience <= self.since

    @property
    def reason(self) -> str | None:
        """Why training is to end; None if it is not."""
        if not self.enough:
            return None
        evaluations = f"{self.since} evaluation{'s' if self.since > 1 else ''}"
        if not self._ranked:
            return f"no {self.what} was a number in {evaluations}"
        return f"no better {self.what} in {evaluations} since step {self._ranked[0][1]}"

    def result(self, run: Path) -> dict[str, Any]:
        """The fields of result.json, which name the checkpoint of the best step if the run directory holds it; rank 0
        calls it."""
        if not self._ranked:
            return {}
        score, step = self._ranked[0]
        path = f"{CHECKPOINTS}/{file_name(step)}"
        return {"best_step": step, "best_score": score, "best_checkpoint": path if (run / path).is_file() else None}


def best_of(config: Config, metric: Metric) -> Best:
    """The best of no evaluations yet, by what --best names. Raises ConfigError if that is no score of the run, or if it
    is not known which scores are better."""
    name, higher = config.best, metric.higher_is_better
    if name not in ("loss", metric.name):
        raise ConfigError(f"--best {name}: must be loss or {metric.name}, which the evaluations of this run have")
    if name != "loss" and not isinstance(higher, bool):
        raise ConfigError(
            f"--best {name}: --metric {config.metric} must say which scores are better, by an attribute "
            f"higher_is_better, True or False{'' if higher is None else f'; it is {higher!r:.40}'}"
        )
    what, calendar = f"{config.evaluated} {name}", Calendar(config)

    def due(step: int) -> bool:
        return calendar.due(step, last=False).evaluation

    return Best(name, what, name != "loss" and bool(higher), config.keep_best, config.patience, due)
