"""What training does not change is in the checkpoint: a run goes on, is scored and exported with what it began with."""

from __future__ import annotations

import json
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mpiml.config import Config
from mpiml.errors import OutputError
from mpiml.evaluate import evaluate
from mpiml.run import checkpoint, step_files
from mpiml.train import train
from mpiml.training.export import torch_state_dict, trained
from tests.conftest import launch
from tests.forging import save_changed

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.contract

CONSTANTS = """
import os

import torch
from torch import nn


class Mixed(nn.Module):
    def __init__(self, number, features):
        super().__init__()
        random = torch.Generator().manual_seed(int(os.environ["DRAW"]) + number)  # as nothing that the run knows does
        self.register_buffer("matrix", torch.randn(features, features, generator=random) / 4)
        self.register_buffer("order", torch.randperm(features, generator=random))
        self.register_buffer("mask", torch.where(torch.rand(features, generator=random) < 0.2, -torch.inf, 0.0))
        self.register_buffer("waves", torch.view_as_complex(torch.randn(features, 2, generator=random)))
        self.register_buffer("step", torch.tensor(0.5), persistent=False)
        self.frozen = nn.Linear(features, features).requires_grad_(False)
        with torch.no_grad():
            self.frozen.weight.copy_(torch.randn(features, features, generator=random) / 4)
        self.tanh = nn.Tanh()

    def forward(self, x):
        x = self.tanh(x[:, self.order] @ self.matrix * self.waves.abs() + self.frozen(x) * self.step)
        return x + x.detach().logsumexp(1, keepdim=True) * torch.softmax(self.mask, 0)


def net(shape, outputs):
    hidden = [nn.Linear(64, 12), Mixed(0, 12), nn.Linear(12, 8), Mixed(9, 8)]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(8, outputs))
"""
PARTS = ("matrix", "order", "mask", "waves", "frozen.weight", "frozen.bias")
# One job for all: it goes on, and scores, with two stages.
GO_ON = """
import os, sys, json
os.environ["DRAW"] = "5"
from mpi4py import MPI
from mpiml.config import Config
from mpiml.evaluate import evaluate
from mpiml.train import train
out = sys.argv[1]
result = train(Config(out=out, resume=True, model="own:net", steps=4, pipe=2))
scored = evaluate(out, model="own:net", pipe=2)
if MPI.COMM_WORLD.rank == 0:
    print(json.dumps([result["weights_sha256"], scored["test_loss"]]))
"""


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run of 4 steps of a model with constants of all kinds, which are others whenever DRAW is another."""
    (tmp_path / "own.py").write_text(CONSTANTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "own", None)
    del sys.modules["own"]
    monkeypatch.setenv("DRAW", "1")
    config = Config(model="own:net", steps=4, save_every=2, eval_every=4, microbatches=4, quiet=True)
    config = config.replace(out=str(tmp_path / "run"))
    train(config)
    return config


def test_constants_come_from_the_checkpoint_on_every_layout(drawn: Config, tmp_path: Path) -> None:
    result, arrays = finished(tmp_path / "run")
    assert {f"layers.{layer}.{part}" for layer in (2, 4) for part in PARTS} < arrays.keys()
    assert np.isinf(arrays["layers.2.mask"]).any()
    assert arrays["layers.4.order"].dtype == np.int64
    train(drawn.replace(out=str(tmp_path / "begun"), steps=2))
    (tmp_path / "go_on.py").write_text(GO_ON)
    job = launch(2, str(tmp_path / "go_on.py"), str(tmp_path / "begun"), PYTHONPATH=str(tmp_path))
    assert job.returncode == 0, job.stderr
    assert json.loads(job.stdout.splitlines()[-1]) == [result["weights_sha256"], result["test_loss"]]
    _, again = finished(tmp_path / "begun")
    assert {name: array.tobytes() for name, array in again.items()} == {n: a.tobytes() for n, a in arrays.items()}


def finished(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return json.loads((run / "result.json").read_text()), load_file(max((run / "checkpoints").iterdir()))


def test_a_trained_model_has_the_constants_of_its_run(
    drawn: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpiml.data.dataset import DIGITS
    from mpiml.nn.base import At, forward
    from mpiml.nn.torch_state import load_into
    from mpiml.usercode import named

    monkeypatch.setenv("DRAW", "7")
    result, file = finished(tmp_path / "run")[0], tmp_path / "run/checkpoints" / step_files.file_name(4)
    assert evaluate(drawn.out, model="own:net")["test_loss"] == result["test_loss"]
    net = named("own:net", "--model")
    with np.load(DIGITS) as digits:
        x, y = digits["x_test"].astype("f4"), digits["y_test"]
    layers, _ = trained(file, "own:net")
    found, _ = forward(layers, x, At(training=False))
    assert (found.argmax(1) == y).mean() == pytest.approx(result["accuracy"], abs=1e-12)
    state = torch_state_dict(file, "own:net")
    kinds = {part: state[f"2.{part}"].dtype for part in PARTS}
    assert kinds == dict.fromkeys(PARTS, torch.float32) | {"order": torch.int64, "waves": torch.complex64}
    fresh = net((8, 8), 10)
    assert state.keys() == fresh.state_dict().keys()
    fresh.load_state_dict(state)
    for module in (fresh, load_into(net((8, 8), 10), file)):
        with torch.no_grad():
            np.testing.assert_allclose(module(torch.from_numpy(x)), found, rtol=1e-5, atol=1e-6)


def test_constants_that_are_in_no_checkpoint_must_be_those_of_the_run(tmp_path: Path) -> None:
    def net(step: float) -> Any:
        scaled = torch.nn.Linear(64, 8)
        scaled.register_buffer("step", torch.tensor(step), persistent=False)
        return torch.nn.Sequential(torch.nn.Flatten(), scaled, torch.nn.Linear(8, 10))

    config = Config(steps=2, quiet=True, out=str(tmp_path / "run"))
    train(config, model=net(1))
    file = tmp_path / "run" / "checkpoints" / step_files.file_name(2)
    refused(config, file, net(2), r"^layers\.1\.step: not what the checkpoint was trained with: .*safetensors has the")
    saved = checkpoint.load(file)
    assert saved.constants == {"layers.1.step": saved.constants["layers.1.step"]} if saved.constants else False
    trained(save_changed(tmp_path, saved, constants=None), net(2))  # it does not tell
    goes_on(config, file, net(1))


def test_constants_of_older_checkpoints_are_compared(tmp_path: Path) -> None:
    """They have checksums of all constants, and no arrays."""

    def net(scale: float) -> Any:
        frozen = torch.nn.Linear(64, 8)
        torch.nn.init.constant_(frozen.weight, scale)
        torch.nn.init.zeros_(frozen.bias)
        return torch.nn.Sequential(torch.nn.Flatten(), frozen.requires_grad_(False), torch.nn.Linear(8, 10))

    config = Config(steps=2, quiet=True, out=str(tmp_path / "run"))
    train(config, model=net(1))
    file = tmp_path / "run" / "checkpoints" / step_files.file_name(2)
    saved = checkpoint.load(file)
    file.unlink()
    told = {"layers.1.bias": "190a55ad", "layers.1.weight": f"{zlib.crc32(np.ones((8, 64), 'f4')):08x}"}
    arrays = {name: array for name, array in saved.arrays.items() if name not in told}
    save_changed(file.parent, saved, constants=told, arrays=arrays)
    refused(
        config, file, net(2), r"^layers\.1\.weight: not what the checkpoint was trained with: .*safetensors has the"
    )
    goes_on(config, file, net(1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda scale: None, r"has no layers.1.scale: it is of another model"),
        (lambda scale: scale[:7], r": layers.1.scale is float32 \(7,\), the model's float32 \(8,\)"),
        (lambda scale: scale.astype("f8"), r": layers.1.scale is float64 \(8,\), the model's float32 \(8,\)"),
        (lambda scale: scale > 0, r": layers.1.scale is bool \(8,\), the model's float32 \(8,\)"),
    ],
)
def test_constants_that_do_not_fit_are_named(tmp_path: Path, change: Any, words: str) -> None:
    scaled = torch.nn.Linear(64, 8)
    scaled.register_buffer("scale", torch.ones(8))
    net = torch.nn.Sequential(torch.nn.Flatten(), scaled, torch.nn.Linear(8, 10))
    config = Config(steps=2, quiet=True, out=str(tmp_path / "run"))
    train(config, model=net)
    file = tmp_path / "run" / "checkpoints" / step_files.file_name(2)
    saved = checkpoint.load(file)
    file.unlink()
    arrays = saved.arrays | {"layers.1.scale": change(saved.arrays["layers.1.scale"])}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    save_changed(file.parent, saved, arrays=arrays)
    before = [path.read_bytes() for path in (file, tmp_path / "run" / "metrics.jsonl")]
    refused(config, file, net, words)
    assert [path.read_bytes() for path in (file, tmp_path / "run" / "metrics.jsonl")] == before


def refused(config: Config, file: Path, model: Any, words: str) -> None:
    for use in (
        lambda: train(config.replace(resume=True, steps=3), model=model),
        lambda: evaluate(config.out, model=model),
        lambda: trained(file, model),
    ):
        with pytest.raises(OutputError, match=words):
            use()


def goes_on(config: Config, file: Path, model: Any) -> None:
    trained(file, model)
    assert evaluate(config.out, model=model)["step"] == 2
    assert train(config.replace(resume=True, steps=3), model=model)["step"] == 3


def test_first_weights_bring_their_constants(drawn: Config, tmp_path: Path, capsys: Any) -> None:
    """Frozen and trained parameters may change places, and constants may come and go."""

    def finetuned(shape: tuple[int, ...], outputs: int) -> Any:
        model = net(shape, outputs)
        model[1].requires_grad_(False)  # was trained
        model[2].frozen.requires_grad_(True)  # was not
        del model[2].matrix
        model[2].register_parameter("matrix", torch.nn.Parameter(torch.zeros(12, 12)))
        model[3].register_buffer("new", torch.tensor(3.0))
        model[4].register_buffer("other", torch.tensor(4.0))
        return torch.nn.Sequential(*model)

    from mpiml.usercode import named

    net, file = named("own:net", "--model"), tmp_path / "run/checkpoints" / step_files.file_name(4)
    os.environ["DRAW"] = "3"
    config = drawn.replace(out=str(tmp_path / "tuned"), init=str(file), steps=1, lr=1e-30, quiet=False)
    train(config, model=finetuned)
    before, (_, after) = load_file(file), finished(tmp_path / "tuned")
    names = [name for name in before if name.startswith("layers.")]
    assert after.keys() >= {*names, "layers.3.new"}
    for name in names:
        np.testing.assert_allclose(after[name], before[name], atol=1e-20, err_msg=name)
    assert "constants as the model makes them: layers.3.new, layers.4.other\n" in capsys.readouterr().out
    bare = torch.nn.Sequential(
        *(net((8, 8), 10)[i] for i in (0, 1)),
        torch.nn.Identity(),
        torch.nn.Linear(12, 8),
        torch.nn.Identity(),
        torch.nn.Linear(8, 10),
    )
    train(config.replace(out=str(tmp_path / "bare")), model=bare)
    wider = net((8, 8), 10)
    wider[2].mask = torch.zeros(1, 12)
    with pytest.raises(OutputError, match=r"layers.2.mask is float32 \(12,\), the model's float32 \(1, 12\)"):
        train(config.replace(out=str(tmp_path / "wider")), model=wider)
    assert not (tmp_path / "wider").exists()
