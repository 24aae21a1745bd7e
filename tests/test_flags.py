"""Settings that are time limits."""

from __future__ import annotations

import math

import pytest

from mpiml import flags
from mpiml.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("1:30", 90),
        ("1:30:00", 5400),
        ("2-0", 2 * 86400),
        ("1-2:30", 86400 + 9000),
        ("1-02:03:04", 86400 + 7384),
        ("0:05", 5),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert flags.seconds(text, "--time-limit") == seconds


@pytest.mark.parametrize("text", ["", "x", "1:2:3:4", "-1", "1.5", "1h", "1-", "1:"])
def test_other_time_limits_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^--time-limit {text}: must be minutes"):
        flags.seconds(text, "--time-limit")


def test_no_time_limit_is_never_reached() -> None:
    assert flags.seconds(None, "--time-limit") == math.inf
