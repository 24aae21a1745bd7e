"""A schedule as text."""

from mpiml.parallel.schedules import of_stages, one_f_one_b, zb_h1
from mpiml.plan.drawing import draw


def test_two_parts() -> None:
    assert (
        draw(zb_h1, 2, 2)
        == """\
0F0 0F1 .   0I0 0W0 0I1 0W1
.   1F0 1I0 1F1 1I1 1W0 1W1

idle for 14% of the time, if F, I and W take equally long, and B twice as long"""
    )


def test_a_stage_that_does_not_split() -> None:
    """Its backward passes take two units."""
    assert draw(of_stages(zb_h1, (True, False)), 2, 1).splitlines()[:2] == [
        "0F0 .   .   .   0I0 0W0",
        ".   1F0 1B0 1B0 .   .",
    ]


def test_long_lines_are_cut_in_parts_below_each_other() -> None:
    *parts, idle = draw(one_f_one_b, 2, 20).split("\n\n")
    lines = [part.splitlines() for part in parts]
    assert [len(part) for part in lines] == [2, 2, 2]
    assert max(len(line) for part in lines for line in part) <= 120
    whole = [" ".join(part[stage] for part in lines).split() for stage in (0, 1)]
    assert [len(line) for line in whole] == [63, 63]  # 3 x 21
    assert whole[1][-3:] == ["1B19", ".", "."]
    assert idle.startswith("idle for 5%")


def test_no_micro_batches() -> None:
    assert draw(zb_h1, 2, 0).startswith("idle for 0%")
