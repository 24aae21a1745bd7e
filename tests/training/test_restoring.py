"""What a run begins with, and goes on from: files that anybody may have written, or that lie elsewhere now."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from safetensors.numpy import load_file

from mpiml.config import Config, parse
from mpiml.errors import ConfigError, DataError, OutputError
from mpiml.evaluate import evaluate
from mpiml.nn import base as nn
from mpiml.nn.layers import Linear
from mpiml.nn.losses import R2, mean_squared_error
from mpiml.nn.parameters import Layout
from mpiml.run import checkpoint, step_files
from mpiml.run.checkpoint import Checkpoint
from mpiml.run.contents import contents_in
from mpiml.train import train
from mpiml.training.constants import Constants
from mpiml.training.model import Scoring
from mpiml.training.place import BuiltModel
from mpiml.training.restoring import check_saved
from mpiml.training.task import Task
from tests.data import samples
from tests.forging import ARRAYS, forge, in_format_before, save_changed

SHORT: dict[str, Any] = {"steps": 6, "hidden": (4,), "log_every": 1, "eval_every": 2, "save_every": 2, "quiet": True}


def test_metrics_are_left_alone_when_checkpoints_are_gone(tmp_path: Path) -> None:
    config = Config(**SHORT, out=str(tmp_path))
    train(config)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for path in (tmp_path / "checkpoints").iterdir():
        path.unlink()
    for _ in range(2):
        with pytest.raises(OutputError, match="are gone, of which the last was of step 6"):
            train(config.replace(steps=8, resume=True))
        assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_arrays_of_the_newest_checkpoint_alone_are_read_and_once(tmp_path: Path, monkeypatch: Any) -> None:
    """But mean and deviation of the inputs, which are needed before the model is made too."""
    read = dict[int, int]()
    config = Config(**SHORT, normalize=True, out=str(tmp_path))
    train(config)
    monkeypatch.setattr(os, "preadv", functools.partial(counted, read, os.preadv))
    train(config.replace(steps=8, save_every=0, resume=True))
    contents = contents_in(tmp_path / "checkpoints" / "step-000000006.safetensors")
    twice = {contents.starts[name] for name in ("data.mean", "data.scale")}
    assert sum(read.values()) == contents.size - contents.first + 2 * 64 * 8
    assert all(read[start] == 2 * 64 * 8 for start in twice)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    assert train(config.replace(out=str(tmp_path / "empty"), resume=True))["step"] == 6


def counted(read: dict[int, int], preadv: Any, descriptor: int, into: Any, at: int) -> int:
    """Count the bytes that are read from each place in files."""
    count: int = preadv(descriptor, into, at)
    read[at] = read.get(at, 0) + count
    return count


def test_lines_that_a_power_failure_took_are_named(tmp_path: Path, capsys: Any) -> None:
    config = Config(**SHORT, out=str(tmp_path))
    train(config)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:3]))  # steps 1, 2, evaluation 2
    train(config.replace(steps=8, resume=True, quiet=False))
    assert "metrics.jsonl has lost its lines of steps 3 to 6" in capsys.readouterr().out


def test_what_a_run_has_reached_outlives_a_refusal(tmp_path: Path) -> None:
    """A checkpoint of another run has come into its directory."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    before = train(Config(**SHORT, out=str(mine)))
    train(Config(**SHORT | {"lr": 0.5}, out=str(other)))
    shutil.copy(other / "checkpoints" / "step-000000006.safetensors", mine / "checkpoints")
    with open(mine / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 7, "loss": 1.0}\n')  # which a resume after step 6 would cut off
    before_files = [(mine / name).read_bytes() for name in ("config.toml", "metrics.jsonl")]
    with pytest.raises(OutputError, match="they are of different runs"):
        train(Config(**SHORT | {"steps": 8}, out=str(mine), resume=True))
    result = json.loads((mine / "result.json").read_text())
    assert result["status"] == "failed"
    assert {name: result[name] for name in ("accuracy", "weights_sha256")} == {
        name: before[name] for name in ("accuracy", "weights_sha256")
    }
    assert [(mine / name).read_bytes() for name in ("config.toml", "metrics.jsonl")] == before_files


def test_a_refused_job_leaves_what_the_last_one_has_reached(tmp_path: Path) -> None:
    before = train(Config(**SHORT, out=str(tmp_path)))
    with pytest.raises(ConfigError, match="--batch 7"):
        train(Config(batch=7, steps=8, resume=True, out=str(tmp_path), given=frozenset({"batch", "steps"})))
    after = json.loads((tmp_path / "result.json").read_text())
    assert (after["status"], after["exit_code"], after["step"]) == ("failed", 78, 6)
    assert {key: after[key] for key in ("accuracy", "loss", "weights_sha256", "saved")} == {
        key: before[key] for key in ("accuracy", "loss", "weights_sha256", "saved")
    }


TASK = Task((4,), (), True, 3, 0)


def layouts(*layers: Linear) -> list[Layout]:
    """A stage for each layer."""
    nn.name(layers)
    return [Layout(nn.parameters([layer]), "float32") for layer in layers]


def built(stages: list[Layout]) -> BuiltModel:
    return BuiltModel(TASK, stages, Scoring(mean_squared_error, R2(3), None), Constants(), (1, ""), [])


def resumed(file: Path) -> Config:
    return parse(["--resume", "--out", str(file.parent.parent)])


def test_shapes_are_compared_before_memory_is_asked_for(tmp_path: Path) -> None:
    huge = layouts(Linear(4, 10**12), Linear(10**12, 3))
    file = forge(tmp_path / "small.safetensors")
    for config in (Config(init=str(file)), resumed(forge(tmp_path / "run" / "checkpoints" / step_files.file_name(6)))):
        with pytest.raises(OutputError, match=r"layers.0.weight is float32 \(4, 3\), the model's float32 \(4, 10+\)"):
            check_saved(config, built(huge))


def test_a_longer_model_is_another_one(tmp_path: Path) -> None:
    more = {"layers.1.weight": np.ones((3, 3), "f")}
    first = forge(tmp_path / "longer.safetensors", arrays=ARRAYS | more | {"optimizer.mean.layers.0.bias": np.ones(3)})
    newest = forge(tmp_path / "run" / "checkpoints" / step_files.file_name(6), arrays=ARRAYS | more)
    for config in (Config(init=str(first)), resumed(newest)):
        with pytest.raises(OutputError, match=r"safetensors has layers.1.weight, which the model does not have"):
            check_saved(config, built(layouts(Linear(4, 3))))
    forge(newest)
    for config in (Config(init=str(newest)), resumed(newest), parse(["--resume", "--out", str(tmp_path / "new")])):
        check_saved(config, built(layouts(Linear(4, 3))))


FLAGS: dict[str, Any] = {"hidden": (8,), "batch": 20, "microbatches": 2, "quiet": True}


FIRST = "first/checkpoints/step-000000002.safetensors"


ENDS = ("first", 2), ("head", 2), ("all", 1)


def job(**settings: Any) -> dict[str, Any]:
    """What becomes of a job of one rank."""
    return train(Config(**FLAGS | settings), MPI.COMM_SELF)


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory in which a run began, all of whose paths were given as they are from there."""
    samples.npz(tmp_path)
    monkeypatch.chdir(tmp_path)
    job(data="d.npz", steps=2, out="first")
    job(data="d.npz", steps=4, out="run", init=FIRST)
    return tmp_path


def test_another_directory_and_a_place_of_its_own_for_each_jobs_data(
    begun: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = job(data="d.npz", steps=8, out="whole", init=FIRST)
    shutil.rmtree("first")
    monkeypatch.chdir(tmp_path_factory.mktemp("other"))
    run = str(begun / "run")
    assert job(out=run, resume=True, steps=6)["step"] == 6
    shutil.move(begun / "d.npz", "d.npz")
    with pytest.raises(
        DataError, match=r"cannot read .*d.npz: No such file.*; if the run's data lie elsewhere .* by --data$"
    ):
        job(out=run, resume=True, steps=8)
    goes_on = job(out=run, resume=True, steps=8, data="d.npz", init="no.safetensors")
    assert goes_on["weights_sha256"] == whole["weights_sha256"]


def scored(run: str) -> dict[str, Any]:
    return evaluate(run, comm=MPI.COMM_SELF)


def test_a_run_goes_on_from_a_checkpoint_in_the_format_before(begun: Path) -> None:
    whole, score = job(data="d.npz", steps=8, out="whole", init=FIRST), scored("run")
    for file in Path("run/checkpoints").iterdir():
        in_format_before(file)
    assert scored("run") == score
    assert job(out="run", resume=True, steps=8)["weights_sha256"] == whole["weights_sha256"]
    in_format_before(Path(FIRST))
    assert job(data="d.npz", steps=8, out="again", init=FIRST)["weights_sha256"] == whole["weights_sha256"]


def damage(file: Path, name: str) -> None:
    """Change a byte of an array."""
    content = bytearray(file.read_bytes())
    content[contents_in(file).starts[name] + 5] ^= 1
    file.write_bytes(content)


WEIGHT = "layers.1.weight"


@pytest.mark.parametrize(
    ("before", "name", "noticed"),
    [
        (False, WEIGHT, True),
        (False, f"optimizer.mean.{WEIGHT}", False),
        (True, WEIGHT, True),
        (True, f"optimizer.mean.{WEIGHT}", True),
    ],
)
def test_damage_is_noticed_by_those_who_use_what_is_damaged(
    begun: Path, capfd: pytest.CaptureFixture[str], before: bool, name: str, noticed: bool
) -> None:
    """A resumed run uses all, an evaluation weights alone; files with one SHA-256 of all are verified as a whole."""
    whole = job(data="d.npz", steps=8, out="whole", init=FIRST)
    job(data="d.npz", steps=4, out="damaged", init=FIRST, save_every=2)
    older, newest = sorted(Path("damaged/checkpoints").iterdir())
    for file in (older, newest) if before else ():
        in_format_before(file)
    damage(newest, name)
    assert scored("damaged")["step"] == (2 if noticed else 4)
    assert ("warning: skipped" in capfd.readouterr().err) is noticed
    shutil.copytree("damaged", "lost")
    assert job(out="damaged", resume=True, steps=8, quiet=False)["weights_sha256"] == whole["weights_sha256"]
    assert "000004.safetensors is damaged: " in capfd.readouterr().out
    damage(Path("lost/checkpoints") / older.name, name)
    with pytest.raises(OutputError, match=r"no checkpoint in .* can be used: .*000004.* is damaged.*000002.*damaged"):
        job(out="lost", resume=True, steps=8)


def test_an_older_checkpoint_of_another_model_is_not_scored(begun: Path) -> None:
    """In the place of a damaged one."""
    job(data="d.npz", steps=4, out="other", hidden=(9,))
    shutil.copy("other/checkpoints/step-000000004.safetensors", "run/checkpoints/step-000000003.safetensors")
    damage(Path("run/checkpoints/step-000000004.safetensors"), WEIGHT)
    with pytest.raises(OutputError, match=r"000003.safetensors: layers.1.weight is float32 .*, the model's float32"):
        scored("run")


def test_another_part_is_trained_from_the_same_weights(begun: Path) -> None:
    """A run with other --rates begins with the values of one, and keeps no state of what it does not train."""
    job(data="d.npz", steps=2, out="head", init=FIRST, rates=("*=0", "layers.3=1"))
    job(data="d.npz", steps=1, out="all", init="head/checkpoints/step-000000002.safetensors")
    first, head, whole = (load_file(f"{run}/checkpoints/step-00000000{n}.safetensors") for run, n in ENDS)
    for name in first:
        weight = name.removeprefix("optimizer.mean.").removeprefix("optimizer.variance.")
        frozen = not weight.startswith("layers.3.")
        assert name in whole
        assert (name in head) is not (frozen and name != weight)
        assert name != weight or np.array_equal(head[name], first[name]) is frozen
        assert name != weight or not np.array_equal(head[name], whole[name])
    assert job(data="d.npz", out="head", resume=True, steps=3)["step"] == 3
    with pytest.raises(ConfigError, match=r"^--rates layers.1=0: the run in head has \*=0,layers.3=1, and another"):
        job(out="head", resume=True, steps=4, rates=("layers.1=0",))


def test_other_data_are_refused_wherever_they_lie(begun: Path) -> None:
    Path("job2").mkdir()
    arrays = dict(np.load("d.npz"))
    np.savez("job2/d.npz", **arrays | {"x_train": arrays["x_train"] + 1})
    with pytest.raises(DataError, match=r"job2/d.npz holds other data than the run in run was trained on: d.npz has "):
        job(out="run", resume=True, steps=6, data="job2/d.npz")
    shutil.copy("d.npz", "job2/d.npz")
    Path("run/environment.json").unlink()
    with pytest.raises(DataError, match=r"^--data job2/d.npz: the run in run has .*d.npz, and without its environment"):
        job(out="run", resume=True, steps=6, data="job2/d.npz")


def test_a_newest_checkpoint_of_another_optimizer_is_refused(begun: Path) -> None:
    """Though an older one fits."""
    saved = checkpoint.load(max(Path("run/checkpoints").iterdir()))
    arrays = {name: array for name, array in saved.arrays.items() if not name.startswith("optimizer.mean.")}
    save_changed(Path("run/checkpoints"), saved, 9, step=5, arrays=arrays)
    with pytest.raises(
        OutputError, match=r"step-000000005.safetensors has no optimizer.mean.layers.*another .*optimizer"
    ):
        job(out="run", resume=True, steps=6)


def test_an_average_goes_on_with_its_run_but_begins_anew_with_init(begun: Path) -> None:
    job(data="d.npz", steps=4, out="averaged", ema=0.9)
    file = max(Path("averaged/checkpoints").iterdir())
    job(data="d.npz", steps=1, out="anew", ema=0.9, lr=0.0, init=str(file))
    saved = checkpoint.load(file)
    weights = {name: array for name, array in saved.arrays.items() if name.startswith("layers.")}
    anew = checkpoint.load(max(Path("anew/checkpoints").iterdir())).arrays
    for name, array in weights.items():
        np.testing.assert_array_equal(anew[name], array)
        np.testing.assert_array_equal(anew[f"ema.{name}"], array)
        assert not np.array_equal(saved.arrays[f"ema.{name}"], array)
    save_changed(file.parent, saved, 9, step=5, arrays=weights | others(saved))
    with pytest.raises(OutputError, match=r"step-000000005.safetensors has no ema\.layers"):
        job(out="averaged", resume=True, steps=6)


def others(saved: Checkpoint) -> dict[str, Any]:
    """The optimizer's arrays."""
    return {name: array for name, array in saved.arrays.items() if name.startswith("optimizer.")}


def test_first_weights_are_needed_until_there_is_a_checkpoint(begun: Path) -> None:
    job(data="d.npz", steps=4, out="unsaved", init=FIRST, save_every=0)
    shutil.rmtree("first")
    with pytest.raises(OutputError, match=f"cannot read .*/{FIRST}"):
        job(out="unsaved", resume=True, steps=6)


def test_another_numpy_than_the_last_jobs_is_told_and_kept(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path("run/environment.json")
    file.write_text(file.read_text().replace(np.__version__, "1.0.0"))
    job(out="run", resume=True, steps=5, quiet=False)
    assert f"warning: since the last job NumPy is {np.__version__} (was 1.0.0): bits may" in capsys.readouterr().out
    assert json.loads(file.read_text())["earlier"] == [{"until": 4, "NumPy": "1.0.0"}]
    job(out="run", resume=True, steps=6, quiet=False)
    assert "since the last job" not in capsys.readouterr().out
    assert json.loads(file.read_text())["earlier"] == [{"until": 4, "NumPy": "1.0.0"}]
