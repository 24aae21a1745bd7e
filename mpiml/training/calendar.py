"""What is done after which step, and where rounds of workers end: a function of the settings; no MPI."""

from __future__ import annotations

from typing import NamedTuple

from mpiml.config import Config


class Due(NamedTuple):
    """What is to be done after a step, in this order: saving before an evaluation, which may fail."""

    log: bool = False
    save: bool = False
    evaluation: bool = False


class Calendar:
    """The steps of a run with resolved settings.

    Steps in which gradients are summed stand alone. From step `average_from` on, workers learn apart, in rounds of
    `average_every` steps, of which the last may be shorter. A run that is extended keeps its old last step as the end
    of a round.
    """

    def __init__(self, config: Config):
        self.config, self.steps = config, config.steps or 0
        self._every, self._from = config.average_every, max(config.average_from, 1)
        self._ends = [*config.averaged_at, self.steps]

    def apart(self, step: int) -> bool:
        """Whether workers learn apart in a step."""
        return bool(self._every) and step >= self._from

    def round_of(self, step: int) -> range:
        """The steps of the round that a step is in; the step alone if gradients are summed in it."""
        if not self.apart(step):
            return range(step, step + 1)
        first = step - (step - self._from) % self._every
        last = min([first + self._every - 1, *(end for end in self._ends if end >= step)])
        return range(max([first, *(end + 1 for end in self._ends if end < step)]), last + 1)

    def common(self, step: int) -> int:
        """The last step, up to this one, after which all have one model: within a round, the last before it."""
        steps = self.round_of(step)
        return step if step == steps[-1] else steps[0] - 1

    def due(self, step: int, last: bool = True) -> Due:
        """What is to be done after a step; saving and evaluating wait for the end of a round.

        After the last step, whatever a run does now and then is done once more, unless `last` is False.
        """
        steps, config = self.round_of(step), self.config
        done = last and step == self.steps

        def passed(every: int, before: int) -> bool:
            return every > 0 and (done or step // every > before // every)

        ends = step == steps[-1]
        saved, scored = (ends and passed(every, steps[0] - 1) for every in (config.save_every, config.eval_every))
        return Due(passed(config.log_every, step - 1), saved, scored)
