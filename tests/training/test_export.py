"""From a checkpoint that the real command wrote to layers and to a PyTorch state dict that compute what the run did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mpiml.data.dataset import open_dataset
from mpiml.errors import OutputError
from mpiml.nn import layers as nn
from mpiml.nn.perceptrons import mlp
from mpiml.run import checkpoint
from mpiml.run.checkpoint import Checkpoint
from mpiml.training.export import torch_state_dict, trained
from tests.conftest import launch
from tests.forging import forge

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "run"
    flags = "--model cnn --channels 2 --normalize --steps 4 --eval-rows 1000 --ema 0.5"
    assert launch(0, "-m", "mpiml.train", "--out", str(path), *flags.split()).returncode == 0
    assert launch(0, "-m", "mpiml.evaluate", "--run", str(path), "--predictions", f"{path}.npy").returncode == 0
    return path


def file(run: Path) -> Path:
    return run / "checkpoints" / checkpoint.file_name(4)


def images(run: Path) -> np.ndarray:
    source, saved = open_dataset("digits").test.x, load_file(file(run))
    source.hold(np.arange(len(source)))
    x = source.rows(np.arange(len(source)))
    return ((x - saved["data.mean"]) * saved["data.scale"]).astype("float32")


def test_layers_compute_what_the_run_does(run: Path) -> None:
    layers, shape = trained(file(run), average=True)
    assert shape == (8, 8)
    y, _ = nn.forward(layers, images(run), nn.At(training=False))
    np.testing.assert_array_equal(y.argmax(axis=1), np.load(f"{run}.npy"))
    there, (raw, _) = load_file(file(run)), trained(file(run))
    for average, parameter in zip(nn.parameters(layers), nn.parameters(raw), strict=True):
        assert average.value.tobytes() == there[f"ema.{average.name}"].tobytes()
        assert parameter.value.tobytes() == there[parameter.name].tobytes() != average.value.tobytes()


def test_torch_state_dict_fits_the_same_model_in_torch(run: Path) -> None:
    torch: Any = pytest.importorskip("torch")
    convolutions = [torch.nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, 2), (2, 4))]
    between = [torch.nn.MaxPool2d(2), torch.nn.ReLU()]
    model = torch.nn.Sequential(
        torch.nn.Unflatten(1, (1, 8)),
        *(convolutions[0], *between, convolutions[1], *between, torch.nn.Flatten(), torch.nn.Linear(16, 10)),
    )
    model.load_state_dict(torch_state_dict(file(run)))
    raw = load_file(file(run))["layers.1.weight"].transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(convolutions[0].weight.detach(), raw)
    model.load_state_dict(torch_state_dict(file(run), average=True))
    y = model(torch.from_numpy(images(run)))
    np.testing.assert_array_equal(y.argmax(axis=1), np.load(f"{run}.npy"))


def test_checkpoint_of_another_model(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        OutputError, match=r"step-000000004.safetensors has no layers\.2\.weight: it is of another model"
    ):
        trained(file(run), [nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)])
    with pytest.raises(OutputError, match=r"layers\.1\.weight is float32 \(3, 3, 1, 2\), the model's .*\(64, 10\)"):
        trained(file(run), mlp((8, 8), 10, []))
    with pytest.raises(OutputError, match=r"a.safetensors has no average of the weights, as a run with --ema keeps"):
        trained(forge(tmp_path / "a.safetensors"), average=True)
    saved = checkpoint.load(file(run))
    old = checkpoint.save(tmp_path, Checkpoint(4, saved.config, saved.arrays), 1)
    with pytest.raises(OutputError, match="does not say what its model takes"):
        trained(old)
