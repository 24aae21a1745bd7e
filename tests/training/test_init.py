"""--init: what a run begins with, from a checkpoint, the directory of a run or PyTorch's file, in jobs of one rank."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from mpi4py import MPI
from safetensors.numpy import load_file, save_file

from mpiml.config import Config
from mpiml.errors import ConfigError, OutputError
from mpiml.nn.layers import Flatten, Linear, ReLU
from mpiml.run import tensors
from mpiml.run.checkpoint import Header
from mpiml.train import train
from mpiml.training import first_values
from tests.data import samples

FLAGS: dict[str, Any] = {"hidden": (8,), "batch": 20, "microbatches": 2, "quiet": True, "lr": 0.0, "optimizer": "sgd"}
LAST = "checkpoints/step-000000002.safetensors"


def job(out: str, model: Any = None, **settings: Any) -> dict[str, np.ndarray]:
    """The model of a job of one rank after its last step, in which weights stay as they were."""
    train(Config(**FLAGS | {"data": "d.npz", "steps": 1, "out": out} | settings), MPI.COMM_SELF, model)
    newest = max(Path(out, "checkpoints").iterdir())
    return {name: array for name, array in load_file(newest).items() if name.startswith("layers.")}


def same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], *names: str) -> bool:
    return all(one[name].tobytes() == other[name].tobytes() for name in names or one.keys() | other.keys())


@pytest.fixture
def first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """The model of a run that has learned something."""
    samples.npz(tmp_path)
    monkeypatch.chdir(tmp_path)
    return job("first", steps=2, lr=0.1, save_every=1, seed=5)


BODY, HEAD = ("layers.1.weight", "layers.1.bias"), ("layers.3.weight", "layers.3.bias")


def test_another_head_is_drawn_as_without_init(first: dict[str, np.ndarray], capsys: Any) -> None:
    with pytest.raises(
        OutputError, match=r"layers.3.weight is float32 \(8, 3\), the model's float32 \(8, 5\); --init-p"
    ):
        job("refused", init="first", classes=5)
    drawn = job("drawn", classes=5)
    begun = {"classes": 5, "init": f"first/{LAST}", "init_partial": True}
    unsaved = Config(**FLAGS | begun | {"data": "d.npz", "out": "begun", "steps": 1, "save_every": 0, "quiet": False})
    train(unsaved, MPI.COMM_SELF)  # as if it had been killed before its first checkpoint
    said = capsys.readouterr().out
    assert f"/first/{LAST} (step 2): 2 of 4 arrays\n" in said
    assert "as drawn: layers.3.weight, layers.3.bias\n" in said
    for out, settings in (("begun", {"resume": True, "steps": 2, "save_every": 50}), ("whole", {"steps": 2})):
        head = job(out, **begun, **settings)
        assert same(head, first, *BODY)
        assert same(head, drawn, *HEAD)


def test_the_directory_of_a_run_means_its_best_checkpoint_else_its_newest_whole_one(
    first: dict[str, np.ndarray], capsys: Any
) -> None:
    assert same(job("newest", init="first"), first)
    assert f'init = "{Path.cwd()}/first"' in Path("newest/config.toml").read_text()
    result = json.loads(Path("first/result.json").read_text())
    best = "checkpoints/step-000000001.safetensors"
    Path("first/result.json").write_text(json.dumps(result | {"best_checkpoint": best}))
    assert same(job("best", init="first", quiet=False), load_file(f"first/{best}"), *BODY, *HEAD)
    assert f"first weights from {Path.cwd()}/first/{best} (step 1)\n" in capsys.readouterr().out
    content = bytearray(Path("first", best).read_bytes())
    content[-1] ^= 1
    Path("first", best).write_bytes(content)
    assert same(job("next", init="first", quiet=False), first)
    assert f"warning: skipped {Path.cwd()}/first/{best} is damaged" in capsys.readouterr().out
    Path("first/result.json").write_text(json.dumps(result | {"best_checkpoint": LAST}))
    whole = Path("first", LAST).read_bytes()
    Path("first", LAST).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(OutputError, match=r"^no checkpoint in .*/first can be used: [^;]* is damaged[^;]*; [^;]*$"):
        job("both", init="first")
    Path("first", LAST).write_bytes(whole)
    Path("first", best).unlink()  # by the run, which goes on
    assert same(job("gone", init="first"), first)
    Path("first", LAST).write_bytes(b"nothing")
    with pytest.raises(OutputError, match=r"step-000000002.safetensors is damaged"):
        job("none", init="first")


def test_a_run_that_goes_on_removes_files_meanwhile(
    first: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    header, checkpoints = tensors.header, Path("first/checkpoints")

    def removed(path: Path) -> tuple[Header, bool]:
        if path.name in ("step-000000002.safetensors", "step-000000003.safetensors"):  # to be checked, and to be taken
            number = int(path.stem[-1]) + 1
            path.rename(path.with_stem(f"step-{number:09d}"))
        return header(path)

    (checkpoints / "step-000000001.safetensors").unlink()
    monkeypatch.setattr(tensors, "header", removed)
    assert same(job("begun", init="first", quiet=False), first)
    assert [file.name for file in checkpoints.iterdir()] == ["step-000000004.safetensors"]
    assert "skipped" not in capsys.readouterr().out


def test_directories_without_a_run(first: dict[str, np.ndarray]) -> None:
    Path("empty/checkpoints").mkdir(parents=True)
    Path("files").mkdir()
    shutil.copy(f"first/{LAST}", "files/model.safetensors")
    for init, words in (
        ("empty", "/empty has no checkpoint yet"),
        ("files", "/files holds no run; name a file in it: model.safetensors$"),
        ("empty/checkpoints", "/empty/checkpoints holds no run$"),
    ):
        with pytest.raises(OutputError, match=words):
            job("refused", init=init)
    assert not Path("refused").exists()


def test_flags_that_need_init(first: dict[str, np.ndarray]) -> None:
    for settings in ({"init_partial": True}, {"init_names": "n.toml"}):
        with pytest.raises(ConfigError, match=r"^--init-(partial|names): is of --init, which says whose weights"):
            job("refused", **settings)


def test_another_precision(first: dict[str, np.ndarray]) -> None:
    double = job("double", init="first", dtype="float64")
    assert same(double, {name: array.astype("float64") for name, array in first.items()})
    assert same(job("single", init="double"), first)


def test_a_file_of_pytorch_with_a_map(first: dict[str, np.ndarray]) -> None:
    body, bias, head, head_bias = (first[name] for name in (*BODY, *HEAD))
    save_file(
        {"h.w": body, "h.b": bias, "out.weight": np.ascontiguousarray(head.T), "out.bias": head_bias}, "f.safetensors"
    )
    Path("n.toml").write_text('"layers.3.*" = "out.*"\n"layers.1.bias" = "h.b"\n')
    with pytest.raises(OutputError, match=r"f.safetensors has no 1.weight for the model's layers.1.weight"):
        job("refused", init="f.safetensors", init_names="n.toml")
    with open("n.toml", "a") as names:
        names.write('"layers.1.weight" = { name = "h.w", transpose = true }')
    assert same(job("begun", init="f.safetensors", init_names="n.toml"), first)


class Tied(Linear):
    """Its bias has two names in PyTorch."""

    torch_names: ClassVar = {"bias": ["bias", "tied"]}


def test_a_file_of_pytorch_that_has_a_shared_array_twice(first: dict[str, np.ndarray]) -> None:
    body, bias, head, head_bias = (np.ascontiguousarray(first[name].T) for name in (*BODY, *HEAD))
    model = [Flatten(), Linear(*first[BODY[0]].shape), ReLU(), Tied(*first[HEAD[0]].shape)]
    arrays = {"1.weight": body, "1.bias": bias, "3.weight": head, "3.bias": head_bias, "3.tied": head_bias}
    save_file(arrays, "f.safetensors")
    assert same(job("begun", model, init="f.safetensors"), first)
    save_file(arrays | {"3.tied": head_bias + 1}, "f.safetensors")
    with pytest.raises(OutputError, match=r"f.safetensors: 3.bias and 3.tied are not equal, but one array in the mod"):
        job("refused", model, init="f.safetensors")


def test_a_map_of_a_checkpoint_stays_where_it_was_and_has_no_state_of_the_optimizer(
    first: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    job("adam", optimizer="adam", init="first")
    Path("n.toml").write_text('"*.bias" = "optimizer.mean.*.bias"')
    with pytest.raises(ConfigError, match=r"has no optimizer.mean.layers.1.bias for the model's layers.1.bias"):
        job("refused", init="adam", init_names="n.toml")
    Path("n.toml").write_text('"layers.*.bias" = "layers.*.bias"')
    train(
        Config(
            **FLAGS | {"data": "d.npz", "out": "run", "steps": 1, "save_every": 0}, init="first", init_names="n.toml"
        )
    )
    run = str(Path.cwd() / "run")
    monkeypatch.chdir(tmp_path_factory.mktemp("other"))
    assert same(job(run, resume=True, steps=2, save_every=50, data=f"{run}/../d.npz"), first)


def test_a_number_that_is_not_finite_ends_the_job_before_its_first_step(first: dict[str, np.ndarray]) -> None:
    bad = {name.removeprefix("layers."): np.ascontiguousarray(array.T) for name, array in first.items()}
    bad["3.bias"][1] = np.inf
    save_file(bad, "bad.safetensors")
    with pytest.raises(OutputError, match=r"bad.safetensors: 3.bias is not finite; nothing of it is taken"):
        job("refused", init="bad.safetensors")
    assert not list(Path("refused/checkpoints").iterdir())


def test_of_a_file_two_arrays_at_most_are_in_memory(
    first: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One as it is there, and as it becomes; whoever wrote the file, and however many there are."""
    take, peaks = first_values.take, list[int]()

    def measured(*of: Any) -> Any:
        tracemalloc.start()
        taken = take(*of)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        return taken

    monkeypatch.setattr(first_values, "take", measured)
    wide = {"hidden": (256,) * 12}
    weights = job("wide", **wide)
    save_file({name[7:]: np.ascontiguousarray(array.T) for name, array in weights.items()}, "f.safetensors")
    assert same(job("own", **wide, seed=3, init="wide"), weights)
    assert same(job("foreign", **wide, seed=3, init="f.safetensors"), weights)
    largest = max(array.nbytes for array in weights.values())
    assert max(peaks) < 2.5 * largest < sum(array.nbytes for array in weights.values()) / 4
    assert len(peaks) == 2


def test_evaluating_and_going_on_need_no_init(first: dict[str, np.ndarray], capsys: Any) -> None:
    job("run", init="first", init_partial=True)
    shutil.rmtree("first")
    job("run", resume=True, steps=2)
    job("run", resume=True, steps=3, init="elsewhere", quiet=False)
    assert "--init elsewhere is not read" in capsys.readouterr().out.replace(f"{Path.cwd()}/", "")
