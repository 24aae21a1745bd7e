"""Stages that are cut by the time of their layers (--balance measured)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.api import train
from mpiml.config import Config, from_toml, parse
from mpiml.data.dataset import Dataset
from mpiml.errors import ConfigError, freed
from mpiml.nn import base as nn
from mpiml.nn.layers import Embedding, Linear, Tanh
from mpiml.plan.sizing import plan
from mpiml.training.job import unplaced
from mpiml.training.layer_times import layer_times
from mpiml.training.model import model_for
from mpiml.training.run import unsaved
from mpiml.training.saved import resumed
from mpiml.training.task import Task
from tests.plan import jobs

WORLD = MPI.COMM_WORLD
TASK = Task((6,), (), True, 3, 0)


class Slow(nn.Layer):
    """Returns its rows, after some seconds; on rank `only` alone if that is given."""

    def __init__(self, seconds: float, only: int | None = None):
        self._seconds = seconds if only in (None, WORLD.rank) else 0.0

    def __call__(self, x: Any, at: nn.At) -> Any:
        time.sleep(self._seconds)
        return x, lambda dy, grads: dy


class Broken(nn.Layer):
    def __call__(self, x: Any, at: nn.At) -> Any:
        raise ValueError(f"wrong\nfor {len(x)} rows")


class Drawing(nn.Layer):
    """Draws from NumPy's own generator."""

    def __call__(self, x: Any, at: nn.At) -> Any:
        return x + np.random.random(x.shape).astype(x.dtype), lambda dy, grads: dy


def timed(*layers: nn.Layer, task: Task = TASK, **settings: Any) -> list[int]:
    config = Config(**{"batch": 10, "microbatches": 3} | settings)
    return layer_times(config, model_for(config, task, list(layers)), task)


def digits() -> Dataset:
    x = np.random.default_rng(0).standard_normal((64, 6))
    return Dataset.from_arrays(x, np.arange(64) % 3, x, np.arange(64) % 3)


def test_the_least_time_of_both_passes_in_microseconds() -> None:
    again = Slow(0.01)
    again.block = "a block"  # whose forward pass is computed again
    slow, linear, slower, twice = timed(Slow(0.01), Linear(6, 3), Slow(0.05), again)
    assert 1 <= linear < slow
    assert 10_000 <= slow < 50_000 <= slower
    assert 20_000 <= twice < 50_000


def test_layers_get_as_many_rows_as_the_largest_micro_batch_and_ids_below_the_vocabulary() -> None:
    seen = []

    class Ids(Embedding):
        def __call__(self, x: Any, at: nn.At) -> Any:
            seen.append(x.copy())
            return super().__call__(x, at)

    timed(Ids(5, 4), Linear(4, 5), task=Task((7,), (7,), True, 5, 5))
    assert {x.shape for x in seen} == {(4, 7)}
    assert set(np.unique(seen)) == set(range(5))


def test_a_layer_that_fails_is_named() -> None:
    words = r"layers.1, Broken, fails when it is timed on 4 rows of shape \(3,\): ValueError: wrong for 4 rows; "
    with pytest.raises(ConfigError, match=rf"^--balance measured: {words}--balance operations needs no timing$"):
        timed(Linear(6, 3), Broken())


def test_layers_keep_nothing() -> None:
    layers = [Linear(6, 3), Drawing()]
    before = np.random.get_state()
    timed(*layers)
    assert not any(hasattr(parameter, "value") for parameter in nn.parameters(layers))
    assert str(np.random.get_state()) == str(before)


def test_torch_modules_are_as_before() -> None:
    torch = pytest.importorskip("torch")
    from mpiml.nn.torch_modules import TorchLayer

    module = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5))
    layer = TorchLayer(module)
    layer.output_shape((6,))
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in module.state_dict().items()}
    state = torch.get_rng_state()
    timed(layer)
    for name, tensor in module.state_dict().items():
        assert tensor.data_ptr() == before[name][0], name
        assert torch.equal(tensor, before[name][1])
    assert torch.equal(torch.get_rng_state(), state)


def test_plans_are_cut_by_time_and_show_its_shares() -> None:
    config = Config(model="tests.training.test_balance:slow_model", pipe=2, balance="measured", microbatches=4)
    made = plan(unplaced(config, digits()).on(config, 2, 2), "digits")
    assert [stage.first for stage in made.stages] == [0, 3]
    assert made.stages[0].share == pytest.approx(0.5, abs=0.2)
    counted = jobs.job(2, hidden=(8,), pipe=2)
    assert [stage.work for stage in counted.stages] == [stage.flops for stage in counted.stages]


def slow_model(shape: Any, outputs: int) -> list[nn.Layer]:
    """Counted operations say to cut before the linear layer."""
    return [Tanh(), Slow(0.01), Slow(0.01), Slow(0.02), Linear(6, outputs)]


def test_one_stage_measures_nothing() -> None:
    config = Config(balance="measured", steps=1, eval_every=0)
    with freed(unsaved(MPI.COMM_SELF, config, digits(), [Linear(6, 3)]), 1) as run, run.data.ahead:
        assert (run.config.balance, run.config.cuts) == ("measured", ())
        assert not any("by measurement" in note for note in run.notes)


def test_cuts_and_measuring_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"^--balance measured --cuts 1: cuts leave nothing to measure; give one$"):
        parse(["--balance", "measured", "--cuts", "1", "--pipe", "2"])


@pytest.mark.parametrize(
    ("flags", "stored", "expected"),
    [
        ("--pipe 2 --balance measured", Config(pipe=2, cuts=(3,)), ((3,), "operations")),
        ("--pipe 3 --balance measured", Config(pipe=2, cuts=(3,)), ((), "measured")),
        ("--pipe 3", Config(pipe=2, cuts=(3,)), ((), "operations")),
        ("--pipe 2", Config(balance="measured"), ((), "measured")),
        ("--pipe 2 --cuts 1", Config(balance="measured"), ((1,), "operations")),
    ],
)
def test_a_run_that_goes_on_keeps_its_cuts_as_long_as_they_fit(flags: str, stored: Config, expected: Any) -> None:
    config = resumed(parse(["--resume", "--out", "a", *flags.split()]), stored)
    assert (config.cuts, config.balance) == expected


@pytest.mark.mpi
@pytest.mark.skipif(WORLD.size % 2 > 0, reason="needs two stages")
def test_all_ranks_cut_alike_by_the_mean_of_their_times(tmp_path: Path) -> None:
    """The last rank alone is slow in two layers, and its times alone would be those of no other rank."""
    path = Path(WORLD.bcast(str(tmp_path), 0))
    layers = [Slow(0.004, WORLD.size - 1), Linear(6, 6), Slow(0.004, WORLD.size - 1), Linear(6, 3)]
    settings: dict[str, Any] = {"pipe": 2, "steps": 2, "balance": "measured", "microbatches": WORLD.size, "quiet": True}
    measured = train(Config(out=str(path / "a"), **settings), WORLD, layers, digits())
    config = Config(**from_toml(path / "a" / "config.toml"))
    assert (config.balance, config.cuts) in [("operations", (cut,)) for cut in (1, 2)]
    given = train(
        Config(out=str(path / "b"), **settings | {"balance": "operations", "cuts": (3,)}), WORLD, layers, digits()
    )
    assert measured["weights_sha256"] == given["weights_sha256"]
    again = Config(out=str(path / "a"), resume=True, **settings | {"steps": 3})
    train(again, WORLD, layers, digits())
    assert Config(**from_toml(path / "a" / "config.toml")).cuts == config.cuts


@pytest.mark.mpi
@pytest.mark.skipif(WORLD.size % 2 > 0, reason="needs two stages")
def test_a_layer_that_fails_on_one_rank_is_named_on_all() -> None:
    layers = [Linear(6, 3), Broken() if WORLD.rank == 1 else Tanh()]
    config = Config(pipe=2, balance="measured", microbatches=WORLD.size, steps=1)
    with pytest.raises(ConfigError, match=r"layers.1, Broken, fails when it is timed") as caught:
        unsaved(WORLD, config, digits(), layers)
    assert caught.value.everywhere
