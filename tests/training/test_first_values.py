"""What --init gives reaches the ranks that need it, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from safetensors.numpy import save_file

from mpiml.clock import unwatched
from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.errors import OutputError, freed
from mpiml.parallel.state import VALUES
from mpiml.training import first_values
from mpiml.training.run import Run, unsaved
from tests.parallel.gathered import gathered

pytestmark = pytest.mark.mpi
WORLD = MPI.COMM_WORLD


@contextmanager
def run(**settings: Any) -> Iterator[Run]:
    """Of a model that has {0, 2, 4}.{weight, bias} for PyTorch, of which 2.* are not trained."""
    random = np.random.default_rng(0)
    x, y = random.standard_normal((64, 50)), random.integers(0, 3, 64)
    given = {"hidden": (400, 90), "batch": 48, "microbatches": 48, "steps": 1, "rates": ("layers.2.*=0",)}
    made = unsaved(WORLD, Config(**given | settings), Dataset.from_arrays(x, y, x, y))
    with freed(made, WORLD.size):
        yield made


def file(path: Path, **arrays: np.ndarray) -> str:
    if WORLD.rank == 0:
        save_file(arrays, path)
    WORLD.Barrier()
    return str(path)


WEIGHT, BIAS = np.arange(90 * 400, dtype="f").reshape(90, 400), np.arange(400, dtype="f")


def model(run: Run) -> dict[str, np.ndarray]:
    """The parameters, by name, on all ranks."""
    vectors = gathered(run.state)
    return {
        parameter.name: view
        for stage, layout in enumerate(run.model.layouts)
        for parameter, view in layout.views(vectors[stage, VALUES])
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"memory": "private"},
        {"allreduce": "mpi"},
        {"pipe": 2},
        {"nodes": "1,2,1,12", "bucket": 0.01},
        {"average_every": 1, "workers": 48},
    ],
)
def test_what_the_file_does_not_have_stays_as_it_is_drawn(
    settings: dict[str, Any], mpi_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if WORLD.size % settings.get("pipe", 1):
        return
    if nodes := settings.pop("nodes", ""):
        monkeypatch.setenv("MPIML_NODES", nodes)
    init = file(mpi_tmp_path / "f.safetensors", **{"2.weight": WEIGHT, "0.bias": BIAS})
    with run(**settings, init=init, init_partial=True) as one:
        drawn = model(one)
        constants, notes = first_values.take(one, unwatched)
        expected = drawn | {"layers.2.weight": WEIGHT.T, "layers.0.bias": BIAS}
        now = model(one)
        assert {name for name, array in expected.items() if not np.array_equal(array, now[name])} == set()
        for learner in one.learning.now.own:  # also what other ranks update
            for parameter, view in one.model.layouts[one.grid.stage].views(learner.stage.sum.values.vector):
                np.testing.assert_array_equal(view, expected[parameter.name])
    assert constants == {}
    assert (f"first weights from {init}: 2 of 6 arrays" in notes) is (WORLD.rank == 0)


@pytest.mark.parametrize("settings", [{}, {"pipe": 2}, {"pipe": 2, "average_every": 1, "workers": 48}])
def test_an_array_in_several_layers_is_taken_at_all_places(settings: dict[str, Any], mpi_tmp_path: Path) -> None:
    if WORLD.size % settings.get("pipe", 1):
        return
    rows = np.random.default_rng(0).integers(0, 600, (48, 4))
    rows[0, 0] = 599
    config = Config(
        model="gpt", width=32, heads=2, blocks=1, tie=True, batch=48, microbatches=48, steps=1, init_partial=True,
        init=file(mpi_tmp_path / "f.safetensors", **{"0.weight": WEIGHT.reshape(-1)[: 600 * 32].reshape(600, 32)}),
        **settings,
    )  # fmt: skip
    one = unsaved(WORLD, config, Dataset.from_arrays(rows, rows, rows, rows))
    with freed(one, WORLD.size):
        first_values.take(one, unwatched)
        layout, places = one.model.layouts[one.grid.stage], set()
        for learner in one.learning.now.own:
            for parameter, view in layout.views(learner.stage.sum.values.vector):
                if parameter.places:
                    places.add(parameter.name)
                    np.testing.assert_array_equal(view.reshape(-1), WEIGHT.reshape(-1)[: view.size])
    assert set().union(*WORLD.allgather(places)) >= {"layers.0.weight"}
    if one.config.pipe == 2:
        assert set().union(*WORLD.allgather(places)) == {"layers.0.weight", "layers.5.weight"}


def test_an_array_that_cannot_be_taken_is_refused_by_all_ranks(mpi_tmp_path: Path) -> None:
    """When others have been sent already."""
    init = file(mpi_tmp_path / "f.safetensors", **{"0.bias": BIAS, "2.weight": np.full_like(WEIGHT, np.inf)})
    with run(init=init, init_partial=True) as one:
        with pytest.raises(
            OutputError, match=r"f.safetensors: 2.weight is not finite; nothing of it is taken"
        ) as error:
            first_values.take(one, unwatched)
        assert error.value.everywhere
        file(mpi_tmp_path / "f.safetensors", **{"0.bias": BIAS + 1})
        first_values.take(one, unwatched)
        np.testing.assert_array_equal(model(one)["layers.0.bias"], BIAS + 1)
