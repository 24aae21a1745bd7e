"""A learning rate that falls, where a run goes on for more steps than it was to fall over; labels that are ignored."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.config import Config
from mpiml.data.dataset import Dataset, Split
from mpiml.data.shards import Shards
from mpiml.data.sources import ArraySource
from mpiml.errors import ConfigError, DataError
from mpiml.nn.rates import Phase
from mpiml.training.resolve import absolute, check_rows, phases_of, resolve, with_labels
from mpiml.training.saved import resumed

BEFORE = Config(decay="cosine", steps=20, decay_steps=20, lr=0.1, out="a", microbatches=1)


def gone_on(before: Config = BEFORE, **asked: Any) -> Config:
    """What a run of 50 rows in steps of 128 goes on with."""
    after = resumed(Config(resume=True, out="a", **asked), before)
    return resolve(after, 50, True, 1, before)


@pytest.mark.parametrize("more", [{"steps": 40}, {"epochs": 40}])
@pytest.mark.parametrize(
    ("settings", "low"),
    [
        ({}, "to 0"),
        ({"decay": "linear"}, "to 0"),
        ({"decay": "linear", "lr_floor": 0.02}, "to 0.02"),
        ({"decay": "step"}, "to 0.001"),
        ({"decay": "own:fall"}, "as own:fall says"),
    ],
)
def test_more_steps_than_it_falls_over_are_refused_with_what_would_work(settings: Any, low: str, more: Any) -> None:
    before = BEFORE.replace(**settings)
    with pytest.raises(ConfigError, match=rf"^40 steps: .* run in a has fallen {low} by step 20;") as error:
        gone_on(before, **more)
    assert "--decay-steps 40" in str(error.value)
    for other in ({"lr": 0.05}, {"lr_floor": 0.01}):
        with pytest.raises(ConfigError, match="40 steps"):  # of 0 it would be 0 all the same
            gone_on(before, **more, **other)
        with pytest.raises(ConfigError, match=r"^--lr.*: by --decay-steps 20 the learning rate stays"):
            gone_on(before, **more, **other, decay_steps=20)
    stays = gone_on(before, **more, decay_steps=20)  # said, so that it is meant
    assert (stays.decay_steps, stays.lr_history) == (20, ())


def test_what_was_asked_for_before_goes_on_as_it_was_and_the_rate_falls_anew_after_it() -> None:
    """As often as it is extended; what is not said stays."""
    once = gone_on(steps=40, decay_steps=40, lr=0.05)
    assert phases_of(once) == [(20, 0.1, 0.0, 20), (40, 0.05, 0.0, 40)]
    assert once.lr_history == ("until=20 lr=0.1 lr-floor=0.0 decay-steps=20",)
    twice = gone_on(once, epochs=60, decay_steps=50, lr_floor=0.01)
    assert phases_of(twice) == [*phases_of(once), (60, 0.05, 0.01, 50)]
    stays = gone_on(twice, steps=70, decay_steps=50)
    assert phases_of(stays) == [*phases_of(once), (70, 0.05, 0.01, 50)]
    again = gone_on(stays, steps=90, decay_steps=100)
    assert phases_of(again) == [*phases_of(stays), (90, 0.05, 0.01, 100)]
    assert phases_of(gone_on(again, steps=95)) == [*phases_of(stays), (95, 0.05, 0.01, 100)]
    with pytest.raises(ConfigError, match=r"^101 steps"):
        gone_on(again, steps=101)


@pytest.mark.parametrize(("scaling", "factor"), [("linear", 4.0), ("sqrt", 2.0)])
def test_a_rate_that_is_scaled_by_the_batch_stays_so(scaling: str, factor: float) -> None:
    """--lr is of the base batch in all that is stored, so it is not scaled again when the run goes on; and so is the
    --lr with which it is extended."""
    asked = BEFORE.replace(lr_scaling=scaling, base_batch=32, lr_floor=0.02)
    before = resolve(asked, 50, True, 1)
    assert (before.lr, before.lr_floor) == (0.1, 0.02)
    first = (20, factor * 0.1, factor * 0.02, 20)
    assert phases_of(before) == phases_of(gone_on(before)) == [first]
    assert phases_of(gone_on(before, lr_scaling=scaling)) == [first]
    with pytest.raises(ConfigError, match=rf"has fallen to {factor * 0.02:g} by step 20"):
        gone_on(before, steps=40)
    once = gone_on(before, steps=40, decay_steps=40, lr=0.05)
    assert once.lr_history == ("until=20 lr=0.1 lr-floor=0.02 decay-steps=20",)
    assert phases_of(once) == [first, (40, factor * 0.05, factor * 0.02, 40)]
    for other in ({"lr_scaling": "sqrt" if scaling == "linear" else "linear"}, {"base_batch": 64}):
        with pytest.raises(ConfigError, match="another value would change its results"):
            gone_on(before, **other)


def test_a_default_rate_is_scaled_too_and_the_base_batch_is_itself() -> None:
    config = Config(optimizer="lamb", lr_scaling="sqrt", base_batch=8, batch=32)
    assert phases_of(resolve(config, 50, True, 1))[0].lr == 0.002
    assert phases_of(resolve(config.replace(batch=8), 50, True, 1))[0].lr == 0.001


def test_a_run_that_was_cut_short_has_what_it_was_to_have_until_then() -> None:
    once = gone_on(steps=40, decay_steps=40, lr=0.05)
    cut = gone_on(once, steps=10)
    assert phases_of(gone_on(cut, steps=50, decay_steps=50)) == [(10, 0.1, 0.0, 20), (50, 0.05, 0.0, 50)]


@pytest.mark.parametrize(
    ("before", "asked", "words"),
    [
        (BEFORE, {"decay_steps": 19}, "--decay-steps 19: up to step 20 "),
        (BEFORE.replace(steps=30), {"decay_steps": 30}, "--decay-steps 30: up to step 30 "),
        (BEFORE, {"decay_steps": 40, "lr_floor": 0.2}, "--lr-floor 0.2: is above --lr 0.1"),
        (BEFORE.replace(lr_floor=0.01), {"decay_steps": 40, "lr": 0.001}, "--lr-floor 0.01: is above --lr 0.001"),
        (BEFORE, {"decay_steps": 40, "lr_history": ("until=3",)}, "--lr-history until=3: the run in a has "),
    ],
)
def test_a_rate_cannot_fall_anew_otherwise(before: Config, asked: Any, words: str) -> None:
    with pytest.raises(ConfigError, match="^" + words):
        gone_on(before, steps=40, **asked)


def test_settings_that_a_hand_has_left_open_are_decided_as_they_would_be() -> None:
    """Of 50 rows, in steps of 128, an epoch has one."""
    before = Config(decay="linear", epochs=20, out="a", optimizer="sgd")
    assert phases_of(gone_on(before, steps=40, decay_steps=40)) == [(20, 0.1, 0.0, 20), (40, 0.1, 0.0, 40)]


@pytest.mark.parametrize("asked", [{}, {"steps": 20}, {"steps": 10}])
def test_no_more_steps_need_no_word_and_allow_no_other_rate(asked: Any) -> None:
    assert gone_on(**asked).decay_steps == 20
    for other in ({"lr": 0.01}, {"decay_steps": 30}, {"lr_floor": 0.01}):
        (name,) = other
        with pytest.raises(ConfigError, match=rf"^--{name.replace('_', '-')} .*: the run in a has "):
            gone_on(**asked, **other)


def test_a_run_that_was_to_be_longer_than_it_falls_over_goes_on_so() -> None:
    before = BEFORE.replace(steps=30)
    assert gone_on(before).decay_steps == 20
    assert gone_on(before, steps=30).decay_steps == 20
    assert gone_on(before.replace(decay="none"), steps=99).steps == 99
    with pytest.raises(ConfigError, match="31 steps"):
        gone_on(before, steps=31)


def test_what_was_said_once_need_not_be_said_again() -> None:
    extended = gone_on(steps=40, decay_steps=40, lr=0.01)
    assert gone_on(extended, steps=40, decay_steps=40, lr=0.01) == gone_on(extended) == extended


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "sgd", "betas": (0.8, 0.9)}, "--betas 0.8,0.9: --optimizer sgd has none"),
        ({"recompute": True}, "--recompute --model mlp: gpt and resnet have blocks; leave it out"),
        (
            {"recompute": True, "model": "a:b"},
            r"--recompute --model a:b: .*; leave it out; put mpiml.api.Recompute\(\.\.\.\) around ",
        ),
        ({"noise_scale": True}, "--noise-scale --microbatches 1: it is measured by how the gradients of "),
        ({"betas": (0.9,)}, "--betas 0.9: must be two numbers"),
        ({"betas": ()}, "--betas : must be two numbers"),
        ({"betas": (0.9, 0.99, 0.999)}, "--betas 0.9,0.99,0.999: must be two numbers"),
        ({"base_batch": 64}, "--base-batch 64: is of --lr-scaling, linear or sqrt; give that too"),
        ({"lr_scaling": "linear"}, "--lr-scaling linear: say with --base-batch "),
        ({"lr_floor": 0.1}, "--lr-floor 0.1: with --decay none "),
        ({"lr_floor": 0.1, "decay": "linear"}, "--lr-floor 0.1: is above --lr 0.001"),
        ({"lr_floor": 0.1, "lr": 0.01, "decay": "own:fall"}, "--lr-floor 0.1: is above --lr 0.01"),
        ({"lr_history": ("until=20",), "decay": "cosine"}, "--lr-history 'until=20': must be like "),
        ({"lr_history": (str(Phase(20, 0.1, 0.0, 20)),)}, "--lr-history until=20 .* with --decay none "),
        ({"lr_history": (str(Phase(20, 0.1, 0.0, 20)),), "decay": "step", "steps": 20}, "--decay-steps 20: up to "),
    ],
)
def test_settings_that_do_not_go_together(settings: Any, words: str) -> None:
    with pytest.raises(ConfigError, match="^" + words):
        resolve(Config(**settings), 50, True, 1)


def test_what_was_asked_for_is_no_reason_to_refuse_it() -> None:
    """Defaults are in every config.toml; a floor may be as high as the rate."""
    assert resolve(Config(optimizer="sgd", betas=(0.9, 0.999), lr_floor=0.0), 50, True, 1).lr == 0.1
    assert resolve(Config(decay="linear", lr_floor=0.001), 50, True, 1).lr == 0.001


@pytest.mark.parametrize(
    ("rows", "batch", "microbatches", "leaf"),
    [(100, 30, 24, 1), (97, 8, 5, 1), (64, 3, 2, 1), (9, 1, 2, 1), (11, 4, 9, 1), (100, 30, 24, 4), (97, 30, 18, 6)],
)
@pytest.mark.parametrize("least", [1, 2, 5])
@pytest.mark.parametrize("replicas", [1, 2])
def test_micro_batches_that_are_too_small_are_refused_with_what_would_work(
    rows: int, batch: int, microbatches: int, leaf: int, least: int, replicas: int
) -> None:
    def smallest(batch: int, microbatches: int) -> int:
        source = ArraySource(np.zeros(rows))
        return Shards(Split(source, source), microbatches, batch, 0, 0, microbatches, "float64").smallest()

    def check(**settings: int) -> None:
        chosen = Config(**{"batch": batch, "microbatches": microbatches, "leaf": leaf} | settings)
        config = resolve(chosen, rows, True, replicas)
        check_rows(config, least, "layers.1", smallest(config.batch, config.microbatches), rows, replicas)

    if smallest(batch, microbatches) >= least:
        check()
        return
    with pytest.raises(
        ConfigError, match=f"^layers.1 cannot be trained on micro-batches of fewer than {least} rows"
    ) as e:
        check()
    ways = re.findall(r"--(batch|microbatches) (\d+)(?= or| would)", str(e.value))
    assert bool(ways) == any(
        smallest(b, m) >= least
        for b, m in [(batch, m) for m in range(replicas * leaf, rows, leaf)]
        + [(b, microbatches) for b in range(1, rows + 1)]
    )
    for name, value in ways:
        check(**{name: int(value)})


def test_values_have_no_label_that_is_ignored() -> None:
    assert resolve(Config(ignore=0), 50, True, 1).ignore == 0
    with pytest.raises(ConfigError, match="--ignore 0: the labels are values, which all count"):
        resolve(Config(ignore=0), 50, False, 1)


def test_labels_become_what_loss_and_metric_take_them_for() -> None:
    x, y = np.zeros((2, 3)), np.array([0, 1])
    integers, floats = Dataset.from_arrays(x, y, x, y), Dataset.from_arrays(x, y / 2, x, y / 2)
    twos = Dataset.from_arrays(x, y * 2, x, y * 2)

    def kind(data: Dataset, **settings: Any) -> str:
        made = with_labels(data, Config(**settings))
        try:
            made.train.y.rows(np.arange(2))
        except DataError:
            return "refused"
        return "classes" if made.classification else "values"

    assert kind(integers) == kind(integers, loss="a:b") == kind(integers, loss="a:b", metric="accuracy") == "classes"
    for settings in ({"loss": "mse"}, {"metric": "r2"}, {"loss": "a:b", "metric": "r2"}):
        assert kind(integers, **settings) == kind(twos, **settings) == kind(floats, **settings) == "values"
    for settings in ({"loss": "bce"}, {"metric": "exact_match"}, {"loss": "a:b", "metric": "exact_match"}):
        assert kind(integers, **settings) == kind(floats, **settings) == "values"
        assert kind(twos, **settings) == "refused"
    assert kind(floats) == kind(floats, loss="a:b", metric="accuracy") == "values"


def test_paths_are_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, elsewhere = tmp_path / "job [1]", tmp_path / "other"
    for directory in (here / "src" / "deep", elsewhere):
        directory.mkdir(parents=True)
    for name in ("d[1].npz", "src/a.py", "src/deep/b.py"):
        (here / name).write_text("")
    monkeypatch.chdir(here)
    file, directory, pattern = absolute("d[1].npz"), absolute("src"), absolute("src/**/*.py")
    monkeypatch.chdir(elsewhere)
    assert (file, directory) == (str(here / "d[1].npz"), str(here / "src"))
    assert sorted(glob.glob(pattern, recursive=True)) == [str(here / "src/a.py"), str(here / "src/deep/b.py")]
    assert [absolute(path) for path in (file, directory, pattern)] == [file, directory, pattern]


@pytest.mark.parametrize("spec", ["digits", "mydata:load", "my.data:sets.load"])
def test_what_is_no_path_stays(spec: str) -> None:
    assert absolute(spec) == spec
