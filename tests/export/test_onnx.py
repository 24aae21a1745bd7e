"""Models of runs in onnxruntime: the outputs are those of the run, from inputs as its data hold them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mpiml.export.__main__ import main
from mpiml.nn.layers import At, forward
from mpiml.training.export import trained
from tests.conftest import launch

pytest.importorskip("torch")
Say = pytest.CaptureFixture[str]

NET = """
import torch
from torch import nn
from mpiml.api import GELU, Linear, ReLU


def net(shape, outputs):
    body = nn.Sequential(nn.Linear(*shape, 12), nn.BatchNorm1d(12), nn.Dropout(0.5))
    return [body, GELU(), nn.Linear(12, 8), nn.Tanh(), Linear(8, outputs)]


class Odd(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x):
        y = self.linear(x)
        return y if y.sum().item() > 1e9 else y * 2


def odd(shape, outputs):
    return Odd(*shape, outputs)


class Own(ReLU):
    pass


def own(shape, outputs):
    return [Linear(*shape, 8), Own(), Linear(8, outputs)]
"""
FLAGS = "--data rows.npz --batch 32 --steps 3"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with data that have gaps, and with models."""
    path = tmp_path_factory.mktemp("onnx")
    random = np.random.default_rng(0)
    x = random.normal(3.0, 2.0, (140, 5)).astype(np.float32)
    y = (x.sum(axis=1) > 15).astype(int)
    x[random.random(x.shape) < 0.1] = np.nan
    np.savez(path / "rows.npz", x_train=x[:100], y_train=y[:100], x_test=x[100:], y_test=y[100:])
    (path / "nets.py").write_text(NET)
    return path


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as the working directory of a user."""
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    return place


def train(out: str, flags: str) -> None:
    done = launch(0, "-m", "mpiml.train", "--out", out, "--quiet", *flags.split(), PYTHONPATH=".")
    assert done.returncode == 0, done.stderr


def onnx_outputs(file: Path, x: NDArray[Any]) -> NDArray[Any]:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"inputs": x})
    return np.asarray(y)


@pytest.mark.contract
def test_outputs_are_those_that_evaluate_predicts(here: Path, capsys: Say) -> None:
    """Of a list of modules and layers: gaps are filled, inputs normalised, and weights averaged as in the run."""
    pytest.importorskip("onnxscript")
    train("modules", f"{FLAGS} --model nets:net --fill mean --normalize --ema 0.5")
    flags = ["--predictions", "p.npy", "--probabilities"]
    done = launch(0, "-m", "mpiml.evaluate", "--run", "modules", *flags, PYTHONPATH=".")
    assert done.returncode == 0, done.stderr
    assert main(["onnx", "modules"]) == 0
    out, err = capsys.readouterr()
    file = Path("modules/step-000000003.onnx")
    assert err == ""
    assert out.startswith(
        f"{file}: the average of the weights after step 3; inputs float32 (rows, 5) -> outputs float32 (rows, 2); "
    )
    x = np.load("rows.npz")["x_test"]
    y = onnx_outputs(file, x)
    assert "; checked: outputs of onnxruntime differ by at most " in out
    likely = np.exp(y - y.max(axis=1, keepdims=True))
    np.testing.assert_allclose(likely / likely.sum(axis=1, keepdims=True), np.load("p.npy"), atol=1e-5)
    np.testing.assert_allclose(onnx_outputs(file, x[:1]), y[:1], atol=1e-5)

    checkpoint = "modules/checkpoints/step-000000003.safetensors"
    assert main(["onnx", "modules", "--checkpoint", checkpoint, "--raw-weights", "--out", "new/raw.onnx"]) == 0
    assert "new/raw.onnx: the weights after step 3" in capsys.readouterr().out
    assert np.abs(onnx_outputs(Path("new/raw.onnx"), x) - y).max() > 1e-4


@pytest.mark.contract
def test_a_model_of_tokens_takes_integers(here: Path, capsys: Say) -> None:
    pytest.importorskip("onnxscript")
    Path("text.txt").write_text("to be or not to be, that is the question. " * 40)
    train("words", "--data text.txt --context 8 --model gpt --width 16 --heads 2 --blocks 1 --tie --batch 32 --steps 3")
    assert main(["onnx", "words"]) == 0
    assert "; inputs int64 (rows, 8) -> outputs float32 (rows, 8, " in capsys.readouterr().out
    layers, shape = trained("words/checkpoints/step-000000003.safetensors")
    ids = np.random.default_rng(0).integers(32, 120, (5, *shape))
    y, _ = forward(layers, ids.astype(np.float32), At(training=False))
    np.testing.assert_allclose(onnx_outputs(Path("words/step-000000003.onnx"), ids), y, atol=1e-5)


@pytest.mark.contract
def test_what_cannot_be_exported_is_refused_in_one_line(here: Path, capsys: Say) -> None:
    pytest.importorskip("onnxscript")
    for name, why in (
        ("own", "layers.1, Own, is a layer of your own, of which PyTorch knows nothing: models of PyTorch modules"),
        ("odd", "PyTorch cannot export the model: "),
    ):
        train(name, f"{FLAGS} --model nets:{name} --fill 0")
        assert main(["onnx", name]) == 78
        err = capsys.readouterr().err
        assert err.startswith(f"mpiml.export: {why}")
        assert err.count("\n") == 1
        assert not list(Path(name).glob("*.onnx"))
    (here / "own" / "config.toml").unlink()
    assert main(["onnx", "own"]) == 78
    assert "names code, which is run only if you name it: repeat --model nets:own" in capsys.readouterr().err


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path, capsys: Say) -> None:
    pytest.importorskip("onnxscript")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for arguments, message in (
        ([tmp_path / "none"], "none does not exist; give the directory of a run, as runs/digits-mlp-001"),
        ([tmp_path], "is not the directory of a run: there is no checkpoints in it"),
        ([tmp_path / "run"], "run has no checkpoint yet"),
        ([tmp_path, "--checkpoint", tmp_path / "gone"], "gone"),
    ):
        assert main(["onnx", *map(str, arguments)]) == 74
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("missing", ["torch", "onnxscript"])
def test_without_the_libraries_a_line_says_what_to_install(
    missing: str, capsys: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["onnx", "none"]) == 78
    assert "pip install 'mpiml[onnx]'" in capsys.readouterr().err
