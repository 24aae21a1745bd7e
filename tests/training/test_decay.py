"""A user's own decay is tried before the first step, on all ranks, and is a function of its arguments alone."""

from __future__ import annotations

import json
import math
import random
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.errors import ConfigError, RunError
from mpiml.nn.rates import DECAYS, Phase
from mpiml.train import train
from mpiml.training.decay import TRIED, OwnDecay, remarks, spread
from mpiml.training.resolve import resolve

WORLD = MPI.COMM_WORLD
NAME = "of_a_user:function"


def named(function: Any) -> None:
    module = types.ModuleType("of_a_user")
    module.function = function  # type: ignore[attr-defined]
    sys.modules["of_a_user"] = module


def trained(out: Path | None, function: Any, comm: Any = MPI.COMM_SELF, **settings: Any) -> dict[str, Any]:
    named(function)
    x, y = np.arange(64.0).reshape(16, 4) / 64, np.arange(16) % 2
    asked: dict[str, Any] = {
        "batch": 8,
        "microbatches": max(4, comm.size),
        "hidden": (3,),
        "steps": 12,
        "eval_every": 0,
        "log_every": 1,
    }
    config = Config(**asked | {"out": str(out), "decay": NAME, "quiet": True} | settings)
    return train(config, comm, data=Dataset.from_arrays(x, y, x, y))


def rates(out: Path) -> list[float]:
    return [json.loads(line)["learning_rate"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_one_that_is_a_line_is_the_line(tmp_path: Path) -> None:
    """With warm-up and floor, and in a run that is extended: what it is called with is counted alike."""
    one, other, how = tmp_path / "one", tmp_path / "other", {"warmup_steps": 3, "lr": 0.1, "lr_floor": 0.02}
    for out, decay in ((one, NAME), (other, "linear")):
        trained(out, lambda step, steps: 1 - step / steps, decay=decay, **how)
        trained(out, lambda step, steps: 1 - step / steps, decay=decay, steps=20, decay_steps=18, resume=True)
    assert rates(one) == rates(other)
    assert rates(one)[2:12:9] == pytest.approx([0.1, 0.02])  # steps 3 and 12
    assert rates(one)[12:] == pytest.approx([*(0.02 + 0.08 * (1 - step / 6) for step in range(1, 7)), 0.02, 0.02])


def of_torch(step: int, steps: int) -> Any:
    return pytest.importorskip("torch").ones(()) * step / steps


@pytest.mark.parametrize(
    "function",
    [
        lambda step, steps: np.float32(step / steps),
        lambda step, steps: np.array(step / steps),
        lambda step, steps: step // steps,
        lambda step, *others: step / others[0],
        of_torch,
    ],
)
def test_numbers_of_every_kind(function: Any) -> None:
    named(function)
    own = OwnDecay(NAME, seed=0)
    own.tried([(1, 4), (4, 4)])
    assert type(own(4, 4)) is float
    assert own(4, 4) == 1


COUNT = iter(range(1000))


def failing(step: int, steps: int) -> float:
    raise KeyError("two\nlines")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (0.5, "must be a function, but is float; it is called with (step, steps)"),
        (lambda step: 1.0, "(step): too many positional arguments; it is called with (step, steps)"),
        (lambda step, steps: None, ": TypeError: float() argument "),
        (lambda step, steps: "0.5", ": returns '0.5' for step 1 of 12; a finite number, 0 or more, is needed"),
        (lambda step, steps: np.ones(1), ": returns array([1.]) for step 1 of 12; "),
        (lambda step, steps: math.nan, ": returns nan for step 1 of 12; "),
        (lambda step, steps: math.inf, ": returns inf for step 1 of 12; "),
        (lambda step, steps: 11 - step, ": returns -1 for step 12 of 12; "),
        (lambda step, steps: 1 / (steps - step), ": ZeroDivisionError: division by zero, for step 12 of 12"),
        (failing, ": KeyError: 'two\\nlines', for step 1 of 12"),
        (
            lambda step, steps: next(COUNT),
            " for step 12 of 12, and 12.0 when it is called again; it must be a function",
        ),
        (
            lambda step, steps: time.perf_counter(),
            "when it is called again; it must be a function of these two numbers",
        ),
    ],
)
def test_one_that_cannot_be_used_is_refused_before_there_is_a_run(tmp_path: Path, function: Any, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        trained(tmp_path / "run", function)
    assert str(refused.value).startswith(f"--decay {NAME}")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_what_it_draws_belongs_to_the_step(tmp_path: Path) -> None:
    def drawing(step: int, steps: int) -> float:
        return random.random() + np.random.random()

    whole = trained(tmp_path / "whole", drawing)
    trained(tmp_path / "cut", drawing, steps=5, decay_steps=12)
    before = random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[index,union-attr]
    done = trained(tmp_path / "cut", drawing, steps=12, resume=True)
    after = random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[index,union-attr]
    assert done["weights_sha256"] == whole["weights_sha256"]
    assert len(set(rates(tmp_path / "cut"))) == 12
    assert after == before


def test_it_is_tried_from_the_first_step_of_each_decay_to_the_last() -> None:
    few = spread([Phase(12, 1.0, 0.0, 10), Phase(20, 1.0, 0.0, 15)], 3)
    assert few == [*((step, 7) for step in range(1, 8)), (1, 3), (2, 3), (3, 3)]
    many = spread([Phase(5000, 1.0, 0.0, 5000)], 0)
    assert (len(many), many[0], many[-1]) == (TRIED, (1, 5000), (5000, 5000))
    assert spread([Phase(2, 1.0, 0.0, 2)], 9) == [(1, 1)]


@pytest.fixture
def together(tmp_path: Path) -> Path:
    """A directory of all ranks."""
    return Path(WORLD.bcast(str(tmp_path)))


@pytest.mark.mpi
@pytest.mark.parametrize("rank", [0, WORLD.size - 1])
def test_a_bad_value_later_ends_the_run_on_all_ranks_alike(together: Path, rank: int) -> None:
    """Step 60 of 120 is not one of those for which it is tried."""
    assert (60, 120) not in spread([Phase(120, 1.0, 0.0, 120)], 0)
    with pytest.raises(ConfigError, match=rf"^--decay {NAME}: returns -1 for step 60 of 120; ") as error:
        trained(
            together / "run",
            lambda step, steps: -1 if step == 60 and WORLD.rank >= rank else 1,
            WORLD,
            steps=120,
            save_every=50,
        )
    assert error.value.everywhere
    WORLD.Barrier()
    result = json.loads((together / "run" / "result.json").read_text())
    assert (result["status"], result["step"], result["saved"]) == ("failed", 60, 50)
    WORLD.Barrier()


@pytest.mark.mpi
@pytest.mark.skipif(WORLD.size == 1, reason="one rank cannot differ")
def test_ranks_must_agree(together: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"^ranks differ in --decay {NAME} for step 7 of 12: 2.0 .rank 1 on .*alone$"
    ):
        trained(together / "run", lambda step, steps: 1 + (step == 7) * WORLD.rank, WORLD)
    with pytest.raises(RunError, match=f"^--decay {NAME}: returns -1 for step 7 of 12"):
        trained(together / "run", lambda step, steps: -1 if step == 7 and WORLD.rank else 1, WORLD)
    assert not (together / "run").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"decay": "cosine"}, "warning: the learning rate is 0 from step 20 of 40 on"),
        ({"decay": "linear"}, "warning: the learning rate is 0 from step 20 of 40 on"),
        ({"decay": "linear", "steps": 20}, None),
        ({"decay": "linear", "lr_floor": 0.01}, None),
        ({"decay": "step"}, None),
        ({"decay": "none"}, None),
        ({"lr_scaling": "linear", "base_batch": 32}, "learning rate 0.1 x 128 / 32 = 0.4, by --lr-scaling"),
        ({"lr_scaling": "sqrt", "base_batch": 32}, "learning rate 0.1 x sqrt(128 / 32) = 0.2, by --lr-scaling"),
        (
            {"decay": "cosine", "decay_steps": 50, "lr_history": (str(Phase(20, 0.2, 0.01, 30)),)},
            "the learning rate falls by --decay cosine from 0.2 towards 0.01 until step 30; "
            "after step 20 from 0.1 towards 0 until step 50",
        ),
    ],
)
def test_a_rate_of_0_is_not_passed_over_and_how_an_extended_run_falls_is_said(settings: Any, words: str | None) -> None:
    config = resolve(Config(**{"steps": 40, "decay_steps": 20, "lr": 0.1} | settings), 50, True, 1)
    end = config.lr_floor + (config.lr - config.lr_floor) * DECAYS[config.decay](1, 1)
    said = remarks(config, lambda step: end)
    assert not said if words is None else len(said) == 1 and said[0].startswith(words)
