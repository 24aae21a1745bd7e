"""On devices, a layout never changes the answer: whether each rank has one or several share it, and where the update is
made. They are pretended ones, whose memory is NaN until something has been copied there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from tests.conftest import launch, mpirun
from tests.contract.on_devices import ON_DEVICES
from tests.contract.table import Table, assert_same

pytestmark = pytest.mark.contract
PAIRS = [(layout, name) for name, feature in ON_DEVICES.items() for layout in feature.on]


@pytest.mark.parametrize(("layout", "feature"), PAIRS)
def test_same_bits(table: Table, layout: str, feature: str) -> None:
    """As on one rank that has a device to itself."""
    assert_same(table.on(layout, feature), table.on("owner", feature))


@pytest.mark.parametrize("layout", ["owner"])
@pytest.mark.parametrize("feature", list(ON_DEVICES))
def test_a_device_computes_what_the_processor_does(table: Table, layout: str, feature: str) -> None:
    """But for rounding, of which Adam makes much where a gradient is zero but for it. Each step changes the loss."""
    job, plain = table.on(layout, feature), table.alone(feature)
    assert job.code == 0, job.err
    losses, expected = ([line["loss"] for line in one.metrics if "loss" in line] for one in (job, plain))
    assert losses == pytest.approx(expected, rel=1e-3)
    assert len(set(losses)) == len(losses) == 5
    assert job.result["test_loss"] == pytest.approx(plain.result["test_loss"], rel=1e-3)


PLAIN = """
def net(shape, outputs):
    from torch import nn

    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, outputs))
"""
REFUSED = {
    "--device cuda --model plain:net": "--device cuda: PyTorch ",
    "--device fake": "--device fake: --model mlp is of layers of mpiml",
    "--device fake --model plain:layers": "computes with NumPy, on the processor",
    "--autocast bfloat16 --model plain:layers": "--autocast bfloat16: ",
    "--tf32": "--tf32 --device auto: is of GPUs",
    "--share-devices": "--share-devices --device auto: there are none",
    "MPIML_FAKE_DEVICES=a --device fake --model plain:net": "2 ranks for 1 device, so ranks 0 and 1 would use the same",
    "MPIML_FAKE_DEVICES= --device fake --model plain:net": "MPIML_FAKE_DEVICES is empty, so there are none",
    "MPIML_FAKE_DEVICES=a:0.001,a:0.001 --device fake --model plain:net": "the model needs ",
}


@pytest.fixture
def plain(tmp_path: Path) -> str:
    """A directory with a model."""
    layers = "def layers(shape, outputs):\n    from mpiml.api import Flatten, Linear\n"
    (tmp_path / "plain.py").write_text(f"{PLAIN}\n{layers}    return [Flatten(), Linear(64, outputs)]\n")
    return str(tmp_path)


def test_weights_that_are_not_saved_are_those_of_the_device(plain: str, train_all: Any) -> None:
    flags = "--device fake --model plain:net --microbatches 2 --steps 3 --quiet --save-every"
    saved, not_saved = train_all(2, f"{flags} 3", f"{flags} 0", PYTHONPATH=plain)
    assert (saved.code, not_saved.code) == (0, 0), not_saved.err
    ranks = json.loads((saved.run / "environment.json").read_text())["ranks"]
    assert [rank["device"] for rank in ranks] == ["fake", "fake"]
    assert saved.result["weights_sha256"] == not_saved.result["weights_sha256"]


def test_what_cannot_be_trained_on_a_device_is_refused_in_a_line(plain: str, train_all: Any) -> None:
    for (flags, line), job in zip(REFUSED.items(), train_all(2, *REFUSED, PYTHONPATH=plain), strict=True):
        assert job.code == 78, flags
        assert line in job.err, flags
        assert len(job.err.strip().splitlines()) == 1, job.err
        assert not job.run.exists(), flags


def test_a_device_on_some_ranks_only(plain: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mpiml.train", "--device", "fake", "--model", "plain:net", "--steps", "1"]
    command += ["--out", str(tmp_path / "run")]
    (launcher, *_), environment = mpirun(1), os.environ | {"PYTHONPATH": plain}
    ranks = [[*("-n", "1", "-env", "MPIML_FAKE_DEVICES", devices), *command] for devices in ("a", "")]
    started = [launcher, *ranks[0], ":", *ranks[1]]
    done = subprocess.run(
        started, check=False, capture_output=True, text=True, timeout=60, env=environment, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 78, done.stderr
    assert "MPIML_FAKE_DEVICES is empty, so there are none (rank 1 on " in done.stderr
    assert done.stderr.count("mpiml.train:") == 1


def test_a_run_on_a_device_is_scored_without_one_or_there(plain: str, train: Any) -> None:
    """Without one by default; on the same device as it was in the run."""
    flags = "--device fake --model plain:net --steps 3 --microbatches 2 --quiet"
    job = train(0, flags, PYTHONPATH=plain, MPIML_FAKE_DEVICES="a")
    assert job.code == 0, job.err
    (last,) = (line["evaluation"] for line in job.metrics if "evaluation" in line)

    def scored(ranks: int, *arguments: str, devices: str = "") -> Any:
        words = "-m", "mpiml.evaluate", "--run", str(job.run), "--json", *arguments
        done = launch(ranks, *words, PYTHONPATH=plain, MPIML_FAKE_DEVICES=devices)
        return json.loads(done.stdout) if done.returncode == 0 else done.stderr

    assert scored(0)["test_loss"] == pytest.approx(last["loss"], rel=1e-5)
    there = scored(2, "--device", "fake", "--share-devices", devices="a")
    assert (there["test_loss"], there["accuracy"]) == (last["loss"], last["accuracy"])
    for more in ([], ["--probabilities"]):
        files = [str(job.run / f"{name}.npy") for name in ("plain", "there")]
        scored(0, "--predictions", files[0], *more)
        assert scored(2, "--device", "fake", "--predictions", files[1], *more, devices="a,a") == there
        plain_ones, those_there = map(np.load, files)
        np.testing.assert_allclose(those_there, plain_ones, rtol=1e-4)
    assert "too little memory on a:0.001 for " in scored(0, "--device", "fake", devices="a:0.001")
    assert "2 ranks for 1 device" in scored(2, "--device", "fake", devices="a")
    assert scored(0, "--share-devices").startswith("mpiml.evaluate: --share-devices --device cpu: there are none")
