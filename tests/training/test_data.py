"""Data on all ranks: what inputs are filled and normalised with has the same bits on every grid; who reads what."""

from __future__ import annotations

import functools
import operator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.clock import Clock
from mpiml.config import Config
from mpiml.data import fingerprint
from mpiml.data.dataset import Dataset
from mpiml.data.normalize import Normalization, moments
from mpiml.data.shards import Shards
from mpiml.parallel import grid as grids
from mpiml.partition import part
from mpiml.team import Team
from mpiml.training import resolve
from mpiml.training.data import open_data, prepare

pytestmark = pytest.mark.mpi
WORLD = MPI.COMM_WORLD
PIPES = [pipe for pipe in (1, 2, 4) if WORLD.size % pipe == 0]
ROWS = 200


def dataset(gaps: bool) -> Dataset:
    """Rows whose mean depends on the order in which they are added up."""
    random = np.random.default_rng(0)
    x = random.standard_normal((ROWS, 30)) * 10.0 ** random.integers(-6, 7, (ROWS, 30))
    if gaps:
        x[random.random(x.shape) < 0.1] = np.nan
    return Dataset.from_arrays(x, np.zeros(ROWS, int))


def shards_of(data: Dataset, microbatches: int, first: int, last: int) -> Shards:
    return Shards(data.train, microbatches, 20, 0, first, last, "float64")


def prepared_with(data: Dataset, microbatches: int, comm: MPI.Intracomm, pipe: int) -> list[np.ndarray]:
    """The values of all preparations."""
    grid = grids.build(Team(comm, Clock()), pipe)
    shards = shards_of(data, microbatches, *part(grid.replica, grid.replicas, microbatches))
    preparations = prepare(Config(fill="mean", normalize=True), data, grid, shards)
    grid.free()
    return [array for preparation in preparations for array in preparation.arrays().values()]


@pytest.mark.parametrize("pipe", PIPES)
@pytest.mark.parametrize("microbatches", [16, 37, ROWS])
def test_preparations_have_the_same_bits_on_every_grid(pipe: int, microbatches: int) -> None:
    data = dataset(gaps=True)
    here, alone = (prepared_with(data, microbatches, *on) for on in ((WORLD, pipe), (MPI.COMM_SELF, 1)))
    np.testing.assert_array_equal(here, alone)
    filled = np.where(np.isnan(data.train.x.array), here[0], data.train.x.array)  # type: ignore[attr-defined]
    np.testing.assert_allclose(here[1:], [filled.mean(axis=0), 1 / filled.std(axis=0)], rtol=1e-12)


def test_another_order_is_worth_avoiding() -> None:
    """Added in the order of the shards, moments would have other bits than those of the tree."""
    data = dataset(gaps=False)
    shards = shards_of(data, 37, 0, 37)
    in_order = functools.reduce(operator.add, (moments(data.train.x, shards.numbers(m)) for m in range(37)))
    _, mean, scale = prepared_with(data, 37, WORLD, 1)
    other = Normalization.of(in_order)
    assert not np.array_equal((mean, scale), (other.mean, other.scale))
    np.testing.assert_allclose((mean, scale), (other.mean, other.scale), rtol=1e-9)


def test_the_ranks_of_a_node_read_files_in_turn_for_the_fingerprint(tmp_path: Path, monkeypatch: Any) -> None:
    """Of a data set with changes, too: here, rows to validate on."""
    path = WORLD.bcast(tmp_path)
    read, sample = list[Path](), fingerprint._of_file

    def noted(file: Path, known: fingerprint.Properties = MappingProxyType({})) -> tuple[fingerprint.Identity, str]:
        identity, text = sample(file, known)
        read.extend([] if identity in known else [file])
        return identity, text

    if WORLD.rank == 0:
        for number in range(9):
            (path / f"{number}.txt").write_text(f"{number}" * 100)
    WORLD.barrier()
    monkeypatch.setattr(fingerprint, "_of_file", noted)
    config = Config(data=str(path), context=4, model="gpt", validation=0.2)
    data = open_data(config, Team(WORLD, Clock()))
    own = len(read)
    assert own in (9 // WORLD.size, -(-9 // WORLD.size))
    alone = resolve.open_data(config)
    assert data.fingerprint == alone.fingerprint
    assert len(read) == own + 9
