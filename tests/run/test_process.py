"""Settings of a process: the work area of BLAS is in memory before anything is computed."""

from __future__ import annotations

import json

import pytest

from tests.conftest import launch

FAULTS = """
import json, resource
import numpy as np
from mpiml.run.process import prepare_process

prepare_process({threads})
counts = []
for dtype in ("float32", "float64"):
    x, w, y = (np.ones(shape, dtype) for shape in ((32, 256), (256, 256), (32, 256)))
    resource.getrusage(resource.RUSAGE_SELF)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.matmul(x, w, out=y)
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps(counts))
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_the_first_product_finds_the_pages_of_blas(threads: int) -> None:
    """Without them it makes some dozens of page faults, and on some processors it is slow each time."""
    done = launch(0, "-c", FAULTS.format(threads=threads))
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout)) < 10
