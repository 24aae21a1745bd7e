"""Reading ahead: the same rows, read while others are used, and an end whatever happens."""

from __future__ import annotations

import gzip
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.data import prefetch
from mpiml.data.dataset import Split, open_dataset
from mpiml.data.normalize import Normalization, NormalizedSource
from mpiml.data.prefetch import ReadAhead, in_memory, steps_ahead
from mpiml.data.shards import Shards
from mpiml.data.sources import ArraySource
from mpiml.errors import DataError
from tests.conftest import eventually
from tests.data.samples import FORMATS, OPTIONS, plain_idx

ROWS, MICROBATCHES, BATCH, STEPS = 50, 7, 9, 14  # two epochs and two steps; some micro-batches are empty
BY = Normalization(np.zeros(1), np.ones(1))


class Watched(ArraySource):
    """Row i holds the number i. Notes which threads read, and can be made to fail."""

    def __init__(self) -> None:
        super().__init__(np.arange(float(ROWS)))
        self.threads: set[str] = set()
        self.reads = 0
        self.fails_at = -1

    def rows(self, indices: np.ndarray) -> np.ndarray:
        self.threads.add(threading.current_thread().name)
        self.reads += 1
        if self.reads == self.fails_at:
            raise DataError("row 3 cannot be read")
        return super().rows(indices)


def ahead(steps: int, x: bool = True, y: bool = True) -> tuple[ReadAhead, Watched, Watched]:
    inputs, labels = Watched(), Watched()
    shards = Shards(Split(inputs, labels), MICROBATCHES, BATCH, 3, 0, MICROBATCHES, "float32")
    return ReadAhead(shards, steps, STEPS, x, y), inputs, labels


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("reading ahead")]


@pytest.fixture(autouse=True)
def no_reader_stays() -> Iterator[None]:
    """After an error of the rank, its reader ends a moment later: also that of a test before these."""
    assert eventually(lambda: not readers())
    yield
    assert eventually(lambda: not readers())


def taken(of: ReadAhead, first: int = 1) -> list[list[Any]]:
    with of:
        steps = [of.batches(step) for step in range(first, STEPS + 1)]
        return [[(b.index, b.rows, b.x().tolist(), b.y().tolist()) for b in step if b.rows] for step in steps]


@pytest.mark.parametrize("steps", [1, 2, 5, 100])
@pytest.mark.parametrize("first", [1, 6])
def test_the_same_rows_as_without(steps: int, first: int) -> None:
    of, x, y = ahead(steps)
    assert taken(of, first) == taken(ahead(0)[0], first)
    assert all(len(source.threads) == 1 for source in (x, y))
    assert not {"MainThread"} & (x.threads | y.threads)
    assert not readers()


def test_without_it_there_is_no_thread() -> None:
    of, x, _ = ahead(0)
    with of:
        of.batches(1)[0].x()
        assert not readers()
    assert x.threads == {"MainThread"}


@pytest.mark.parametrize(("x", "y"), [(True, False), (False, True)])
def test_only_what_the_rank_needs_is_read(x: bool, y: bool) -> None:
    of, inputs, labels = ahead(2, x, y)
    with of:
        for step in range(1, STEPS + 1):
            for batch in of.batches(step):
                if batch.rows:
                    batch.x() if x else batch.y()
    assert (inputs.reads > 0, labels.reads > 0) == (x, y)


@pytest.mark.parametrize("steps", [1, 3])
def test_it_reads_so_many_steps_ahead_and_no_further(steps: int) -> None:
    of, x, _ = ahead(steps)
    per_step = [sum(b.rows > 0 for b in of.shards.batches(step)) for step in range(1, STEPS + 1)]
    with of:
        of.batches(1)
        assert eventually(lambda: x.reads >= sum(per_step[: 1 + steps]))
        time.sleep(0.02)
        assert x.reads == sum(per_step[: 1 + steps])
        of.batches(STEPS - 1)
        of.batches(STEPS)
        assert not of._pending.keys() - set(range(1, STEPS + 1))


def test_an_error_is_raised_where_the_rows_are_wanted() -> None:
    of, x, _ = ahead(2)
    x.fails_at = 12
    with pytest.raises(DataError, match="row 3 cannot be read"):
        taken(of)


def test_sys_exit_in_the_thread_is_not_lost() -> None:
    of, x, _ = ahead(2)
    x.rows = lambda indices: exec("raise SystemExit(3)")  # type: ignore[method-assign]
    with pytest.raises(SystemExit), of:
        next(b for b in of.batches(1) if b.rows).x()


def test_stopping_early_ends_the_thread() -> None:
    of, _, _ = ahead(5)
    with of:
        of.batches(1)
        of.batches(2)
    assert not readers()


def test_error_of_the_rank_does_not_wait_for_a_read_that_hangs() -> None:
    of, x, _ = ahead(1)
    go = threading.Event()
    x.rows = lambda indices: go.wait(20)  # type: ignore[assignment, method-assign]
    began = time.monotonic()
    of.__enter__()
    of.batches(1)
    of.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert time.monotonic() - began < 10
    go.set()


def test_a_read_that_hangs_does_not_keep_python_from_ending() -> None:
    script = """
import time
from tests.data.test_prefetch import ahead
of, x, _ = ahead(1)
x.rows = lambda indices: time.sleep(60)
of.__enter__()
of.batches(1)
of.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=30).returncode == 0


IN_MEMORY = {"npz": False, "compressed_npz": True, "hdf5": False, "csv": True}


@pytest.mark.parametrize(("name", "expected"), IN_MEMORY.items())
def test_what_is_in_memory(tmp_path: Path, name: str, expected: bool) -> None:
    assert in_memory(open_dataset(str(FORMATS[name](tmp_path)), OPTIONS).train) is expected
    assert in_memory(Split(ArraySource([1.0]), ArraySource([1.0])))


def shards_of(split: Split, transform: Any = None) -> Shards:
    return Shards(split, MICROBATCHES, BATCH, 3, 0, MICROBATCHES, "float32", transform=transform)


@pytest.mark.parametrize("name", [*IN_MEMORY, "npy", "plain_idx"])
def test_nothing_is_read_ahead_that_is_quickly_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(prefetch, "HANDOVER", 1.0)  # seconds: tests may share a busy machine
    split = open_dataset(str(FORMATS[name](tmp_path)), OPTIONS).train
    for source in (split.x, split.y):
        source.hold(np.arange(len(source)))
    assert steps_ahead(shards_of(split)) == 0
    assert steps_ahead(shards_of(Split(NormalizedSource(split.x, BY, "float32"), split.y))) == 0
    assert steps_ahead(shards_of(split, transform=lambda x, y, rng: (x, y))) == 2


def test_what_is_slowly_read_is_read_ahead(tmp_path: Path) -> None:
    class Far(ArraySource):
        def rows(self, indices: np.ndarray) -> np.ndarray:
            assert len(indices) == 2  # of 50 rows in 6 steps of 7 micro-batches
            time.sleep(1e-3)
            return super().rows(indices)

    far = Far(np.lib.format.open_memmap(tmp_path / "a.npy", "w+", shape=(ROWS,)))
    assert steps_ahead(shards_of(Split(far, ArraySource(np.arange(ROWS))))) == 2
    assert steps_ahead(shards_of(Split(NormalizedSource(far, BY, "float32"), ArraySource(np.arange(ROWS))))) == 2


def test_sources_of_a_users_own_are_read_ahead_and_not_for_a_trial() -> None:
    class Own:
        name, shape, dtype = "own", (), np.dtype(float)

        def __len__(self) -> int:
            return ROWS

    assert steps_ahead(shards_of(Split(Own(), ArraySource(np.arange(ROWS))))) == 2  # type: ignore[arg-type]


def test_only_columns_that_a_rank_reads_are_timed(tmp_path: Path) -> None:
    """Others are not held, in a pipeline."""
    for file in plain_idx(tmp_path).iterdir():
        if "images" in file.name:
            file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
    split = open_dataset(str(tmp_path)).train
    assert steps_ahead(shards_of(split), columns="y") in (0, 2)
    assert steps_ahead(shards_of(split), columns="") == 0
    split.x.hold(np.arange(len(split)))
    assert steps_ahead(shards_of(split), columns="x") == 0
