"""Rows in tiles that stay in a core's cache: several passes over a tile cost little more than one."""

from collections.abc import Iterator

CACHE = 1 << 16  # bytes of a tile of one array; a layer works on about six arrays at once


def tiles(rows: int, row_bytes: int, cache: int = CACHE) -> Iterator[slice]:
    """Slices that cover `rows` rows in order, each of about `cache` bytes and at least one row."""
    step = max(cache // max(row_bytes, 1), 1)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
