"""Checkpoints of a loop of one's own: what was saved comes back on all ranks, and what is damaged is skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.errors import ConfigError, OutputError
from mpiml.loop.checkpoints import Checkpoints
from mpiml.run import verified
from tests.chaos.disk import Disk, Tree, build, recorded
from tests.conftest import launch
from tests.forging import write_before

COMM = MPI.COMM_WORLD


class Pair(NamedTuple):
    mean: Any
    count: Any


STATE = {
    "layers": [np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((0, 4)), np.array(np.inf)],
    "moments": Pair(np.arange(3)[::-1], 7),
    "mask": np.array([True, False]),
    "rate": 0.1,
    "swapped": np.arange(3, dtype=">f8"),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """One for all ranks."""
    shared: Path = COMM.bcast(tmp_path / "runs" / "checkpoints")
    return shared


@pytest.mark.mpi
def test_what_was_saved_comes_back_on_all_ranks(directory: Path) -> None:
    checkpoints = Checkpoints(directory)
    assert checkpoints.newest() is None
    checkpoints.save(5, STATE if COMM.rank == 0 else None, {"note": "five", "list": [1, None]})
    saved = checkpoints.newest()
    assert saved
    assert (saved.step, saved.meta) == (5, {"note": "five", "list": [1, None]})
    assert sorted(saved.arrays) == sorted(
        ["layers.0", "layers.1", "layers.2", "moments.0", "moments.1", "mask", "rate", "swapped"]
    )
    back = saved.into({**STATE, "swapped": np.zeros(3)})
    for got, was in ((back["layers"], STATE["layers"]), (back["moments"], STATE["moments"])):
        assert all(
            np.array_equal(a, b) and np.asarray(a).dtype == np.asarray(b).dtype for a, b in zip(got, was, strict=True)
        )
    assert isinstance(back["moments"], Pair)
    assert (back["rate"], type(back["rate"]), back["moments"].count) == (0.1, float, 7)
    assert back["mask"].tolist() == [True, False]
    back["layers"][0][:] = 1  # it is one's own


@pytest.mark.mpi
def test_the_newest_are_kept_and_a_damaged_one_is_skipped(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = Checkpoints(directory, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, {"w": np.full(4, step)})
    if COMM.rank == 0:
        assert sorted(path.name for path in directory.iterdir()) == [
            "step-000000002.safetensors",
            "step-000000003.safetensors",
        ]
        newest = directory / "step-000000003.safetensors"
        content = bytearray(newest.read_bytes())
        content[-1] ^= 1
        newest.write_bytes(content)
        (directory / ".step-000000004.safetensors.ab.partial").touch()
    again = Checkpoints(directory)
    saved = again.newest()
    assert saved
    assert (saved.step, saved.arrays["w"].tolist()) == (2, [2] * 4)
    said = capsys.readouterr().err
    assert (f"warning: skipped {directory}/step-000000003.safetensors is damaged: w does not match" in said) == (
        COMM.rank == 0
    )
    again.save(3, {"w": np.full(4, 3)})
    saved = again.newest()
    assert saved
    assert saved.step == 3
    if COMM.rank == 0:
        names = sorted(path.name for path in directory.iterdir())
        assert names[-1] == "step-000000003.safetensors"
        assert not any(name.endswith(".partial") for name in names)


def test_a_checkpoint_with_one_sha256_of_all_comes_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, MPI.COMM_SELF)
    checkpoints.save(1, {"w": np.arange(4.0)}, meta={"a": 1})
    (file,) = tmp_path.iterdir()
    arrays, contents = verified.read(file, lambda name: True)
    write_before(file, arrays, contents.texts)
    saved = checkpoints.newest()
    assert saved
    assert (saved.step, saved.meta, saved.arrays["w"].tolist()) == (1, {"a": 1}, [0, 1, 2, 3])
    content = file.read_bytes()
    file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    with pytest.raises(OutputError, match="its content does not match its SHA-256"):
        checkpoints.newest()


@pytest.mark.mpi
def test_ranks_fail_together_where_nothing_can_be_used(directory: Path) -> None:
    checkpoints = Checkpoints(directory)
    if COMM.rank == 0:
        (directory / "step-000000001.safetensors").write_bytes(b"nothing")
        verified.write(directory / "step-000000002.safetensors", {"w": np.zeros(1)}, {"format": "mpiml-1"})
    with pytest.raises(
        OutputError, match=r"no checkpoint in .*step-000000002.* is not a checkpoint of a loop"
    ) as error:
        checkpoints.newest()
    assert error.value.everywhere


@pytest.mark.mpi
def test_ranks_fail_together_where_nothing_can_be_written(directory: Path) -> None:
    checkpoints = Checkpoints(directory)
    if COMM.rank == 0:
        directory.rmdir()
        directory.write_text("a file")
    with pytest.raises(OutputError, match=r"cannot write the checkpoint .*/step-000000001.safetensors: Not a") as error:
        checkpoints.save(1, {"w": np.zeros(1)})
    assert (error.value.everywhere, error.value.rank) == (True, 0)
    with pytest.raises(OutputError, match=r"cannot create .*/checkpoints: File exists") as error:
        Checkpoints(directory)
    assert error.value.everywhere


@pytest.mark.parametrize(
    ("step", "arrays", "meta", "words"),
    [
        (-1, {}, {}, "save: step -1: must be a whole number"),
        (1.5, {}, {}, "save: step 1.5"),
        (10**18, {}, {}, "at most 18 digits"),
        (1, {}, [1], "meta is a list: must be a dict"),
        (1, {"a": {"b": 1}, "a.b": 2}, {}, "the name 'a.b': two arrays have it"),
        (1, {"__metadata__": np.zeros(1)}, {}, "the name '__metadata__': files cannot have it"),
        (1, {"\ud800": 1}, {}, "files cannot have it"),
        (1, {"w": np.zeros(1)}, {"a": float("nan")}, "meta is not what JSON can say"),
        (1, {"w": np.zeros(1)}, {"a": np.zeros(1)}, "meta is not what JSON can say"),
        (1, {"w": np.zeros(1, complex)}, {}, "w is complex128"),
        (1, {"names": np.array(["a"])}, {}, "names is <U1, .*: save numbers of NumPy's own types, and texts in `meta`"),
        (1, {"w": [object()]}, {}, r"w\.0"),
    ],
)
def test_what_cannot_be_saved_is_one_line(tmp_path: Path, step: Any, arrays: Any, meta: Any, words: str) -> None:
    checkpoints = Checkpoints(tmp_path, COMM.Split(COMM.rank))
    with pytest.raises(ConfigError, match=words):
        checkpoints.save(step, arrays, meta)
    assert list(tmp_path.iterdir()) == []


def test_types_that_numpy_has_not_are_refused(tmp_path: Path) -> None:
    """They could be written, but not be read again."""
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    with pytest.raises(ConfigError, match="w is bfloat16, which checkpoints cannot hold"):
        Checkpoints(tmp_path, MPI.COMM_SELF).save(1, {"w": np.ones(4, bfloat16)})


def test_other_forms_are_refused(tmp_path: Path) -> None:
    alone = COMM.Split(COMM.rank)
    for settings, words in (
        ({"keep": 0}, "keep 0: must be a whole number, 1 or more"),
        ({"keep": "3"}, "keep '3'"),
        ({"directory": None}, "directory None: must be a path"),
        ({"directory": "a\0b"}, "must be a path"),
        ({"comm": "world"}, "comm is a str: must be a communicator"),
        ({"comm": MPI.COMM_NULL}, "comm is MPI.COMM_NULL"),
    ):
        with pytest.raises(ConfigError, match=words):
            Checkpoints(**{"directory": tmp_path, "comm": alone, **settings})
    checkpoints = Checkpoints(tmp_path, alone)
    checkpoints.save(1, {"w": np.zeros(3), "b": 1})
    saved = checkpoints.newest()
    assert saved
    for like, words in (
        ({"w": np.zeros(3)}, "b is in the checkpoint alone"),
        ({"w": np.zeros(3), "b": 1, "c": 1}, "c is not in the checkpoint"),
        ({"w": np.zeros(4), "b": 1}, r"w is float64 \(3,\), not float64 \(4,\)"),
        ({"w": np.zeros(3, np.float32), "b": 1}, "w is float64"),
    ):
        with pytest.raises(ConfigError, match=words):
            saved.into(like)


SAVES = (1, 2, 2, 3, 3)  # the steps of a program that goes on after each second one
RECORDED = f"""
import os
import sys
import numpy as np
from mpiml.api import Checkpoints
from tests.chaos import shim
shim.SHIM = shim.Shim(sys.argv[1], sys.argv[2], "")
shim.SHIM.install()
for number, step in enumerate({SAVES}, 1):
    if number % 2:
        checkpoints = Checkpoints(f"{{sys.argv[1]}}/checkpoints", keep=2)
    checkpoints.save(step, np.full(2, number))
    os.mkdir(f"{{sys.argv[1]}}/returned-{{number}}")
"""


@pytest.mark.contract
def test_after_a_crash_at_any_moment_the_state_before_or_the_new_one_is_there(tmp_path: Path) -> None:
    done = launch(0, "-c", RECORDED, str(tmp_path / "run"), str(tmp_path / "calls"))
    assert done.returncode == 0, done.stderr
    disk, returned, states = Disk(), 0, dict[object, tuple[int, Tree]]()
    for call in recorded(tmp_path / "calls"):
        trees = list(disk.within(call))
        disk.follow(call)
        trees += [disk.now(), *disk.after_power_failure(journal=True), *disk.after_power_failure(journal=False)]
        returned = max(returned, int(call["path"].partition("returned-")[2] or 0))
        states |= {(returned, frozenset(tree.items())): (returned, tree) for tree in trees}
    assert len(states) > 50
    assert returned == len(SAVES)
    for number, (returned, tree) in enumerate(states.values()):
        build(tree, tmp_path / f"{number}")
        saved = Checkpoints(tmp_path / f"{number}" / "checkpoints", MPI.COMM_SELF).newest()
        assert (saved.arrays["the array"][0] if saved else 0) in (returned, returned + 1)


def test_saved_again_a_step_has_the_new_arrays(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, COMM.Split(COMM.rank))
    for value in (1.0, 2.0):
        checkpoints.save(np.int64(4), {"w": value}, {"value": value})
    saved = checkpoints.newest()
    assert saved
    assert (saved.step, saved.meta, saved.arrays["w"].tolist()) == (4, {"value": 2.0}, 2.0)


@pytest.mark.mpi
@pytest.mark.skipif(COMM.size == 1, reason="ranks must differ")
def test_ranks_that_differ_are_named(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"ranks differ in directory: \S+/of-1 \(rank 1 on .*/of-0 \(rank 0\)"):
        Checkpoints(f"{directory}/of-{COMM.rank}")
    checkpoints = Checkpoints(directory)
    with pytest.raises(ConfigError, match=r"ranks differ in the step that is saved: 6 \(rank 1 on .* 5 \(rank 0\)"):
        checkpoints.save(5 + COMM.rank, np.zeros(3))
    assert list(directory.iterdir()) == []
