"""Contract test 3: every schedule, for all S, M up to 16 x 32, is complete, deadlock-free and as good as theory."""

from collections.abc import Iterator

import pytest

from mpiml.parallel.schedules import SCHEDULES, Action, gpipe, merged, of_stages, one_f_one_b, zb_h1
from mpiml.parallel.simulator import Deadlock, held, simulate

F, B = 1.0, 2.0  # times of a forward and of a backward pass; unequal, so that mixing them up shows
PARTS = [(3, 4, 2), (5, 3, 3), (1, 1, 1), (2, 2, 0)]  # times of F, I and W <= F, I
MOST_IN_FLIGHT = {
    "gpipe": lambda stages, stage, microbatches: microbatches,
    "1f1b": lambda stages, stage, microbatches: min(stages - stage, microbatches),
    "zb-h1": lambda stages, stage, microbatches: min(stages - stage, microbatches),
}


def check_order(actions: list[Action], microbatches: int) -> None:
    """Each micro-batch goes forward once and back once, after that; what writes gradients in micro-batch order."""
    place = {action: index for index, action in enumerate(actions)}
    kinds = {kind for kind, _ in actions}
    assert kinds in ({"F", "B"}, {"F", "I", "W"})
    assert sorted(actions) == sorted(Action(kind, m) for kind in kinds for m in range(microbatches))
    for kind in kinds - {"F"}:
        assert [m for each, m in actions if each == kind] == list(range(microbatches))
        assert all(place["F", m] < place[kind, m] for m in range(microbatches))
    if "W" in kinds:
        assert all(place["I", m] < place["W", m] for m in range(microbatches))


def most_in_flight(actions: list[Action]) -> int:
    """Counted by hand."""
    flight = most = 0
    for kind, _ in actions:
        flight += {"F": 1, "B": -1, "I": -1, "W": 0}[kind]
        most = max(most, flight)
    return most


@pytest.mark.parametrize("stages", range(1, 17))
@pytest.mark.parametrize("name", SCHEDULES)
def test_order_and_memory_of_a_schedule(name: str, stages: int) -> None:
    for microbatches in range(1, 33):
        for stage in range(stages):
            actions = list(SCHEDULES[name](stages, stage, microbatches))
            check_order(actions, microbatches)
            assert most_in_flight(actions) == MOST_IN_FLIGHT[name](stages, stage, microbatches)
            assert max(flight for flight, _ in held(actions)) == most_in_flight(actions)
            assert list(held(actions))[-1] == (0, 0)


@pytest.mark.parametrize("stages", range(1, 17))
@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
def test_whole_backward_passes_are_as_fast_as_theory(name: str, stages: int) -> None:
    for microbatches in range(1, 33):
        simulation = simulate(SCHEDULES[name], stages, microbatches, F, B)
        assert len(simulation.passes) == 2 * stages * microbatches
        assert simulation.makespan == (microbatches + stages - 1) * (F + B)
        assert simulation.bubble() == pytest.approx((stages - 1) / (microbatches + stages - 1))


@pytest.mark.parametrize("stages", range(1, 17))
def test_two_parts_are_as_fast_as_theory(stages: int) -> None:
    """Qi et al.: a stage is idle for (p - 1) (F + I - W), if there are as many micro-batches as stages. Of fewer, there
    are fewer W to do meanwhile."""
    for microbatches in range(1, 33):
        for forward, inputs, weights in PARTS:
            made = simulate(zb_h1, stages, microbatches, forward, inputs + weights, weights=weights)
            idle = (stages - 1) * (forward + inputs) - (min(microbatches, stages) - 1) * weights
            assert made.makespan == microbatches * (forward + inputs + weights) + idle


@pytest.mark.parametrize("stages", range(1, 17))
def test_two_parts_hold_no_more_micro_batches_than_there_are_stages(stages: int) -> None:
    for microbatches in range(1, 33):
        for stage in range(stages):
            most = max(sum(counts) for counts in held(zb_h1(stages, stage, microbatches)))
            assert most <= min(stages + 1, microbatches)


def test_waiting_for_w_is_counted_by_hand() -> None:
    """Stage 1 of 2: F0 I0 F1 I1 W0 W1."""
    assert list(held(zb_h1(2, 1, 2))) == [(1, 0), (0, 1), (1, 1), (0, 2), (0, 1), (0, 0)]


@pytest.mark.parametrize("splits", [(True, False, True), (False, True, False), (False, False, False)])
def test_stages_with_whole_backward_passes_among_others(splits: tuple[bool, ...]) -> None:
    schedule = of_stages(zb_h1, splits)
    kinds = [{kind for kind, _ in schedule(3, stage, 5)} for stage in range(3)]
    assert kinds == [{"F", "I", "W"} if one else {"F", "B"} for one in splits]
    made = simulate(schedule, 3, 5, 1, 2, weights=1)
    split, whole = (simulate(one, 3, 5, 1, 2, weights=1).makespan for one in (zb_h1, merged(zb_h1)))
    assert split <= made.makespan <= whole
    busy = [sum(one.end - one.begin for one in made.passes if one.stage == stage) for stage in range(3)]
    assert busy == [15, 15, 15]


def test_stages_and_messages_may_take_times_of_their_own() -> None:
    """Two stages, two micro-batches: by hand, F0 F1 [0] [1] on the first, F0 [0] F1 [1] on the second."""
    simulation = simulate(one_f_one_b, 2, 2, [1, 3], [2, 6], [10])
    ends = [(one.stage, str(one.action), one.end) for one in simulation.passes]
    assert [end for stage, _, end in ends if stage == 0] == [1, 2, 32, 41]
    assert [end for stage, _, end in ends if stage == 1] == [14, 20, 23, 29]


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_micro_batches(name: str, stages: int) -> None:
    simulation = simulate(SCHEDULES[name], stages, 0)
    assert (simulation.passes, simulation.makespan, simulation.bubble()) == ([], 0.0, 0.0)


def impatient(stages: int, stage: int, microbatches: int) -> Iterator[Action]:
    """The first stage wants each gradient before the next forward pass, the last one all forward passes first."""
    if stage:
        yield from gpipe(stages, stage, microbatches)
        return
    for m in range(microbatches):
        yield Action("F", m)
        yield Action("B", m)


def backwards_first(stages: int, stage: int, microbatches: int) -> Iterator[Action]:
    """A backward pass without its forward pass."""
    yield Action("B", 0)
    yield Action("F", 0)


def test_deadlock_names_what_each_stage_waits_for() -> None:
    with pytest.raises(Deadlock, match=r"^stage 0 at B0; stage 1 at F1$"):
        simulate(impatient, 2, 2)


def test_deadlock_of_one_stage() -> None:
    with pytest.raises(Deadlock, match=r"^stage 0 at B0$"):
        simulate(backwards_first, 1, 1)


def test_w_comes_after_i() -> None:
    with pytest.raises(Deadlock, match=r"^stage 0 at W0$"):
        simulate(lambda stages, stage, microbatches: iter([Action("F", 0), Action("W", 0), Action("I", 0)]), 1, 1)


def test_a_deadlock_needs_enough_micro_batches() -> None:
    assert simulate(impatient, 2, 1).makespan == 4


def test_times_of_single_actions() -> None:
    simulation = simulate(one_f_one_b, 2, 1, F, B)
    times = {(one.stage, one.action): (one.begin, one.end) for one in simulation.passes}
    forward, backward = Action("F", 0), Action("B", 0)
    assert times == {(0, forward): (0, 1), (1, forward): (1, 2), (1, backward): (2, 4), (0, backward): (4, 6)}
