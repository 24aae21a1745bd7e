"""What a plan says of memory on devices: against numbers worked out by hand, and against runs on pretended devices."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.config import parse
from mpiml.errors import ConfigError
from mpiml.plan.__main__ import main
from mpiml.plan.screen import screen
from mpiml.plan.sizing import Plan, plan
from mpiml.training.job import job_of
from mpiml.training.resolve import open_data
from tests.conftest import launch

pytest.importorskip("torch")
MODEL = "tests.plan.on_devices:perceptron"
# Of the model, on boundaries of 64 floats: weights, two biases, a scale and two running averages with their count.
UPDATED = 4 * (64 * 300 + 6016 + 256 + 7 * 64)
GRADIENTS = UPDATED - 4 * (64 - 16)  # without what pads the last weights, 200, to a boundary
ACTIVATIONS = 4 * (
    64 + 300 + 20 + 20 + 10 + 10
)  # of a row: inputs of all, a ReLU's output, outputs, the loss's gradient


def made(ranks: int, *flags: str, node_ranks: int = 0, devices: int | None = None, kind: str = "cuda") -> Plan:
    config = parse(["--model", MODEL, "--device", kind, *flags], "test")
    return plan(job_of(config, ranks, node_ranks or ranks, open_data(config), devices), "digits")


def test_a_rank_alone_by_hand() -> None:
    one = made(1)
    (stage,) = one.stages
    assert stage.device is not None
    assert (stage.device.values, stage.device.gradients) == (UPDATED, GRADIENTS)
    assert stage.device.state == 2 * (UPDATED - 4 * (64 - 8))  # AdamW; they end where the last weights do
    assert stage.device.constants == 4 * 300  # a bias that is not trained
    assert stage.device.scratch >= 2 * 4 * 64 * 300
    assert stage.device.activations == one.microbatch_rows * ACTIVATIONS
    assert stage.device.total == sum(
        value for name, value in dataclasses.asdict(stage.device).items() if name not in ("gradient_vectors", "total")
    )
    assert one.device_bytes == stage.device.total
    assert (stage.values, stage.gradients, stage.state) == (0, 0, 0)
    assert stage.activations == one.microbatch_rows * 4 * 64  # the host keeps inputs
    assert stage.mirror == 3 * UPDATED  # AdamW
    assert made(1, "--save-every", "0").stages[0].mirror == UPDATED  # values are drawn on the host
    assert made(1, kind="fake").stages == one.stages
    assert made(1, kind="cpu").stages[0].device is None


def test_owners_sum_gradients_on_the_host() -> None:
    alone, both, host = made(1), made(2), made(2, kind="cpu")
    of_alone, of_both = alone.stages[0].device, both.stages[0].device
    assert of_alone
    assert of_both
    assert (of_both.state, of_both.values) == (of_alone.state, of_alone.values)
    (stage,) = both.stages
    assert (stage.values, stage.gradients, stage.state) == (UPDATED, UPDATED, 0)
    assert stage.mirror == 3 * UPDATED
    assert host.stages[0].activations > stage.activations


def test_ranks_that_share_devices_update_on_the_host() -> None:
    shared = made(4, "--share-devices", devices=2)
    (stage,) = shared.stages
    assert stage.device
    assert (stage.device.values, stage.device.gradients) == (UPDATED, GRADIENTS)
    assert (stage.device.state, stage.device.scratch, stage.mirror) == (0, 0, 0)
    assert (stage.values, stage.state > 0) == (UPDATED, True)
    assert shared.device_bytes == 2 * stage.device.total
    assert "a device, which 2 ranks share" in screen(shared)
    unknown = made(4, "--share-devices")
    assert unknown.device_bytes == stage.device.total
    assert "--node-devices N says how much" in screen(unknown)


@pytest.mark.parametrize(
    ("ranks", "flags", "given", "owners"),
    [
        (1, ["--share-devices"], {}, True),
        (4, ["--share-devices"], {"devices": 4}, True),
        (4, ["--share-devices"], {"node_ranks": 1}, True),
        (4, ["--share-devices"], {"node_ranks": 2}, False),
        (2, ["--allreduce", "mpi"], {}, False),
        (2, ["--workers", "2", "--average-every", "2", "--average-from", "3"], {}, False),
    ],
)
def test_who_updates_on_devices(ranks: int, flags: list[str], given: dict[str, Any], owners: bool) -> None:
    assert made(ranks, *flags, **given).owners == owners


def test_the_fullest_device_has_several_stages() -> None:
    cut = made(2, "--pipe", "2", "--share-devices", devices=1)
    assert cut.device_bytes == sum(stage.device.total for stage in cut.stages if stage.device)
    assert made(2, "--pipe", "2", "--share-devices").device_bytes < cut.device_bytes  # of a rank


def test_the_screen_has_a_total_for_each_stage() -> None:
    text = screen(made(4, "--pipe", "2")).splitlines()
    heads = next(line for line in text if line.endswith("device memory"))
    stages = text[text.index(heads) + 1 :][:2]
    assert [line.split()[0] for line in stages] == ["0", "1"]
    assert heads.split()[3:7] == ["optimizer", "scratch", "constants", "activations"]
    assert max(map(len, text)) <= 130


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--device cuda --node-devices 2", "4 ranks for 2 devices, so ranks 0 and 2 would use the same"),
        ("--node-devices 2", "--node-devices 2: needs --device cuda"),
        ("--device cuda --node-devices 0", "--node-devices: must be a whole number, at least 1"),
        ("--share-devices", "--share-devices --device auto"),
    ],
)
def test_refused(flags: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--ranks", "4", "--model", MODEL, *flags.split()]) == 78
    assert named in capsys.readouterr().err


def test_layers_of_numpy_are_refused_as_in_training() -> None:
    config = parse(["--device", "cuda"], "test")
    with pytest.raises(ConfigError, match=r"--device cuda: .*computes with NumPy"):
        job_of(config, 1, 1, open_data(config))


RUNS = [
    ["--ema", "0.9", "--microbatches", "16", "--optimizer", "lamb"],
    ["--pipe", "2", "--microbatches", "5"],  # a replica alone
    ["--average-every", "2", "--workers", "4"],
    ["MPIML_FAKE_DEVICES=a", "--share-devices"],
]


@pytest.mark.contract
def test_vectors_are_those_of_runs(tmp_path: Path) -> None:
    """What a pretended device has given to vectors: values, gradients, state and scratch, to the byte."""
    common = ["--model", MODEL, "--device", "fake", "--steps", "2", "--eval-every", "0", "--quiet"]
    runs = [[*flags, *common, "--out", str(tmp_path / str(number))] for number, flags in enumerate(RUNS)]
    done = launch(2, "-m", "tests.plan.on_devices", json.dumps(runs))
    used = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("USED")]
    assert len(used) == len(RUNS), done.stderr
    for flags, of_ranks in zip(RUNS, used, strict=True):
        planned = made(2, "--steps", "2", *(flag for flag in flags if "=" not in flag), kind="fake")
        lines = [stage.device for stage in planned.stages]
        fullest = [line.values + line.gradients + line.state + line.scratch for line in lines if line]
        assert [max(each) for each in np.array_split(of_ranks, len(lines))] == fullest, flags
