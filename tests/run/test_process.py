"""Settings of a process: the work area of BLAS, and what is asked of the C library's malloc."""

from __future__ import annotations

import json

import pytest

from mpiml.run import process
from mpiml.run.process import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, StopRequest, keep_freed_memory
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


class Malloc:
    """The mallopt of a C library that takes an M_MMAP_THRESHOLD up to `most`."""

    def __init__(self, most: int):
        self.most = most
        self.settings: dict[int, int] = {}

    def __call__(self, option: int, size: int) -> int:
        if option == M_MMAP_THRESHOLD and size > self.most:
            return 0
        self.settings[option] = size
        return 1


def test_a_stop_request_that_another_rank_passes_on_counts_at_any_time() -> None:
    for look in (StopRequest.now, StopRequest.at_once):
        stop = StopRequest()
        assert not look(stop)
        stop.others = lambda: True
        assert look(stop)
        assert stop.reason() == "asked to stop by a signal"


def test_freed_memory_stays_whatever_the_c_library_takes() -> None:
    new, old, other = Malloc(1 << 40), Malloc(32 << 20), Malloc(0)  # glibc from 2.35 on, glibc before, another library
    for malloc in (new, old, other):
        keep_freed_memory(malloc)
    assert new.settings == {M_MMAP_THRESHOLD: process.KEEP, M_TRIM_THRESHOLD: process.KEEP}
    assert old.settings == {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: process.KEEP}
    assert other.settings == {}  # a trim threshold alone would have every large array mapped anew
