"""Settings that are paths."""

from __future__ import annotations

import glob
from pathlib import Path

import pytest

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
