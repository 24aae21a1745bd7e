"""Data through the real command: bad data are refused on all ranks before step 1."""

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

from tests.conftest import COMMANDS, LIMIT, Job, jobs_of, launch, launch_all, mpirun, write_commands
from tests.data import samples
from tests.data.samples import ARRAYS
from tests.forging import save

pytestmark = pytest.mark.contract

FLAGS = "--label kind --hidden 8 --microbatches 3 --batch 6 --steps 6"


def refused(job: Job, *words: str) -> None:
    assert job.code == 65, job.err
    assert all(word in job.err for word in words), job.err
    assert len(job.err.strip().splitlines()) == 1, job.err
    assert not job.run.exists()


@pytest.mark.parametrize("kind", ["raise", "exit0", "sleep"])
def test_trouble_of_the_thread_that_reads_ahead_ends_the_job(tmp_path: Path, kind: str) -> None:
    arguments = f"0 data {kind} --out {tmp_path / 'run'} --pipe 2 --steps 20 --prefetch 2 --stall-timeout 3".split()
    done = launch(4, str(Path(__file__).with_name("trouble.py")), *arguments, limit=60)
    assert done.returncode == 70
    words = {"raise": "this rank is in trouble (rank 0, step ", "exit0": "sys.exit", "sleep": "rank 0 has made"}
    assert words[kind] in done.stderr


def test_checkpoint_holds_mean_and_scale_and_a_resumed_run_uses_them(train: Any) -> None:
    from safetensors.numpy import load_file

    from mpiml.data.dataset import open_dataset
    from mpiml.run import checkpoint, step_files

    flags = "--normalize --microbatches 4 --hidden 8 --save-every 5"
    whole, cut = train(0, f"{flags} --steps 10", out="whole"), train(0, f"{flags} --steps 5", out="cut")
    digits = open_dataset("digits").train.x
    digits.hold(np.arange(len(digits)))
    x = digits.rows(np.arange(len(digits))).astype(np.float64)
    name = f"checkpoints/{step_files.file_name(5)}"
    saved = load_file(cut.run / name)
    np.testing.assert_allclose(saved["data.mean"], x.mean(axis=0), rtol=1e-12)
    deviation = x.std(axis=0)
    np.testing.assert_allclose(saved["data.scale"], 1 / np.where(deviation > 0, deviation, 1), rtol=1e-12)
    loaded = checkpoint.load(cut.run / name)
    arrays = dict(loaded.arrays) | {"data.mean": loaded.arrays["data.mean"] + 1}
    (cut.run / name).unlink()
    save(cut.run / "checkpoints", 5, arrays, loaded.config, keep=9)
    shifted = train(0, "--resume --steps 10", out="cut")
    assert shifted.code == 0, shifted.err
    assert shifted.result["weights_sha256"] != whole.result["weights_sha256"]


TRANSFORMS = """
def shorter(x, y, random):
    return x[1:], y

def plain(x, y):
    return x, y
"""


def test_transforms_that_are_none_are_refused(train_all: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TRANSFORMS)
    flags = "--microbatches 4 --hidden 8 --steps 9 --batch 9 --transform"
    names = ("none", "plain", "shorter")  # which one rank alone may notice, and ends the job
    none, plain, wrong = train_all(2, *(f"{flags} mine:{name}" for name in names), PYTHONPATH=str(tmp_path))
    assert wrong.code == 65
    assert "--transform gave x of shape" in wrong.err
    assert none.code == 78
    assert (plain.code, plain.run.exists()) == (78, False)
    assert "mine:plain(x, y): too many positional arguments; it is called with (x, y, rng)" in plain.err


def test_sorted_labels_are_warned_of(train_all: Any, tmp_path: Path) -> None:
    y = np.repeat(np.arange(8), 30)
    x = np.random.default_rng(0).random((240, 4))
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    flags = f"--data {tmp_path / 'd.npz'} --hidden 8 --steps 2 --microbatches 8"
    in_order, strided = train_all(2, f"{flags} --pipe 2", f"{flags} --shards strided")
    assert "the labels seem to be sorted" in in_order.out
    assert "warning" not in strided.out


def row_of_nan(path: Path) -> None:
    array = ARRAYS["x_train"].astype(np.float32)
    array[[9, 22], 1] = np.nan
    np.save(path, array)


def infinite_rows(path: Path) -> None:
    array = ARRAYS["x_train"].astype(np.float32)
    array[[10, 21]] = np.inf
    np.save(path, array)


def many_rows(path: Path) -> Path:
    x, y = np.random.default_rng(0).random((2000, 4)), np.arange(2000) % 2
    np.savez(path / "d.npz", x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
    return path / "d.npz"


def flip(path: Path) -> None:
    """Change a bit in the middle of x_train, which only a checksum shows."""
    raw = bytearray(path.read_bytes())
    raw[raw.index(np.load(path)["x_train"].tobytes()) + 30_000] ^= 1
    path.write_bytes(raw)


def far_apart(path: Path) -> None:
    np.save(path, np.arange(len(ARRAYS["y_train"])) * 10**9)


# How a data set is written, which file of it is damaged and how, more flags, and words of the refusal.
Damage = Callable[[Path], object]
BAD: dict[str, tuple[Callable[[Path], Path], str, Damage, str, list[str]]] = {
    "npy cut": (samples.npy, "x_train.npy", lambda p: p.write_bytes(p.read_bytes()[:-1]), "", ["declares", "(rank 0)"]),
    "nan": (samples.npy, "x_train.npy", row_of_nan, "", ["x_train.npy: 2 rows", "first is row 9 (rank 1)"]),
    "nan on a pipe": (samples.npy, "x_train.npy", row_of_nan, "--pipe 3", ["x_train.npy: 2 rows", "row 9 (rank 0)"]),
    "others read bad rows too": (
        samples.npy,
        "x_train.npy",
        infinite_rows,
        "--shards strided",
        ["2 rows hold", "the first is row 10 (rank 1)"],
    ),
    "label": (
        samples.npy,
        "y_test.npy",
        lambda p: np.save(p, np.full(7, -2)),
        "",
        ["y_test.npy: label -2 is below 0", "row 0 (rank "],
    ),
    "labels far apart": (samples.npy, "y_train.npy", far_apart, "", ["--loss mse"]),
    "gzip": (
        samples.gzipped_idx,
        "train-images-idx3-ubyte.gz",
        lambda p: p.write_bytes(p.read_bytes()[:40] + bytes(200) + p.read_bytes()[240:]),
        "",
        ["train-images-idx3-ubyte.gz: damaged", "(rank "],
    ),
    "csv": (
        samples.csv,
        "train.csv",
        lambda p: p.write_text(p.read_text().replace("\n", "\nx", 1)),
        "",
        ["train.csv, line 2: column a holds 'x", "(rank 0)"],
    ),
    "hdf5": (samples.hdf5, "d.h5", lambda p: p.write_bytes(p.read_bytes()[:-1]), "", ["truncated file", "(rank 0)"]),
    "parquet": (samples.parquet, "train.parquet", Path.unlink, "", ["train.parquet: No such file", "(rank 0)"]),
    "checksum": (many_rows, "d.npz", flip, "", ["d.npz: x_train: damaged: Bad CRC-32", "(rank 0)"]),
    "csv without a label": (samples.csv, "", Path.exists, "NO LABEL", ["with --label; there are", "(rank 0)"]),
    "parquet without a label": (samples.parquet, "", Path.exists, "NO LABEL", ["with --label; there are", "(rank 0)"]),
}


@pytest.fixture(scope="module")
def jobs_on_bad_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """All of them are refused one after the other in one job."""
    commands = []
    for what, (write, file, damage, more, _) in BAD.items():
        path = tmp_path_factory.mktemp(what.replace(" ", "-"))
        spec = write(path)
        damage(path / file)
        flags = FLAGS.replace("--label kind", "") if more == "NO LABEL" else f"{FLAGS} {more}"
        commands.append((path / "run", f"--data {spec} {flags}"))
    return dict(zip(BAD, launch_all(3, commands), strict=True))


@pytest.mark.parametrize("what", BAD)
def test_bad_data_are_refused_before_step_1(jobs_on_bad_data: dict[str, Job], what: str) -> None:
    refused(jobs_on_bad_data[what], *BAD[what][-1])


def test_files_that_differ_between_ranks(tmp_path: Path) -> None:
    """Each rank has a working directory of its own, with a file of each name."""
    changed = {
        "values": ARRAYS | {"x_test": ARRAYS["x_test"] + 1},
        "rows": ARRAYS | {key: ARRAYS[key][:-1] for key in ("x_test", "y_test")},
        "damaged": ARRAYS,
    }
    for name, arrays in changed.items():
        for rank, content in enumerate((ARRAYS, arrays)):
            (tmp_path / str(rank)).mkdir(exist_ok=True)
            np.savez(tmp_path / str(rank) / f"{name}.npz", **content)
    damaged = tmp_path / "1" / "damaged.npz"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    commands = [(tmp_path / "runs" / name, f"--data {name}.npz --hidden 8") for name in changed]
    file = write_commands(tmp_path / "commands", commands)
    (launcher, *_), path = mpirun(1), str(Path(__file__).parents[2])
    there = [["-n", "1", "-wdir", str(tmp_path / str(rank)), sys.executable, COMMANDS, file] for rank in (0, 1)]
    command, environment = [launcher, *there[0], ":", *there[1]], os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=LIMIT, env=environment, stdin=subprocess.DEVNULL
    )
    values, rows, damaged_one = jobs_of(file, commands, done)
    for job, name in ((values, "values"), (rows, "rows")):
        refused(job, f"ranks have different data: {name}.npz has ", " here, but ", " on rank 0", "(rank 1)")
    refused(damaged_one, "damaged.npz is not an .npz file", "(rank 1)")


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
    assert train(0, flags).code == 0
    kept = tmp_path / "kept.npz"
    shutil.copy(spec, kept)
    np.savez(spec, **(ARRAYS | {"x_train": ARRAYS["x_train"] + 1}))
    job = train(2, "--resume --steps 9")
    assert job.code == 65
    assert "d.npz holds other data than the run in" in job.err
    assert (job.result["status"], job.result["exit_code"]) == ("failed", 65)
    shutil.copy(kept, spec)
    assert train(0, "--resume --steps 9").code == 0


def test_data_of_a_function(train_all: Any, tmp_path: Path) -> None:
    lines = ["import numpy as np", "from mpiml.data.dataset import Dataset", "def rows():"]
    lines += ["    x, y = np.eye(12), np.arange(12) % 3", "    return Dataset.from_arrays(x, y, x, y)"]
    (tmp_path / "my_rows.py").write_text("\n".join(lines) + "\n")
    done, none = train_all(2, "--data my_rows:rows --steps 3", "--data none:rows", PYTHONPATH=str(tmp_path))
    assert done.code == 0, done.err
    assert none.code == 78
    assert "no module none" in none.err
