"""Which micro-batches, workers and replicas fit together, what is said of those that do not, and who is idle;
which settings of workers a run may have, and which it keeps."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from mpiml.config import Config, parse
from mpiml.errors import ConfigError
from mpiml.training.resolve import resolve
from mpiml.training.saved import resumed
from mpiml.training.sharing import busy, grid_text, idle_text, shared_out, workers_text


def shared(replicas: int, rows: int = 1000, **settings: Any) -> tuple[int, int | None]:
    return shared_out(Config(**settings), rows, replicas)


@pytest.mark.parametrize(
    ("replicas", "settings", "expected"),
    [
        (4, {}, (4, None)),
        (2, {"pipe": 3}, (12, None)),
        (2, {"pipe": 3, "rows": 7}, (7, None)),
        (4, {"average_every": 5}, (4, 4)),
        (4, {"average_every": 5, "workers": 2}, (4, 2)),
        (4, {"average_every": 5, "workers": 8}, (8, 8)),
        (1, {"average_every": 5, "workers": 3, "microbatches": 12}, (12, 3)),
        (6, {"average_every": 5, "workers": 3, "microbatches": 6}, (6, 3)),
        (1, {"average_every": 5, "workers": 6, "pipe": 2, "rows": 20}, (18, 6)),  # equally many each
        (1, {"average_every": 5, "workers": 6, "pipe": 2, "rows": 6}, (6, 6)),
        (4, {"leaf": 6}, (24, None)),  # a leaf each
        (2, {"leaf": 3, "pipe": 3}, (12, None)),
        (2, {"leaf": 5, "pipe": 3}, (10, None)),  # of twelve
        (4, {"leaf": 6, "microbatches": 48}, (48, None)),
        (2, {"leaf": 3, "average_every": 5, "workers": 4}, (12, 4)),
    ],
)
def test_what_fits(replicas: int, settings: dict[str, Any], expected: tuple[int, int | None]) -> None:
    assert shared(replicas, **settings) == expected


@pytest.mark.parametrize(
    ("replicas", "settings", "text"),
    [
        (4, {"workers": 6}, "--workers 6: 4 replicas cannot share them; 3 could"),
        (3, {"workers": 2}, "--workers 2: 3 replicas cannot share them; 2 could"),
        (2, {"workers": 2000}, "--workers 2000: the data set has only 1000 rows to share out"),
        (2, {"workers": 8, "pipe": 2, "rows": 6}, "--workers 8: the data set has only 6 rows to share out"),
        (
            4,
            {"workers": 8, "microbatches": 12},
            "--workers 8 --microbatches 12: workers need equally many micro-batches each; "
            "--workers 6 or 12 or --microbatches 8 or "
            "--microbatches 16 would work",
        ),
        (
            1,
            {"workers": 4, "microbatches": 3},
            "--workers 4 --microbatches 3: workers need equally many micro-batches each; "
            "--workers 3 or --microbatches 4 would work",
        ),
        (
            1,
            {"workers": 4, "microbatches": 7, "rows": 7},
            "--workers 4 --microbatches 7: workers need equally many micro-batches each; "
            "--workers 1 or 7 or --microbatches 4 would "
            "work",
        ),
        (
            4,
            {"workers": 1, "microbatches": 3},
            "--microbatches 3: 4 replicas need at least one each; at least 4, or fewer replicas (--pipe 2, say)",
        ),
        (
            2,
            {"workers": 2, "leaf": 4, "microbatches": 12},
            "--workers 2 --leaf 4 --microbatches 12: leaves need 4 micro-batches each, and workers equally many leaves "
            "each; --workers 1 or 3 or --leaf 3 or 6 or --microbatches 8 or --microbatches 16 would work",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_with_what_would(replicas: int, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        shared(replicas, average_every=5, **settings)
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("replicas", "settings", "text"),
    [
        (
            2,
            {"leaf": 4, "microbatches": 10},
            "--leaf 4 --microbatches 10: leaves need 4 micro-batches each; "
            "--leaf 2 or 5 or --microbatches 8 or --microbatches 12 would work",
        ),
        (
            4,
            {"leaf": 16, "microbatches": 10},
            "--leaf 16 --microbatches 10: leaves need 16 micro-batches each; --leaf 2 or --microbatches 64 would work",
        ),
        (
            4,
            {"leaf": 16, "microbatches": 3, "rows": 9},
            "--leaf 16 --microbatches 3: leaves need 16 micro-batches each; "
            "the data set has too few rows for 4 replicas",
        ),
        (
            4,
            {"leaf": 4, "microbatches": 8},
            "--microbatches 8 --leaf 4: 4 replicas need at least one leaf each; "
            "at least 16, --leaf 2, or fewer replicas (--pipe 2, say)",
        ),
        (
            4,
            {"leaf": 6, "microbatches": 18, "pipe": 3},
            "--microbatches 18 --leaf 6: 4 replicas need at least one leaf each; "
            "at least 24, --leaf 3, or fewer replicas (--pipe 4, say)",
        ),
        (
            4,
            {"leaf": 6, "rows": 20},
            "--microbatches 24 --leaf 6: the data set has only 20 rows to share out; --leaf 5 would work",
        ),
        (
            4,
            {"leaf": 6, "microbatches": 24, "rows": 20},
            "--microbatches 24 --leaf 6: the data set has only 20 rows to share out",
        ),
    ],
)
def test_leaves_that_do_not_fit_are_one_line_with_what_would(
    replicas: int, settings: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError) as error:
        shared(replicas, **settings)
    assert str(error.value) == text


def test_what_is_said_to_work_with_leaves_works() -> None:
    for replicas, workers, leaf in itertools.product((1, 2, 3, 4), (1, 2, 4, 6), (2, 3, 5)):
        for microbatches in range(1, 32) if not (workers % replicas and replicas % workers) else ():
            settings = {"average_every": 5, "workers": workers, "microbatches": microbatches, "leaf": leaf}
            try:
                assert shared(replicas, **settings) == (microbatches, workers)
                assert microbatches % (workers * leaf) == 0
                continue
            except ConfigError as error:
                said = str(error)
            if "would work" not in said:
                assert microbatches // leaf < replicas
                continue
            for name, *values in re.findall(r"(microbatches|workers|leaf) (\d+)(?: or (\d+))?", said.split(";")[1]):
                for value in filter(None, values):
                    config = Config(**settings | {name: int(value)})
                    assert shared_out(config, 1000, busy(config, None, replicas))


def test_what_is_said_to_work_works() -> None:
    for replicas in range(1, 9):
        for workers in (w for w in range(1, 17) if not (w % replicas and replicas % w)):
            for microbatches in range(replicas, 33):
                settings = {"average_every": 5, "workers": workers, "microbatches": microbatches}
                if not microbatches % workers:
                    assert shared(replicas, **settings) == (microbatches, workers)
                    continue
                with pytest.raises(ConfigError) as error:
                    shared(replicas, **settings)
                ways = re.findall(r"(microbatches|workers) (\d+)(?: or (\d+))?", str(error.value).split(";")[1])
                assert {way[0] for way in ways} == {"workers", "microbatches"}
                for way in ways:
                    for number in filter(None, way[1:]):
                        config = Config(**settings | {way[0]: int(number)})
                        assert shared_out(config, 1000, busy(config, None, replicas))


@pytest.mark.parametrize(
    ("ranks", "settings", "expected"),
    [
        (8, {}, 8),
        (8, {"average_every": 5}, 8),
        (8, {"average_every": 5, "workers": 4}, 8),
        (8, {"average_every": 5, "workers": 3}, 6),
        (7, {"average_every": 5, "workers": 4}, 4),
        (5, {"average_every": 5, "workers": 12}, 4),
        (8, {"average_every": 5, "workers": 3, "pipe": 2}, 6),
        (8, {"workers": 3}, 8),  # which is refused elsewhere
    ],
)
def test_how_many_ranks_have_work(ranks: int, settings: dict[str, Any], expected: int) -> None:
    config = Config(**settings)
    assert busy(config, None, ranks) == expected
    replicas = busy(config, None, ranks) // config.pipe
    if config.average_every:
        assert shared_out(config, 1000, replicas)


def test_a_run_that_goes_on_has_no_more_replicas_than_micro_batches() -> None:
    config = Config(average_every=5, workers=4, microbatches=4)
    assert busy(config, config, 16) == 4
    assert busy(config, None, 16) == 16
    assert busy(config.replace(average_every=0, workers=None), config, 16) == 4


def test_a_run_that_goes_on_has_no_more_replicas_than_leaves() -> None:
    config = Config(microbatches=24, leaf=4)
    assert (busy(config, config, 16), busy(config, None, 16)) == (6, 16)


def test_lines_on_a_grid_and_on_ranks_without_work() -> None:
    assert grid_text(2, 4, 8, 4) == (
        "8 ranks = 2 stages x 4 replicas; same bits on any grid: --workers 4 --microbatches 8"
    )
    assert "--workers" not in grid_text(2, 4, 8)
    assert idle_text(6, 2, 12, 3) == [
        "8 ranks, but --workers 3 and --microbatches 12 of the run keep 6 busy: 2 ranks idle"
    ]
    assert idle_text(8, 0, 12, 3) == []
    assert grid_text(1, 4, 24, None, 6) == (
        "4 ranks = 1 stage x 4 replicas; same bits on any grid: --leaf 6 --microbatches 24"
    )
    assert "(--microbatches 12 would need the fewest" in grid_text(1, 2, 18, None, 6)
    assert idle_text(6, 2, 24, None, 4) == [
        "8 ranks, but --leaf 4 and --microbatches 24 of the run keep 6 busy: 2 ranks idle"
    ]


WORKERS = [
    ("workers", 4, "4", "is of workers, of which there are none; give --average-every too"),
    ("average_from", 5, "5", "is of workers, of which there are none; give --average-every too"),
    ("outer_lr", 0.7, "0.7", "is of workers, of which there are none; give --average-every too"),
    ("outer_momentum", 0.9, "0.9", "is of workers, of which there are none; give --average-every too"),
    ("averaged_at", (5,), "5", "is of workers, of which there are none; give --average-every too"),
]


@pytest.mark.parametrize(("name", "value", "said", "problem"), WORKERS)
def test_settings_of_workers_need_workers(tmp_path: Path, name: str, value: Any, said: str, problem: str) -> None:
    """However they are given."""
    flag = "--" + name.replace("_", "-")
    file = tmp_path / "settings.toml"
    file.write_text(f"{name} = {list(value) if isinstance(value, tuple) else value}\n")
    for config in (Config(**{name: value}), parse([flag, said]), parse(["--config", str(file)])):
        with pytest.raises(ConfigError) as error:
            resolve(config, 1000, True, 4)
        assert str(error.value) == f"{flag} {said}: {problem}"
        assert resolve(config.replace(average_every=8), 1000, True, 4).workers == 4


def test_the_noise_scale_is_of_summed_gradients() -> None:
    with pytest.raises(ConfigError, match=r"^--noise-scale --average-every 8: is measured where gradients are summed"):
        resolve(Config(noise_scale=True, average_every=8, microbatches=4), 1000, True, 4)


def test_workers_are_kept_and_another_number_must_be_said() -> None:
    before = resolve(Config(average_every=8, out="a", steps=20, microbatches=12, workers=4), 1000, True, 1)
    for asked, workers in ({}, 4), ({"workers": 6}, 6), ({"workers": 4}, 4):
        after = resolve(resumed(Config(resume=True, out="a", **asked), before), 1000, True, 2, before)
        assert (after.workers, after.microbatches, after.averaged_at) == (workers, 12, ())
    with pytest.raises(ConfigError, match=r"^--workers 8 --microbatches 12: .* each; --workers 6 or 12 would work$"):
        resolve(resumed(Config(resume=True, out="a", workers=8), before), 1000, True, 2, before)


def test_a_run_without_workers_goes_on_without() -> None:
    before = resolve(Config(out="a", steps=20), 1000, True, 1)
    with pytest.raises(ConfigError, match=r"^--workers 4: the run in a has none, and another value would change"):
        resumed(Config(resume=True, out="a", workers=4), before)


@pytest.mark.parametrize(
    "changed", [{"average_every": 4}, {"average_from": 9}, {"outer_lr": 0.5}, {"averaged_at": (3,)}]
)
def test_rounds_of_a_run_stay_what_they_are(changed: dict[str, Any]) -> None:
    before = resolve(Config(average_every=8, out="a", steps=20), 1000, True, 1)
    (name,) = changed
    with pytest.raises(
        ConfigError, match=rf"^--{name.replace('_', '-')} .*: the run in a has .* would change its results"
    ):
        resumed(Config(resume=True, out="a", **changed), before)


def test_a_longer_run_keeps_its_old_last_step_as_the_end_of_a_round() -> None:
    """Each time, if it was given more steps; what it was to have but never had does not count."""
    run = resolve(Config(average_every=8, out="a", steps=20), 1000, True, 1)
    for steps, ends in (
        (30, (20,)),
        (50, (20, 30)),
        (40, (20, 30)),
        (45, (20, 30, 40)),
        (25, (20, 30, 40)),
        (60, (20, 25)),
    ):
        run = resolve(resumed(Config(resume=True, out="a", steps=steps), run), 1000, True, 1, run)
        assert run.averaged_at == ends


@pytest.mark.parametrize(
    ("replicas", "microbatches", "workers", "fewest"),
    [(2, 6, None, 4), (2, 6, 6, None), (4, 12, 4, None), (8, 24, 4, 16), (6, 18, 3, 12), (4, 16, 2, None)],
)
def test_fewest_messages_are_those_of_each_workers_own_sum(
    replicas: int, microbatches: int, workers: int | None, fewest: int | None
) -> None:
    text = grid_text(1, replicas, microbatches, workers)
    assert (f"(--microbatches {fewest} would need the fewest messages on this one)" in text) == (fewest is not None)
    assert ("fewest" in text) == (fewest is not None)


@pytest.mark.parametrize(
    ("replicas", "settings", "line"),
    [
        (4, {}, "4 workers: learning apart from step 1 on, averaged every 8 steps"),
        (
            2,
            {"average_every": 1, "optimizer": "sgd"},
            "4 workers, 2 to a replica: learning apart from step 1 on, averaged every step",
        ),
        (
            8,
            {"average_from": 5, "outer_lr": 0.7},
            "4 workers of 2 replicas: learning apart from step 5 on, averaged every 8 steps by an outer step, "
            "rate 0.7, momentum 0",
        ),
        (4, {"average_every": 3}, "4 workers: learning apart from step 1 on, averaged every 3 steps"),
        (
            4,
            {"average_every": 2},
            "4 workers: learning apart from step 1 on, averaged every 2 steps; that sends more than a sum at every "
            "step, which --average-every 3 does not",
        ),
        (
            4,
            {"average_every": 1, "optimizer": "momentum", "outer_lr": 0.5, "ema": 0.9},
            "4 workers: learning apart from step 1 on, averaged every step by an outer step, rate 0.5, momentum 0; "
            "that sends more than a sum at every step, which --average-every 4 does not",
        ),
        (1, {"average_every": 2}, "4 workers, 4 to a replica: learning apart from step 1 on, averaged every 2 steps"),
    ],
)
def test_a_run_says_how_many_learn_apart_and_when_they_meet(replicas: int, settings: Any, line: str) -> None:
    assert workers_text(Config(**{"average_every": 8, "workers": 4} | settings), replicas) == [line]


def test_without_workers_nothing_is_said_of_them() -> None:
    assert not workers_text(Config(), 4)
