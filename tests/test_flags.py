"""Settings that are paths, or time limits."""

from __future__ import annotations

import glob
import math
from pathlib import Path

import pytest

from mpiml import flags
from mpiml.errors import ConfigError
from mpiml.flags import absolute


def test_paths_are_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, elsewhere = tmp_path / "job [1]", tmp_path / "other"
    for directory in (here / "src" / "deep", elsewhere):
        directory.mkdir(parents=True)
    for name in ("d[1].npz", "src/a.py", "src/deep/b.py"):
        (here / name).write_text("")
    monkeypatch.chdir(here)
    file, directory, pattern = absolute("d[1].npz"), absolute("src"), absolute("src/**/*.py")
    monkeypatch.chdir(elsewhere)
    assert (file, directory) == (str(here / "d[1].npz"), str(here / "src"))
    assert sorted(glob.glob(pattern, recursive=True)) == [str(here / "src/a.py"), str(here / "src/deep/b.py")]
    assert [absolute(path) for path in (file, directory, pattern)] == [file, directory, pattern]


@pytest.mark.parametrize("spec", ["digits", "mydata:load", "my.data:sets.load"])
def test_what_is_no_path_stays(spec: str) -> None:
    assert absolute(spec) == spec


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
