"""Learning rates at points worked out by hand, and of runs that were extended against one decay after the other."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from mpiml.errors import ConfigError
from mpiml.nn.rates import DECAYS, Phase, history, learning_rate


def falling(peak: float, warmup: int, decay: str, decay_steps: int, floor: float = 0.0) -> Callable[[int], float]:
    return learning_rate([Phase(decay_steps, peak, floor, decay_steps)], warmup, DECAYS[decay])


every_decay = pytest.mark.parametrize("decay", DECAYS)


@every_decay
def test_warm_up_is_a_line_to_the_peak(decay: str) -> None:
    rate = falling(0.8, 4, decay, 100, floor=0.7)
    assert [rate(step) for step in (1, 2, 3, 4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize(
    ("decay", "points"),
    [
        ("none", {1: 2.0, 5: 2.0, 10**6: 2.0}),
        ("linear", {1: 2 - 1 / 6, 3: 1.5, 6: 1.0, 12: 0.0, 13: 0.0, 99: 0.0}),
        # Half a cosine: cos 60 = 1/2, cos 90 = 0, cos 120 = -1/2, cos 180 = -1.
        ("cosine", {4: 1.5, 6: 1.0, 8: 0.5, 12: 0.0, 13: 0.0, 99: 0.0}),
        ("step", {1: 2.0, 3: 2.0, 4: 0.2, 7: 0.2, 8: 0.02, 12: 0.02, 99: 0.02}),
    ],
)
@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_decay(decay: str, points: dict[int, float], floor: float) -> None:
    rate = falling(2.0, 0, decay, 12, floor)
    expected = {step: floor + (2.0 - floor) * value / 2.0 for step, value in points.items()}
    assert {step: rate(step) for step in points} == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize("floor", [0.0, 0.1, 2.0])
def test_the_floor_is_reached_exactly(decay: str, floor: float) -> None:
    assert falling(2.0, 3, decay, 12, floor)(12) == floor


@pytest.mark.parametrize(
    ("decay", "half_way", "end"), [("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("step", 0.1, 0.01), ("none", 1.0, 1.0)]
)
def test_decay_counts_from_the_end_of_warm_up(decay: str, half_way: float, end: float) -> None:
    rate = falling(1.0, 10, decay, 30)
    assert [rate(10), rate(20), rate(30)] == pytest.approx([1.0, half_way, end])


def test_factor_is_of_steps_counted_from_where_its_decay_begins() -> None:
    """And of none after its last; with a warm-up that is longer, of the last alone."""
    calls = []

    def factor(step: int, steps: int) -> float:
        calls.append((step, steps))
        return 1.0

    phases = [Phase(6, 1.0, 0.0, 5), Phase(9, 1.0, 0.0, 8)]
    for step in range(1, 11):
        learning_rate(phases, 2, factor)(step)
    assert calls == [(1, 3), (2, 3), (3, 3), (3, 3), (1, 2), (2, 2), (2, 2), (2, 2)]
    calls.clear()
    learning_rate(phases[:1], 9, factor)(10)
    assert calls == [(1, 1)]


@every_decay
@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_rate_never_rises_after_warm_up_nor_leaves_its_range(decay: str, floor: float) -> None:
    rate = falling(1.0, 3, decay, 50, floor)
    rates = [rate(step) for step in range(3, 80)]
    assert rates == sorted(rates, reverse=True)
    assert floor <= rates[-1] <= rates[0] == 1


@pytest.mark.parametrize("warmup", [10, 20])
def test_warm_up_as_long_as_the_run_or_longer(warmup: int) -> None:
    rate = falling(1.0, warmup, "cosine", 10)
    assert [rate(10), rate(warmup), rate(warmup + 1)] == pytest.approx([10 / warmup, 1, 0])


def test_phases_follow_each_other_without_another_warm_up() -> None:
    """The first ends before its decay does, the second long after it."""
    phases = [Phase(10, 1.0, 0.0, 14), Phase(30, 0.5, 0.1, 18), Phase(50, 2.0, 0.0, 50)]

    def expected(step: int) -> float:
        if step <= 4:
            return step / 4
        if step <= 10:
            return (1 + math.cos(math.pi * (step - 4) / 10)) / 2
        if step <= 30:
            return 0.1 + 0.4 * (1 + math.cos(math.pi * min((step - 10) / 8, 1))) / 2
        return 1 + math.cos(math.pi * min((step - 30) / 20, 1))

    rate = learning_rate(phases, 4, DECAYS["cosine"])
    assert [rate(step) for step in range(1, 61)] == pytest.approx([expected(step) for step in range(1, 61)], abs=1e-15)


def test_a_phase_that_ends_in_the_warm_up_has_none_after_it() -> None:
    rate = learning_rate([Phase(2, 1.0, 0.0, 20), Phase(12, 1.0, 0.0, 12)], 4, DECAYS["linear"])
    assert [rate(step) for step in (1, 2, 3, 12)] == pytest.approx([0.25, 0.5, 0.9, 0.0])


def test_phases_are_texts_and_back() -> None:
    phases = [Phase(36, 0.1 + 0.2, 0.0, 36), Phase(72, 1e-05, 1e-22, 108), Phase(10**17, 1e22, 2.0, 10**16)]
    assert str(phases[1]) == "until=72 lr=1e-05 lr-floor=1e-22 decay-steps=108"
    assert history(list(map(str, phases))) == phases
    assert history([]) == []


GOOD = "until=36 lr=0.1 lr-floor=0.0 decay-steps=36"


@pytest.mark.parametrize(
    "texts",
    [
        ["lr=0.1"],
        [GOOD + " "],
        [GOOD.replace("36", "0", 1)],
        [GOOD.replace("36", "3.5", 1)],
        [GOOD.replace("36", "\u0663", 1)],
        [GOOD.replace("36", "9" * 5000, 1)],
        [GOOD.replace("=36", "=-36")],
        [GOOD.replace("lr=0.1", "lr=nan")],
        [GOOD.replace("lr=0.1", "lr=1e999")],
        [GOOD.replace("lr=0.1", "lr=-1")],
        [GOOD.replace("lr=0.1", "lr=1e")],
        [GOOD.replace("lr=0.1", "lr=1.1.1")],
        [GOOD.replace("floor=0.0", "floor=0.2")],
        [GOOD, GOOD],
        [GOOD, GOOD.replace("until=36", "until=40")],
        [GOOD, GOOD.replace("steps=36", "steps=40")],
        [GOOD, GOOD.replace("36", "72"), GOOD.replace("36", "50")],
        [GOOD + "\n" + GOOD],
    ],
)
def test_texts_that_are_no_history_are_one_line(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^--lr-history .*(until=36 lr=0.001|must be later ones)") as error:
        history(texts)
    assert len(str(error.value)) < 300
