"""Contract test 3: every schedule, for all S, M up to 16 x 32, is complete, deadlock-free and as good as theory."""

from collections.abc import Iterator

import pytest

from mpiml.parallel.schedules import SCHEDULES, Action, gpipe, one_f_one_b
from mpiml.parallel.simulator import Deadlock, simulate
from tests.parallel.picture import draw

F, B = 1.0, 2.0  # times of a forward and of a backward pass; unequal, so that mixing them up shows
MOST_IN_FLIGHT = {
    "gpipe": lambda stages, stage, microbatches: microbatches,
    "1f1b": lambda stages, stage, microbatches: min(stages - stage, microbatches),
}


def check_order(actions: list[Action], microbatches: int) -> None:
    """Each micro-batch goes forward once and back once, after that; backward in micro-batch order."""
    forward = [m for kind, m in actions if kind == "F"]
    backward = [m for kind, m in actions if kind == "B"]
    assert sorted(forward) == list(range(microbatches))
    assert backward == list(range(microbatches))
    for m in range(microbatches):
        assert actions.index(Action("F", m)) < actions.index(Action("B", m))


def peak(actions: list[Action]) -> int:
    """Most micro-batches in flight, counted by hand."""
    flight = most = 0
    for kind, _ in actions:
        flight += 1 if kind == "F" else -1
        most = max(most, flight)
    return most


@pytest.mark.parametrize("stages", range(1, 17))
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_as_good_as_theory(name: str, stages: int) -> None:
    schedule = SCHEDULES[name]
    for microbatches in range(1, 33):
        for stage in range(stages):
            actions = list(schedule(stages, stage, microbatches))
            check_order(actions, microbatches)
            assert peak(actions) == MOST_IN_FLIGHT[name](stages, stage, microbatches)
        simulation = simulate(schedule, stages, microbatches, F, B)
        assert len(simulation.passes) == 2 * stages * microbatches
        assert simulation.makespan == (microbatches + stages - 1) * (F + B)
        assert simulation.in_flight == [MOST_IN_FLIGHT[name](stages, s, microbatches) for s in range(stages)]
        assert simulation.bubble() == pytest.approx((stages - 1) / (microbatches + stages - 1))


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


def test_a_deadlock_needs_enough_micro_batches() -> None:
    assert simulate(impatient, 2, 1).makespan == 4


def test_times_of_single_actions() -> None:
    simulation = simulate(one_f_one_b, 2, 1, F, B)
    times = {(one.stage, one.action): (one.begin, one.end) for one in simulation.passes}
    forward, backward = Action("F", 0), Action("B", 0)
    assert times == {(0, forward): (0, 1), (1, forward): (1, 2), (1, backward): (2, 4), (0, backward): (4, 6)}


PICTURES = {
    "gpipe": """\
stage 0  0   1   2   .   .   [0] [1] [2]
stage 1  .   0   1   2   [0] [1] [2] .""",
    "1f1b": """\
stage 0  0   1   .   [0] 2   [1] .   [2]
stage 1  .   0   [0] 1   [1] 2   [2] .""",
}


@pytest.mark.parametrize("name", PICTURES)
def test_picture(name: str) -> None:
    assert draw(simulate(SCHEDULES[name], 2, 3)) == PICTURES[name]


def test_picture_of_a_longer_backward_pass() -> None:
    assert draw(simulate(gpipe, 1, 2, 1, 2)) == "stage 0  0   1   [0] [0] [1] [1]"
