"""The parts of the campaign, and how they share its time."""

from dataclasses import dataclass

from tests.chaos import exits, faults, kills, mutants, pairs, power, signals
from tests.chaos.campaign import Cases


@dataclass(frozen=True)
class Part:
    """A space of trials and its share of the time; of these, so many are tried by `make test`."""

    cases: Cases
    share: float
    sample: int


PARTS = {
    "kills": Part(kills.cases, 2.5, 2),
    "signals": Part(signals.cases, 2.0, 4),
    "faults": Part(faults.cases, 3.0, 8),
    "power": Part(power.cases, 2.5, 24),
    "mutants": Part(mutants.cases, 1.5, 330),
    "pairs": Part(pairs.cases, 1.0, 3),
    "exits": Part(exits.cases, 2.5, 6),
}
