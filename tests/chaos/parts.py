"""The parts of the campaign, and how they share its time."""

from dataclasses import dataclass

from tests.chaos import exits, faults, kills, mutants, pairs, power, signals
from tests.chaos.campaign import Cases


@dataclass(frozen=True)
class Part:
    """A space of trials, its share of the time, how many of them `make test` tries, and what they are."""

    cases: Cases
    share: float
    sample: int
    text: str


PARTS = {
    "kills": Part(kills.cases, 2.5, 2, "ranks and launchers killed at any moment; resumed on other layouts"),
    "workers": Part(kills.of_workers, 1.5, 1, "the same of runs of workers, which are asked to stop within rounds too"),
    "signals": Part(signals.cases, 2.0, 4, "signals that ask for a save, and ranks that are stopped, at any moment"),
    "faults": Part(faults.cases, 3.0, 8, "each call on the run directory fails: disk full, read-only, I/O error"),
    "power": Part(power.cases, 2.5, 24, "states of the disk after a kill or a power failure"),
    "mutants": Part(mutants.cases, 1.5, 330, "checkpoints with a bit flipped, cut short, damaged, forged"),
    "pairs": Part(pairs.cases, 1.0, 3, "two and three jobs on one directory at once"),
    "exits": Part(exits.cases, 2.5, 6, "every way out, in every phase, on the first and on the last rank"),
    "loop": Part(exits.own_cases, 1.5, 6, "every way out of a loop of one's own, in every phase"),
}
