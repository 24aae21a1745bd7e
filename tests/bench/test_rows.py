"""The benchmark's rows: each can be measured, and what several jobs give is put together."""

from __future__ import annotations

import inspect
import itertools

import pytest

from mpiml.bench import jobs
from mpiml.bench.measurements import MEASUREMENTS
from mpiml.bench.rows import OTHER, ROWS, Row


def test_every_row_is_a_measurement_with_its_arguments() -> None:
    for row in ROWS:
        if row.call[0] != "start":
            inspect.signature(MEASUREMENTS[row.call[0]]).bind(*row.call[1:])
    groups = [group for group, _ in itertools.groupby(row.group for row in ROWS)]
    assert len(groups) == len(set(groups))  # a title is printed once


def test_of_several_jobs_the_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row(OTHER, "a row", 1, ("small_product", "1", "1", "1"), at_least=0.9, jobs=5)
    medians = iter([5.0, 1.0, 3.0, 2.0, 4.0])
    monkeypatch.setattr(jobs, "measure_once", lambda row: {"median": next(medians)})
    assert jobs.measure_row(row) == {"median": 3.0, "low": 1.5, "high": 4.5}
    results = iter([{"median": 1.0}, {"error": "lost"}, *[{"median": 1.0}] * 3])
    monkeypatch.setattr(jobs, "measure_once", lambda row: next(results))
    assert jobs.measure_row(row) == {"error": "lost"}


def test_rows_of_the_step_record() -> None:
    """Of a few micro-batches, which a rank writes as they are, and of more, which it adds up itself."""
    for microbatches in ("4", "200"):
        against = MEASUREMENTS["record"](microbatches)
        assert 0 < against.low <= against.median <= against.high
        assert 0 < MEASUREMENTS["record_milliseconds"](microbatches).median < 1000


@pytest.mark.contract
def test_a_job_gives_figures_or_the_line_that_names_the_fault() -> None:
    made = jobs.measure_once(Row(OTHER, "a row", 2, ("allreduce", "0.01", "bare", "private")))
    assert 0 < made["low"] <= made["median"] <= made["high"]
    half = jobs.measure_once(Row(OTHER, "a row", 2, ("own_sum", "0.01", "with copies"), sides=2))
    assert 0 < half["low"] <= half["median"] <= half["high"]
    kernels = jobs.run(1, ["-c", "import os; print(os.environ['OPENBLAS_CORETYPE'])"], avx512=False)
    assert kernels.stdout.split() == ["Haswell"]
    failed = jobs.measure_once(Row(OTHER, "a row", 1, ("small_product", "x", "1", "1")))
    assert failed["error"].startswith("exit code 70: mpiml.bench.measurements: ValueError: invalid literal")
