"""Cutting a range into nearly equal parts, the one way it is done everywhere."""


def part(index: int, parts: int, total: int) -> tuple[int, int]:
    """The index-th of `parts` contiguous, nearly equal parts of 0..total-1, as (start, stop)."""
    return total * index // parts, total * (index + 1) // parts
