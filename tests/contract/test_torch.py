"""A PyTorch model trains as plain PyTorch would; its weights go back there. The table proves its bits on any layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.conftest import Job
from tests.contract.table import Table

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.contract
Train = Callable[..., Job]

PLAIN = """
def plain(shape, outputs):
    from torch import nn

    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, outputs))
"""


@pytest.fixture
def alone(table: Table) -> Job:
    return table.alone("torch")


def last_checkpoint(job: Job) -> Path:
    return max((job.run / "checkpoints").glob("step-*.safetensors"))


def test_the_run_alone_is_worth_comparing(alone: Job) -> None:
    steps = [line for line in alone.metrics if "evaluation" not in line]
    assert steps[-1]["loss"] < 0.95 * steps[0]["loss"]
    assert all(line["gradient_norm"] > 0.3 for line in steps)
    names = [name for name in load_file(last_checkpoint(alone)) if "optimizer" not in name]
    assert "layers.1.by" in names
    assert len(names) == 9


def test_weights_taken_to_pytorch_score_as_in_the_run(
    table: Table, alone: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpiml.data.dataset import DIGITS
    from mpiml.nn.torch_state import load_into
    from mpiml.usercode import named

    monkeypatch.syspath_prepend(table.here("torch"))
    net = load_into(named("net:net", "--model")((8, 8), 10), last_checkpoint(alone))
    with np.load(DIGITS) as digits:
        x, y = torch.from_numpy(digits["x_test"].astype("float32")), digits["y_test"]
    with torch.no_grad():
        found = net.eval()(x).argmax(1).numpy()
    assert (found == y).mean() == pytest.approx(alone.result["accuracy"], abs=1e-12)


def test_steps_are_those_of_plain_pytorch(train: Train, tmp_path: Path) -> None:
    """In float64, all rows at once in plain PyTorch against micro-batches: equal but for rounding."""
    from mpiml.random import keyed

    random = np.random.default_rng(0)
    x, y = random.standard_normal((90, 5)), random.integers(0, 3, 90)
    (tmp_path / "net.py").write_text(PLAIN)
    np.savez(tmp_path / "data.npz", x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:])
    job = train(
        0,
        f"--model net:plain --data {tmp_path}/data.npz --dtype float64 --batch 60 --microbatches 7 --steps 5 --seed 4 "
        "--optimizer momentum --lr 0.1 --weight-decay 0 --quiet",
        PYTHONPATH=str(tmp_path),
    )
    assert job.code == 0, job.err
    with keyed(["PyTorch"], 4, "init", "torch"):
        net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(torch.from_numpy(x[:60])), torch.from_numpy(y[:60])).backward()
        optimizer.step()
    found = load_file(last_checkpoint(job))
    for name, tensor in net.state_dict().items():
        np.testing.assert_allclose(found[f"layers.{name}"], tensor, rtol=1e-11, atol=1e-13, err_msg=name)


@pytest.mark.parametrize(
    "kind", ["affine", "momentum None", "no parameters", "several places", "volumes", "synchronised", "spectral norm"]
)
def test_averages_are_those_of_plain_pytorch(kind: str, tmp_path: Path) -> None:
    """Of a step's only micro-batch: equal but for rounding, as is what the run ends with."""
    from torch import nn

    from mpiml.config import Config
    from mpiml.data.dataset import Dataset
    from mpiml.nn.torch_state import load_into
    from mpiml.train import train

    def net() -> object:
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(6)
        body = {
            "affine": lambda: [norm],
            "momentum None": lambda: [nn.BatchNorm1d(6, momentum=None)],
            "no parameters": lambda: [nn.BatchNorm1d(6, affine=False)],
            "several places": lambda: [nn.Sequential(norm, nn.Tanh(), norm)],
            "volumes": lambda: [nn.Unflatten(1, (2, 1, 1, 3)), nn.BatchNorm3d(2), nn.Flatten()],
            "synchronised": lambda: [nn.SyncBatchNorm(6, momentum=0.3)],
            "spectral norm": lambda: [nn.utils.spectral_norm(nn.Linear(6, 6))],
        }[kind]()
        return nn.Sequential(nn.Linear(5, 6), *body, nn.Linear(6, 3))

    random = np.random.default_rng(0)
    x, y = random.standard_normal((40, 5)).astype("f4"), random.integers(0, 3, 40)
    config = Config(steps=6, batch=40, microbatches=1, shuffle="none", optimizer="sgd", lr=0.1, quiet=True)
    config = config.replace(out=str(tmp_path / "run"), eval_rows=7)
    result = train(config, model=lambda shape, outputs: net(), data=Dataset.from_arrays(x, y, x[:20], y[:20]))
    plain = net()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        optimizer.step()
    exported = load_into(net(), max((tmp_path / "run" / "checkpoints").glob("step-*")))
    for (name, tensor), other in zip(exported.state_dict().items(), plain.state_dict().values(), strict=True):
        np.testing.assert_allclose(tensor, other, rtol=1e-5, atol=1e-6, err_msg=name)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(plain.eval()(torch.from_numpy(x[:20])), torch.from_numpy(y[:20]))
    assert result["test_loss"] == pytest.approx(float(loss), rel=1e-5)


def test_micro_batches_that_are_too_small_are_refused_before_step_1(tmp_path: Path) -> None:
    from torch import nn

    from mpiml.config import Config
    from mpiml.errors import ConfigError
    from mpiml.train import train

    def net(shape: object, outputs: int) -> object:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, outputs))

    config = Config(steps=1, batch=8, microbatches=5, quiet=True, out=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"layers\.2 .* fewer than 2 rows.* --batch 11 or --microbatches 3 would"):
        train(config, model=net)
    assert not (tmp_path / "run").exists()
    assert train(config.replace(batch=11), model=net)["step"] == 1


def test_ranks_whose_modules_differ_are_refused(train: Train, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import os, torch\ndef net(shape, outputs):\n    torch.manual_seed(os.getpid())\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, outputs))\n"
    )
    job = train(2, "--model own:net", PYTHONPATH=str(tmp_path))
    assert job.code == 78
    assert job.err.count("ranks differ in first values of the model") == 1
    assert not job.run.exists()
