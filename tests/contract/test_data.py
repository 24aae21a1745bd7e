"""Data through the real command: every format on every layout, and bad data refused on all ranks before step 1."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import LIMIT, Job, launch, mpirun
from tests.data import samples
from tests.data.samples import ARRAYS, FORMATS, TABLES

pytestmark = pytest.mark.contract

FLAGS = "--label kind --hidden 8 --microbatches 3 --batch 6 --steps 6"


def refused(job: Job, *words: str) -> None:
    assert job.code == 65, job.err
    assert all(word in job.err for word in words), job.err
    assert len(job.err.strip().splitlines()) == 1, job.err
    assert not job.run.exists()


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_trains_to_the_same_bits_on_any_layout(train: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "d").mkdir()
    spec = FORMATS[name](tmp_path / "d")
    np.savez(tmp_path / "r.npz", **{key: samples.values(name, key) for key in ARRAYS})
    expected = train(1, f"--data {tmp_path / 'r.npz'} {FLAGS}", out="expected")
    for ranks, layout in ((3, ""), (2, "--pipe 2")):
        job = train(ranks, f"--data {spec} {FLAGS} {layout}", out=f"on-{ranks}")
        assert job.code == 0, job.err
        for key in ("weights_sha256", "accuracy", "test_loss"):
            assert job.result[key] == expected.result[key]


@pytest.mark.parametrize("order", ["--shuffle none", "--shuffle blocks --block-rows 3", "--shards strided"])
def test_every_order_has_the_same_bits_on_any_layout_and_when_resumed(train: Any, tmp_path: Path, order: str) -> None:
    flags = f"--microbatches 6 --batch 100 --hidden 8 --epochs 2 --save-every 10 {order}"
    whole = train(1, flags, out="whole")
    assert whole.code == 0, whole.err
    for ranks, layout in ((4, ""), (4, "--pipe 2")):
        assert (
            train(ranks, f"{flags} {layout}", out=f"on{layout}").result["weights_sha256"]
            == whole.result["weights_sha256"]
        )
    cut = train(2, f"{flags} --steps 10".replace("--epochs 2", ""), out="cut")
    assert cut.code == 0, cut.err
    assert train(3, "--resume --steps 30", out="cut").result["weights_sha256"] == whole.result["weights_sha256"]
    assert train(1, flags.replace(order, ""), out="other").result["weights_sha256"] != whole.result["weights_sha256"]


@pytest.mark.parametrize("kind", ["raise", "exit0", "sleep"])
def test_trouble_of_the_thread_that_reads_ahead_ends_the_job(tmp_path: Path, kind: str) -> None:
    arguments = f"0 data {kind} --out {tmp_path / 'run'} --pipe 2 --steps 20 --prefetch 2 --stall-timeout 3".split()
    done = launch(4, str(Path(__file__).with_name("trouble.py")), *arguments, limit=60)
    assert done.returncode == 70
    words = {"raise": "this rank is in trouble (rank 0, step ", "exit0": "sys.exit", "sleep": "rank 0 has made"}
    assert words[kind] in done.stderr


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_reading_ahead_changes_no_bits(train: Any, prefetch: int) -> None:
    flags = "--microbatches 6 --batch 100 --hidden 8 --steps 20 --dropout 0.1"
    expected = train(1, f"{flags} --prefetch 2", out="expected")
    for ranks, layout in ((2, ""), (4, "--pipe 2")):
        job = train(ranks, f"{flags} {layout} --prefetch {prefetch}", out=f"on{layout}")
        assert job.result["weights_sha256"] == expected.result["weights_sha256"]


@pytest.mark.parametrize("order", ["", "--shards strided"])
def test_normalized_inputs_have_the_same_bits_on_any_layout_and_when_resumed(train: Any, order: str) -> None:
    flags = f"--normalize --microbatches 6 --batch 100 --hidden 8 --save-every 10 {order}"
    whole = train(1, f"{flags} --steps 20", out="whole")
    assert whole.code == 0, whole.err
    for ranks, layout in ((4, ""), (4, "--pipe 2 --prefetch 2")):
        found = train(ranks, f"{flags} --steps 20 {layout}", out=f"on{layout}")
        assert found.result["weights_sha256"] == whole.result["weights_sha256"]
        assert found.result["test_loss"] == whole.result["test_loss"]
    assert train(2, f"{flags} --steps 10", out="cut").code == 0
    assert train(3, "--resume --steps 20", out="cut").result["weights_sha256"] == whole.result["weights_sha256"]
    plain = train(1, f"{flags.replace('--normalize', '')} --steps 20", out="plain")
    assert plain.result["weights_sha256"] != whole.result["weights_sha256"]


def test_checkpoint_holds_mean_and_scale_and_a_resumed_run_uses_them(train: Any) -> None:
    from safetensors.numpy import load_file

    from mpiml.data.dataset import open_dataset
    from mpiml.run import checkpoint

    flags = "--normalize --microbatches 4 --hidden 8 --save-every 5"
    whole, cut = train(2, f"{flags} --steps 10", out="whole"), train(2, f"{flags} --steps 5", out="cut")
    digits = open_dataset("digits").train.x
    digits.hold(np.arange(len(digits)))
    x = digits.rows(np.arange(len(digits))).astype(np.float64)
    name = f"checkpoints/{checkpoint.file_name(5)}"
    saved = load_file(cut.run / name)
    np.testing.assert_allclose(saved["data.mean"], x.mean(axis=0), rtol=1e-12)
    deviation = x.std(axis=0)
    np.testing.assert_allclose(saved["data.scale"], 1 / np.where(deviation > 0, deviation, 1), rtol=1e-12)
    loaded = checkpoint.load(cut.run / name)
    arrays = dict(loaded.arrays) | {"data.mean": loaded.arrays["data.mean"] + 1}
    (cut.run / name).unlink()
    checkpoint.save(cut.run / "checkpoints", checkpoint.Checkpoint(5, loaded.config, arrays), 9)
    shifted = train(1, "--resume --steps 10", out="cut")
    assert shifted.code == 0, shifted.err
    assert shifted.result["weights_sha256"] != whole.result["weights_sha256"]


@pytest.mark.parametrize("data", ["digits", "csv"])
def test_transform_has_the_same_bits_on_any_layout(tmp_path: Path, data: str) -> None:
    lines = ["def noisy(x, y, random):", "    return x + random.normal(size=x.shape), y"]
    lines += ["def shorter(x, y, random): return x[1:], y", "def plain(x, y): return x, y"]
    (tmp_path / "my_noise.py").write_text("\n".join(lines) + "\n")
    if data == "csv":
        samples.csv(tmp_path)
    flags = f"--data {tmp_path if data == 'csv' else data} --label kind --microbatches 4 --hidden 8 --steps 9 --batch 9"

    def job(ranks: int, more: str, out: str) -> Job:
        arguments = f"-m mpiml.train --out {tmp_path / out} {flags} {more}".split()
        done = launch(ranks, *arguments, PYTHONPATH=f"{tmp_path}:{Path(__file__).parents[2]}")
        return Job(done.returncode, done.stdout, done.stderr, tmp_path / out)

    expected = job(1, "--transform my_noise:noisy", "expected")
    assert expected.code == 0, expected.err
    for ranks, layout in ((3, "--prefetch 0"), (4, "--pipe 2"), (3, "--pipe 3")):
        found = job(ranks, f"--transform my_noise:noisy {layout}", f"on{layout}".replace(" ", ""))
        assert found.code == 0, found.err
        assert found.result["weights_sha256"] == expected.result["weights_sha256"]
    assert job(1, "", "plain").result["weights_sha256"] != expected.result["weights_sha256"]
    wrong = job(2, "--transform my_noise:shorter", "wrong")
    assert wrong.code == 65
    assert "--transform gave x of shape" in wrong.err
    assert job(2, "--transform my_noise:none", "none").code == 78
    plain = job(2, "--transform my_noise:plain", "not")
    assert (plain.code, plain.run.exists()) == (78, False)
    assert "my_noise:plain(x, y): too many positional arguments; it is called with (x, y, rng)" in plain.err


def test_sorted_labels_are_warned_of(train: Any, tmp_path: Path) -> None:
    y = np.repeat(np.arange(8), 30)
    x = np.random.default_rng(0).random((240, 4))
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    flags = f"--data {tmp_path / 'd.npz'} --hidden 8 --steps 2 --microbatches 8"
    assert "the labels seem to be sorted" in train(2, f"{flags} --pipe 2", out="a").out
    assert "warning" not in train(2, f"{flags} --shards strided", out="b").out


def test_rank_that_read_the_first_bad_row_is_named_though_others_read_bad_rows_too(train: Any, tmp_path: Path) -> None:
    samples.npy(tmp_path)
    x = ARRAYS["x_train"].astype(np.float32)
    x[[10, 21]] = np.inf
    np.save(tmp_path / "x_train.npy", x)
    refused(train(3, f"--data {tmp_path} {FLAGS} --shards strided"), "2 rows hold", "the first is row 10 (rank 1)")


def damaged(path: Path, write: Callable[[Path], Path], file: str, damage: Callable[[Path], object]) -> Path:
    spec = write(path)
    damage(path / file)
    return spec


def row_of_nan(path: Path) -> None:
    array = ARRAYS["x_train"].astype(np.float32)
    array[[9, 22], 1] = np.nan
    np.save(path, array)


BAD: dict[str, tuple[Callable[[Path], Path], str, Callable[[Path], object], list[str]]] = {
    "npy cut": (samples.npy, "x_train.npy", lambda p: p.write_bytes(p.read_bytes()[:-1]), ["declares", "(rank 0)"]),
    "nan": (samples.npy, "x_train.npy", row_of_nan, ["x_train.npy: 2 rows", "first is row 9 (rank 1)"]),
    "label": (
        samples.npy,
        "y_test.npy",
        lambda p: np.save(p, np.full(7, -2)),
        ["y_test.npy: label -2 is below 0", "row 0 (rank "],
    ),
    "gzip": (
        samples.gzipped_idx,
        "train-images-idx3-ubyte.gz",
        lambda p: p.write_bytes(p.read_bytes()[:40] + bytes(200) + p.read_bytes()[240:]),
        ["train-images-idx3-ubyte.gz: damaged", "(rank "],
    ),
    "csv": (
        samples.csv,
        "train.csv",
        lambda p: p.write_text(p.read_text().replace("\n", "\nx", 20)),
        ["train.csv, line 2: could not", "(rank 0)"],
    ),
    "hdf5": (samples.hdf5, "d.h5", lambda p: p.write_bytes(p.read_bytes()[:-1]), ["truncated file", "(rank 0)"]),
    "parquet": (samples.parquet, "test.parquet", Path.unlink, ["test.parquet: No such file", "(rank 0)"]),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_data_are_refused_before_step_1(train: Any, tmp_path: Path, what: str) -> None:
    write, file, damage, words = BAD[what]
    (tmp_path / "d").mkdir()
    spec = damaged(tmp_path / "d", write, file, damage)
    refused(train(3, f"--data {spec} {FLAGS}"), *words)


@pytest.mark.parametrize("change", ["other values", "fewer rows", "damaged"])
def test_file_that_differs_between_ranks(tmp_path: Path, change: str) -> None:
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        samples.npz(tmp_path / str(rank))
    mine = tmp_path / "1" / "d.npz"
    arrays = ARRAYS | ({"x_test": ARRAYS["x_test"] + 1} if change == "other values" else {})
    if change == "fewer rows":
        arrays |= {key: ARRAYS[key][:-1] for key in ("x_test", "y_test")}
    np.savez(mine, **arrays)
    if change == "damaged":
        mine.write_bytes(mine.read_bytes()[:-1])
    (launcher, *_), program = mpirun(1), [sys.executable, "-m", "mpiml.train", "--data", "d.npz", "--hidden", "8"]
    program += ["--out", str(tmp_path / "run")]
    there = [["-n", "1", "-wdir", str(tmp_path / str(rank)), *program] for rank in (0, 1)]
    path = str(Path(__file__).parents[2])
    done = subprocess.run(
        [launcher, *there[0], ":", *there[1]],
        check=False,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env=os.environ | {"PYTHONPATH": path},
    )
    job = Job(done.returncode, done.stdout, done.stderr, tmp_path / "run")
    if change == "damaged":
        refused(job, "d.npz is not an .npz file", "(rank 1)")
    else:
        refused(job, "ranks have different data: d.npz has ", " here, but ", " on rank 0", "(rank 1)")


def test_damage_that_only_a_checksum_shows_is_found_by_rank_0(train: Any, tmp_path: Path) -> None:
    spec, x, y = tmp_path / "d.npz", np.random.default_rng(0).random((2000, 4)), np.arange(2000) % 2
    np.savez(spec, x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
    raw = bytearray(spec.read_bytes())
    raw[raw.index(x.tobytes()) + 30_000] ^= 1
    spec.write_bytes(raw)
    refused(train(2, f"--data {spec} {FLAGS}"), "d.npz: x_train: damaged: Bad CRC-32", "(rank 0)")


CUTTING = """
import os, time
from mpi4py import MPI
from mpiml.data.dataset import Dataset, Split
from mpiml.data.npy import npy_file
from pathlib import Path

class Cut:
    def __init__(self, source):
        self.source, self.name, self.shape, self.dtype, self.reads = source, source.name, source.shape, source.dtype, 0
    def __len__(self):
        return len(self.source)
    def hold(self, rows):
        pass
    def rows(self, indices):
        self.reads += 1
        if self.reads == 40 and MPI.COMM_WORLD.rank == 1:
            os.truncate(self.name, 200)
        elif self.reads >= 40:
            time.sleep(0.3)  # not while the file is cut
        return self.source.rows(indices)

def load():
    x, y = (npy_file(Path(f"{column}_train.npy").absolute()) for column in "xy")
    return Dataset(Split(Cut(x), y), Split(x, y))
"""


@pytest.mark.parametrize("prefetch", [0, 2])
def test_file_cut_short_in_the_middle_of_a_run_ends_it_with_a_reason(tmp_path: Path, prefetch: int) -> None:
    np.save(tmp_path / "x_train.npy", np.random.default_rng(0).random((4000, 6)))
    np.save(tmp_path / "y_train.npy", np.arange(4000) % 2)
    (tmp_path / "cutting.py").write_text(CUTTING)
    flags = f"--out run --data cutting:load --hidden 4 --steps 5000 --eval-every 0 --prefetch {prefetch}".split()
    command = [*mpirun(2), sys.executable, "-m", "mpiml.train", *flags]
    path = f"{tmp_path}:{Path(__file__).parents[2]}"
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
    )
    job = Job(done.returncode, done.stdout, done.stderr, tmp_path / "run")
    assert (job.code, job.result["status"], job.result["exit_code"]) == (65, "failed", 65), job.err
    assert "x_train.npy was cut short while it was read: it holds 200 of 192,128 bytes" in job.result["reason"]


def test_resumed_run_on_changed_data_is_refused(train: Any, tmp_path: Path) -> None:
    spec = samples.npz(tmp_path)
    flags = f"--data {spec} {FLAGS}"
    assert train(2, flags).code == 0
    kept = tmp_path / "kept.npz"
    shutil.copy(spec, kept)
    np.savez(spec, **(ARRAYS | {"x_train": ARRAYS["x_train"] + 1}))
    job = train(2, "--resume --steps 9")
    assert job.code == 65
    assert "d.npz holds other data than the run in" in job.err
    assert (job.result["status"], job.result["exit_code"]) == ("failed", 65)
    shutil.copy(kept, spec)
    assert train(1, "--resume --steps 9").code == 0


def test_data_of_a_function(tmp_path: Path) -> None:
    lines = ["import numpy as np", "from mpiml.data.dataset import Dataset", "def rows():"]
    lines += ["    x, y = np.eye(12), np.arange(12) % 3", "    return Dataset.from_arrays(x, y, x, y)"]
    (tmp_path / "my_rows.py").write_text("\n".join(lines) + "\n")
    arguments = f"--data my_rows:rows --steps 3 --out {tmp_path / 'run'}".split()
    done = launch(2, "-m", "mpiml.train", *arguments, PYTHONPATH=f"{tmp_path}:{Path(__file__).parents[2]}")
    assert done.returncode == 0, done.stderr
    done = launch(2, "-m", "mpiml.train", "--data", "none:rows", "--out", str(tmp_path / "r2"))
    assert done.returncode == 78
    assert "no module none" in done.stderr


def test_tables_need_a_label(train: Any, tmp_path: Path) -> None:
    for name in TABLES:
        (tmp_path / name).mkdir()
        refused(train(2, f"--data {TABLES[name](tmp_path / name)}"), "with --label; there are", "(rank 0)")
