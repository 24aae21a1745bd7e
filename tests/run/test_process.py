"""Settings of a process: what is asked of the C library's malloc."""

from __future__ import annotations

from mpiml.run import process
from mpiml.run.process import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, keep_freed_memory


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


def test_freed_memory_stays_whatever_the_c_library_takes() -> None:
    new, old, other = Malloc(1 << 40), Malloc(32 << 20), Malloc(0)  # glibc from 2.35 on, glibc before, another library
    for malloc in (new, old, other):
        keep_freed_memory(malloc)
    assert new.settings == {M_MMAP_THRESHOLD: process.KEEP, M_TRIM_THRESHOLD: process.KEEP}
    assert old.settings == {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: process.KEEP}
    assert other.settings == {}  # a trim threshold alone would have every large array mapped anew
