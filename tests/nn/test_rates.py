"""Learning rates at points worked out by hand."""

import pytest

from mpiml.nn.rates import learning_rate


@pytest.mark.parametrize("decay", ["none", "cosine", "step"])
def test_warm_up_is_a_line_to_the_peak(decay: str) -> None:
    rate = learning_rate(0.8, warmup=4, decay=decay, decay_steps=100)
    assert [rate(step) for step in (1, 2, 3, 4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize(
    ("decay", "points"),
    [
        ("none", {1: 2.0, 5: 2.0, 10**6: 2.0}),
        # Half a cosine: cos 60 = 1/2, cos 90 = 0, cos 120 = -1/2, cos 180 = -1.
        ("cosine", {4: 1.5, 6: 1.0, 8: 0.5, 12: 0.0, 13: 0.0, 99: 0.0}),
        ("step", {1: 2.0, 3: 2.0, 4: 0.2, 7: 0.2, 8: 0.02, 12: 0.02, 99: 0.02}),
    ],
)
def test_decay(decay: str, points: dict[int, float]) -> None:
    rate = learning_rate(2.0, warmup=0, decay=decay, decay_steps=12)
    assert {step: rate(step) for step in points} == pytest.approx(points)


@pytest.mark.parametrize(("decay", "half_way", "end"), [("cosine", 0.5, 0.0), ("step", 0.1, 0.01), ("none", 1.0, 1.0)])
def test_decay_counts_from_the_end_of_warm_up(decay: str, half_way: float, end: float) -> None:
    rate = learning_rate(1.0, warmup=10, decay=decay, decay_steps=30)
    assert [rate(10), rate(20), rate(30)] == pytest.approx([1.0, half_way, end])


@pytest.mark.parametrize("decay", ["none", "cosine", "step"])
def test_rate_never_rises_after_warm_up_nor_leaves_its_range(decay: str) -> None:
    rate = learning_rate(1.0, warmup=3, decay=decay, decay_steps=50)
    rates = [rate(step) for step in range(3, 80)]
    assert rates == sorted(rates, reverse=True)
    assert 0 <= rates[-1] <= rates[0] == 1


@pytest.mark.parametrize("warmup", [10, 20])
def test_warm_up_as_long_as_the_run_or_longer(warmup: int) -> None:
    rate = learning_rate(1.0, warmup=warmup, decay="cosine", decay_steps=10)
    assert [rate(10), rate(warmup), rate(warmup + 1)] == pytest.approx([10 / warmup, 1, 0])
