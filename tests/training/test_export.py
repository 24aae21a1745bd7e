"""From a checkpoint that the real command wrote to layers and to a PyTorch state dict that compute what the run did."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from safetensors.numpy import load_file

from mpiml.config import Config
from mpiml.data.dataset import open_dataset
from mpiml.errors import OutputError
from mpiml.nn import layers as nn
from mpiml.nn.perceptrons import mlp
from mpiml.run import checkpoint, step_files
from mpiml.train import train
from mpiml.training.export import torch_state_dict, trained
from tests.conftest import launch
from tests.forging import forge, save

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "run"
    flags = "--model cnn --channels 2 --normalize --steps 4 --eval-rows 1000 --ema 0.5"
    assert launch(0, "-m", "mpiml.train", "--out", str(path), *flags.split()).returncode == 0
    assert launch(0, "-m", "mpiml.evaluate", "--run", str(path), "--predictions", f"{path}.npy").returncode == 0
    return path


def file(run: Path) -> Path:
    return run / "checkpoints" / step_files.file_name(4)


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
    old = save(tmp_path, 4, saved.arrays, saved.config)
    with pytest.raises(OutputError, match="does not say what its model takes"):
        trained(old)


SHORT: dict[str, Any] = {"batch": 300, "lr": 0.0, "optimizer": "sgd", "eval_every": 0, "steps": 1, "quiet": True}
TEXT = {"data": "text.npz", "model": "gpt", "width": 8, "heads": 2, "blocks": 1}


def net(shape: tuple[int, ...], outputs: int) -> Any:
    """With averages, constants, a name that ours have too, and weights that two parts share, which are one layer."""
    import torch
    from torch import nn as t

    class Scaled(t.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = t.Parameter(torch.rand(12, dtype=torch.complex64))
            self.register_buffer("mask", torch.rand(12))
            self.register_buffer("count", torch.tensor([7], dtype=torch.int32))

        def forward(self, x: Any) -> Any:
            return x * self.mask * self.gain.real

    wide, again = t.Linear(12, 12), t.Linear(12, 12)
    again.weight = wide.weight
    frozen = t.Linear(12, 12).requires_grad_(False)
    body = [t.Flatten(), t.Linear(64, 12), t.BatchNorm1d(12), Scaled(), wide, again, frozen]
    return t.Sequential(
        OrderedDict((f"part{index}", part) for index, part in enumerate([*body, t.Linear(12, outputs)]))
    )


def single(shape: tuple[int, ...], outputs: int) -> Any:
    """A module that is one layer."""
    import torch

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Linear(64, 5)
            self.head = torch.nn.Linear(5, outputs)

        def forward(self, x: Any) -> Any:
            return self.head(self.body(x.flatten(1)))

    return Net()


def job(out: str, module: Any = None, **settings: Any) -> dict[str, np.ndarray]:
    """The model of a job of one rank after its last step."""
    train(Config(**SHORT | settings | {"out": out}), MPI.COMM_SELF, module)
    arrays = load_file(max(Path(out, "checkpoints").iterdir()))
    return {name: array for name, array in arrays.items() if name.startswith("layers.")}


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (None, {"hidden": (6, 5)}),
        (None, {"model": "cnn", "channels": 2}),
        (None, {"model": "resnet", "channels": 2, "blocks": 1}),
        (None, {"model": "resnet", "channels": 2, "blocks": 1, "norm": "batch"}),
        (None, TEXT),
        (None, TEXT | {"tie": True}),
        (net, {}),
        (single, {}),
    ],
    ids=["mlp", "cnn", "resnet", "resnet-batch", "gpt", "gpt-tied", "net", "single"],
)
def test_what_pytorch_has_saved_is_begun_with_as_the_checkpoint_is(
    model: Any, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch: Any = pytest.importorskip("torch")
    from safetensors.torch import save_file

    from mpiml.api import load_into

    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(0).integers(0, 9, (40, 7), np.uint8)
    np.savez("text.npz", x_train=rows[:, :-1], y_train=rows[:, 1:])
    job("first", model, **settings | {"lr": 0.01, "steps": 3, "seed": 3})
    file = max(Path("first/checkpoints").iterdir())
    state = torch_state_dict(file, model)
    save_file(state, "theirs.safetensors")
    begun = job("theirs", model, **settings, init="theirs.safetensors")
    ours = job("ours", model, **settings, init=str(file))
    assert [name for name in ours if begun[name].tobytes() != ours[name].tobytes()] == []
    assert [name for name, array in job("drawn", model, **settings).items() if (array != ours[name]).any()]
    if model:  # the state dict of the user's own module has other names
        own = load_into(model((8, 8), 10), file).state_dict()
        own.pop("part5.weight", None)  # which safetensors refuses: it is part4's
        assert own.keys().isdisjoint(state)
        save_file({f"module.{name}": tensor for name, tensor in own.items()}, "own.safetensors")
        again = job("own", model, **settings, init="own.safetensors")
        assert [name for name in ours if again[name].tobytes() != ours[name].tobytes()] == []
        save_file(
            {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in own.items()}, "b"
        )
        half = job("half", model, **settings, init="b")
        last = next(name for name in [*ours][::-1] if name.endswith("weight"))
        np.testing.assert_array_equal(half[last], torch.from_numpy(ours[last]).bfloat16().float().numpy())
