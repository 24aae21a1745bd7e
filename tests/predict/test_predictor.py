"""Predictions: the model of a step against numbers worked out by hand, and its commands on a real, small study."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.errors import ConfigError
from mpiml.plan import exchanges, sums
from mpiml.predict import predictor
from mpiml.predict.__main__ import main
from mpiml.predict.calibration import curves_of
from mpiml.predict.machine import MACHINE, Link, Machine, Speeds, interpolated, load_machine
from mpiml.predict.step import step_time
from mpiml.scaling.points import POINTS, STUDY, Point
from mpiml.training.job import Job, job_of
from tests.conftest import mpirun
from tests.scaling.test_results import made
from tests.scaling.test_study import command

NETWORK = Link.assumed(1e-3, 1e6)
ROWS = 40


def job(ranks: int = 1, node_ranks: int = 0, **settings: Any) -> Job:
    """Linear(8, 16), ReLU, Linear(16, 4) on steps of 40 rows."""
    x, y = np.ones((120, 8), np.float32), np.arange(120) % 4
    chosen = {"hidden": (16,), "batch": ROWS, "optimizer": "sgd"} | settings
    return job_of(Config(**chosen), ranks, node_ranks or ranks, Dataset.from_arrays(x, y, x, y))


def machine(**changes: Any) -> Machine:
    """Layers take 1, 2 and 3 ms a row forward and twice that backward; inputs 10 ms, the loss 20 ms a row."""

    def curve(milliseconds: float) -> list[float]:
        return [milliseconds * 1e-3, milliseconds * 1e-3 * 10]

    speeds = Speeds(
        inputs=curve(10),
        loss=curve(20),
        forward=[curve(1), curve(2), curve(3)],
        backward=[curve(2), curve(4), curve(6)],
        update=1e-3,
        add=1e-4,
        microbatch=0.5,
        step=7.0,
    )
    layers = ["layers.0 Linear", "layers.1 ReLU", "layers.2 Linear"]
    plain = Machine("1", "cpu", "", layers, [1, 10], 4, 4, speeds, speeds, Link([8, 1000], [1.0, 993.0]), None)
    return replace(plain, **changes)


def test_one_rank_by_hand() -> None:
    took = step_time(job(microbatches=4), machine(), NETWORK)
    # Four micro-batches of ten rows, each (10 + 20 + 6 + 12) ms a row and half a second; two merges in pairs and one
    # of pairs, each of 224 elements with padding.
    assert took.compute == pytest.approx(4 * (0.48 + 0.5) + 3 * 224 * 1e-4)
    assert (took.waiting, took.communication) == pytest.approx((0, 7.0))
    assert took.update == pytest.approx(224 * 1e-3)
    assert took.seconds == pytest.approx(took.compute + 7.224)


def test_frozen_parameters_are_not_summed_and_updated() -> None:
    for allreduce, adds in (("ordered", 0), ("mpi", 80 * 1e-4)):
        frozen = job(microbatches=4, rates=("layers.0=0",), allreduce=allreduce)
        took = step_time(frozen, machine(), NETWORK)
        assert took.compute == pytest.approx(4 * (0.48 + 0.5) + 3 * 80 * 1e-4)
        assert took.update == pytest.approx(80 * 1e-3 + adds)


def test_a_pipeline_by_hand() -> None:
    made = job(2, pipe=2, microbatches=2, batch=20)
    took = step_time(made, machine(), NETWORK)
    # Cut after the first layer: stage 0 takes .11 and .02, stage 1 .25 and .1 of ten rows, and .25 for being a pass.
    first, second, way = (0.36, 0.27), (0.50, 0.35), 1.0 + 10 * 16 * 4 - 8
    backward_1 = first[0] + way + 2 * (second[0] + second[1])  # 1F1B: F B F B on the last stage
    assert took.compute == pytest.approx(sum(first) + sum(second) + max(made.stages[0].layout.size, 0) * 1e-4)
    assert took.waiting + sum(first) + sum(second) == pytest.approx(backward_1 + way + first[1])


def test_a_pipeline_with_split_backward_passes_waits_for_less() -> None:
    """In equal halves; the second stage, the slower one, does both W while it would wait for nothing, and the first
    stage the second of its own at the end."""
    whole, split = (
        step_time(job(2, pipe=2, microbatches=2, batch=20, schedule=name), machine(), NETWORK)
        for name in ("1f1b", "zb-h1")
    )
    assert split.compute == whole.compute
    assert 0 <= split.waiting < whole.waiting


def test_blocks_that_are_computed_again_take_their_forward_pass_twice() -> None:
    plain, again = (job(microbatches=4) for _ in range(2))
    again.stages[0].layers[2].block = "a block"
    took, longer = (step_time(one, machine(), NETWORK) for one in (plain, again))
    assert longer.compute - took.compute == pytest.approx(4 * 10 * 3e-3)  # the last layer's forward pass, 3 ms a row


def test_two_nodes_by_hand() -> None:
    """One block belongs to rank 0, another to rank 1: each node sends the other's part, and gets it back."""
    here, apart = job(2, 2, microbatches=2), job(2, 1, microbatches=2)
    within, between = (step_time(one, machine(), NETWORK) for one in (here, apart))
    traffic = exchanges.traffic(apart, 0)
    busiest = traffic.gradients_out.max() + traffic.values_out.max()  # one after the other
    record = 1e-3 + 8 * (2 + 2 * 69) / 1e6  # two flags; loss and weight, as digits
    exchanged = busiest / 1e6 + traffic.messages.max() * 1e-3
    assert between.communication - within.communication == pytest.approx(record + exchanged)
    assert within.update == pytest.approx(traffic.slices.max() / 4 * (1e-3 + 1e-4))  # two parts make one addition
    assert between.compute == pytest.approx(within.compute)


def test_workers_by_hand() -> None:
    """Nothing leaves a node in a step, but a quarter of what a round ends with; what a rank's workers do adds up."""
    apart = job(2, 1, microbatches=4, workers=2, average_every=4, ema=0.9)
    took, mean = step_time(apart, machine(), NETWORK), sums.averaging(apart, 0).mean
    busiest = mean.gradients_out.max() + mean.values_out.max()
    of_values_and_ema = 2 * (busiest / 1e6 + mean.messages.max() * 1e-3)
    assert took.communication == pytest.approx(7.0 + of_values_and_ema / 4)
    adding = 2 * (2 * 224 + mean.slices.max() / 4) * 1e-4  # copied there and back, and two parts make one addition
    assert took.update == pytest.approx(224 * 1e-3 + adding / 4)
    assert took.compute == pytest.approx(2 * 0.98 + 224 * 1e-4)

    both = step_time(job(1, microbatches=4, workers=2, average_every=4, outer_lr=0.7), machine(), NETWORK)
    assert both.compute == pytest.approx(4 * 0.98 + 2 * 224 * 1e-4)
    assert both.communication == pytest.approx(2 * 7.0)
    assert both.update == pytest.approx(2 * 224 * 1e-3 + (2 * 2 + 1) * 224 * 1e-4 / 4)


def test_workers_of_several_nodes_sum_as_one_job_does() -> None:
    here, half = job(4, 1, microbatches=4, workers=2, average_every=10**9), job(2, 1, microbatches=2, batch=ROWS // 2)
    assert step_time(here, machine(), NETWORK).seconds == pytest.approx(step_time(half, machine(), NETWORK).seconds)


def test_more_ranks_slow_each_other_down() -> None:
    alone = machine().alone
    known = machine(busy=replace(alone, update=4e-3, forward=[[2e-3, 2e-2]] * 3))
    assert known.speeds(1) == alone
    assert known.speeds(3).update == pytest.approx(3e-3)
    assert known.speeds(4).forward[2] == pytest.approx([2e-3, 2e-2])
    assert known.speeds(99) == known.speeds(4)


def test_between_measured_sizes() -> None:
    assert interpolated([1, 3], [10.0, 20.0], 2) == 15
    assert interpolated([1, 3], [10.0, 20.0], 5) == 30
    assert interpolated([1, 3], [10.0, 5.0], 5) == 5  # noise does not make larger things free
    known = machine()
    assert known.seconds([4.0, 8.0], 0.25) == 1.0  # one micro-batch in four has a row
    assert Link.assumed(2e-6, 1e9).time(1e9) == pytest.approx(1.000002)
    assert Link([8, 1008], [0.5, 1.5]).bandwidth == pytest.approx(1000)


def test_backward_passes_are_measured_from_the_last_layer() -> None:
    curves = curves_of([[1, 2, 3, 4, 5, 6, 7], [10, 20, 30, 40, 50, 60, 70]], 2)
    assert (curves["inputs"], curves["loss"], curves["update"]) == ([1, 10], [4, 40], [7, 70])
    assert (curves["forward"], curves["backward"]) == ([[2, 20], [3, 30]], [[6, 60], [5, 50]])


def test_larger_nodes_than_the_measured_one_are_assumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known(tmp_path, one=[1.0], two=[1.0])
    for ranks, node_ranks, cores in (("1,4,32", "64", "32"), ("4,32", "8", "8"), ("4", "64", None), ("32", "4", None)):
        assert main(["predict", str(tmp_path), "--ranks", ranks, "--node-ranks", node_ranks]) == 0
        output = capsys.readouterr().out
        assert ("ASSUMED: nodes" in output) == (cores is not None)
        assert cores is None or f"ASSUMED: nodes of {cores} cores, on each of which a rank computes" in output


def test_how_a_network_is_known(tmp_path: Path) -> None:
    alone, linked = machine(), machine(between=Link([0, 1e9], [3e-6, 1.0 + 3e-6]))
    assumed = "2.0 us (ASSUMED; set it with --latency X), then 10.0 GB/s (ASSUMED; set it with --bandwidth X)"
    assert predictor.describe(alone).endswith(f"between nodes: {assumed}")
    assert predictor.describe(alone, 1e-5, 2e9).endswith("between nodes: 10.0 us (as given), then 2.0 GB/s (as given)")
    half = "10.0 us (as given), then 10.0 GB/s (ASSUMED; set it with --bandwidth X)"
    assert predictor.describe(alone, 1e-5).endswith(half)
    assert predictor.describe(linked).endswith("3.0 us (measured), then 1.0 GB/s (measured)")
    assert predictor.describe(linked, 1e-5).endswith("10.0 us (as given), then 1.0 GB/s (measured)")
    assert predictor.network(linked) == linked.between


def test_measurements_are_kept_and_their_medians_count(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"predict calibrate {tmp_path}"):
        load_machine(tmp_path)
    (tmp_path / MACHINE).mkdir()
    for number, update in enumerate((1.0, 9.0, 2.0)):
        speeds = replace(machine().alone, update=update)
        (tmp_path / MACHINE / f"{number}.json").write_text(machine(alone=speeds).to_json())
    assert load_machine(tmp_path).alone == replace(machine().alone, update=2.0)
    assert load_machine(tmp_path).inside == machine().inside
    (tmp_path / MACHINE / "3.json").write_text(machine(ranks=8).to_json())
    with pytest.raises(ConfigError, match="different numbers of ranks"):
        load_machine(tmp_path)
    (tmp_path / MACHINE / "4.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"4.json cannot be used"):
        load_machine(tmp_path)


def known(directory: Path, **measured: list[float]) -> Path:
    """A study of digits by a model of three layers whose machine is known."""
    base, two = Point(1, 1, 60, 1), Point(2, 1, 60, 2)
    eight = Point(8, 1, 60, 8)
    made(directory, "strong", {base: measured["one"], two: measured["two"], eight: [1.0]})
    path = directory / POINTS / f"{eight.name}_0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"nodes": 1}))
    study = json.loads((directory / STUDY).read_text())
    settings = ["--hidden", "16", "--batch", "60", "--optimizer", "sgd"]
    (directory / STUDY).write_text(json.dumps(study | {"settings": settings, "steps": 9, "warm_up": 1}))
    four = replace(machine().alone, forward=[[1e-3, 1e-2]] * 4, backward=[[1e-3, 1e-2]] * 4)
    (directory / MACHINE).mkdir()
    (directory / MACHINE / "000.json").write_text(machine(alone=four, busy=four, layers=["?"] * 4).to_json())
    return directory


def test_predictions_are_checked_against_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known(tmp_path, one=[1.0], two=[1.0])
    compared, left_out = predictor.compare(tmp_path)
    one, two = (each.predicted for each in compared)
    assert left_out == 1  # eight ranks have to take turns
    for name, factor, code in (("good", 1.1, 0), ("bad", 1.5, 1)):
        (tmp_path / name).mkdir()
        study = known(tmp_path / name, one=[one * factor * 1e3] * 2, two=[two * factor * 1e3] * 2)
        assert main(["check", str(study)]) == code
        output = capsys.readouterr().out
        assert "2 points" in output
        assert f"median error {1 - 1 / factor:.0%}" in output
        assert "more ranks than cores: 1 point\n" in output
    (tmp_path / "loud").mkdir()
    study = known(tmp_path / "loud", one=[one * 1e3, one * 2e3], two=[two * 1e3, two * 2e3])
    assert main(["check", str(study)]) == 1
    assert (
        "range of repeats 67%; undecided: repeats differ as much" in capsys.readouterr().out
    )  # and predictions 33 % off


def test_the_best_grid_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known(tmp_path, one=[1.0], two=[1.0])
    assert main(["predict", str(tmp_path), "--ranks", "1,4,64", "--node-ranks", "4", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)["predictions"]
    assert {(one["ranks"], one["stages"]) for one in content} == {(1, 1), (4, 1), (4, 2), (4, 4), (64, 2), (64, 4)}
    best = max((one for one in content if one["ranks"] == 4), key=lambda one: one["samples_per_second"])

    assert main(["predict", str(tmp_path), "--ranks", "1,4,256", "--node-ranks", "4", "--latency", "1e-5"]) == 0
    output = capsys.readouterr().out
    assert "ASSUMED; set it with --bandwidth" in output
    assert f"{best['stages']} x {4 // best['stages']}" in output
    (line,) = (line for line in output.splitlines() if line.strip().startswith("4 "))
    assert sum(int(cell[:-1]) for cell in line.split()[-4:]) == pytest.approx(100, abs=2)
    assert "256 ranks: the batch has too few rows" in output


def test_grids_that_cannot_share_the_workers_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known(tmp_path, one=[1.0], two=[1.0])
    study = json.loads((tmp_path / STUDY).read_text())
    settings = [*study["settings"], "--average-every", "4", "--workers", "4"]
    (tmp_path / STUDY).write_text(json.dumps(study | {"settings": settings}))
    assert main(["predict", str(tmp_path), "--ranks", "1,3,6", "--node-ranks", "4", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)["predictions"]
    assert {(one["ranks"], one["stages"], one["microbatches"] % 4) for one in content} == {
        (1, 1, 0),
        (3, 3, 0),  # one replica
        (6, 3, 0),  # two
    }
    assert main(["predict", str(tmp_path), "--ranks", "5"]) == 0
    assert "5 ranks: the batch has too few rows for the micro-batches of any grid, or" in capsys.readouterr().out
    (tmp_path / STUDY).write_text(json.dumps(study | {"settings": [*study["settings"], "--microbatches", "4"]}))
    assert main(["predict", str(tmp_path), "--ranks", "64"]) == 0
    assert "64 ranks: --microbatches 4 are too few for any grid\n" in capsys.readouterr().out
    (tmp_path / STUDY).write_text(json.dumps(study | {"settings": [*study["settings"], "--leaf", "3"]}))
    assert main(["predict", str(tmp_path), "--ranks", "1,2", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)["predictions"]
    assert {one["microbatches"] % (3 * one["ranks"] // one["stages"]) for one in content} == {0}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"mode": "strong", "settings": [], "points": [{"x": 1}]}'])
@pytest.mark.parametrize("arguments", [["predict", "--ranks", "2"], ["check"], ["calibrate"]])
def test_damaged_studies_are_refused(
    tmp_path: Path, text: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / STUDY).write_text(text)
    assert main([*arguments, str(tmp_path)]) == 74
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"{tmp_path / STUDY} is damaged" in message


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["predict", "nowhere", "--ranks", "4"], "holds no study"),
        (["calibrate", "nowhere"], "holds no study"),
        (["check", "nowhere"], "holds no study"),
        (["predict", "KNOWN", "--ranks", "4", "--node-ranks", "0"], "--node-ranks: must be a whole number, at least 1"),
        (["predict", "KNOWN", "--ranks", "4", "--bandwidth", "-1"], "--bandwidth: must be more than 0"),
        (["predict", "KNOWN", "--ranks", "4", "--latency", "nan"], "--latency: must be a number"),
        (["predict", "KNOWN", "--ranks", "0"], "--ranks: must be whole numbers, each at least 1"),
        (["calibrate", "KNOWN", "--repeats", "0"], "--repeats: must be a whole number, at least 1"),
        (["calibrate", "KNOWN", "--ranks", "0"], "--ranks: must be a whole number, at least 1"),
        (["calibrate", "KNOWN", "--launcher", "nosuch {ranks}"], "no program nosuch"),
    ],
)
def test_bad_commands_are_refused(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = str(known(tmp_path, one=[1.0], two=[1.0]))
    assert main([study if word == "KNOWN" else word for word in arguments]) == 78
    assert named in capsys.readouterr().err


def test_another_model_is_refused(tmp_path: Path) -> None:
    known(tmp_path, one=[1.0], two=[1.0])
    (tmp_path / MACHINE / "000.json").write_text(machine().to_json())
    with pytest.raises(ConfigError, match="is of another model"):
        predictor.Predictor(tmp_path)


@pytest.mark.contract
def test_a_real_calibration(tmp_path: Path) -> None:
    """Of a study with workers: what is measured has the right shape, and predictions and their check can be made of it.
    Of times, nothing."""
    launch = " ".join([*mpirun(1)[:-1], "{ranks}"])
    directory = tmp_path / "study"
    study = ["--steps", "2", "--warm-up", "1", "--repeats", "1", "--out", str(directory), "--launcher", launch]
    settings = ["--hidden", "8,8", "--batch", "24", "--average-every", "2", "--workers", "2"]
    assert command("mpiml.scaling", "run", "--ranks", "1", *study, "--", *settings).returncode == 0
    done = command("mpiml.predict", "calibrate", str(directory), "--ranks", "2", "--repeats", "1", "--launcher", launch)
    assert done.returncode == 0, done.stderr
    machine = load_machine(directory)
    assert (machine.ranks, machine.rows, len(machine.layers)) == (2, [1, 2, 4, 8, 16, 24], 6)
    for speeds in (machine.alone, machine.busy):
        curves = [speeds.inputs, speeds.loss, *speeds.forward, *speeds.backward]
        assert len(curves) == 2 + 2 * 6
        assert all(len(curve) == 6 and min(curve) >= 0 for curve in curves)
        assert min(speeds.update, speeds.add, speeds.microbatch, speeds.step) >= 0
        assert speeds.forward[1][-1] > 0
    assert machine.inside
    assert machine.between is None
    predicted = command("mpiml.predict", "predict", str(directory), "--ranks", "2,6", "--node-ranks", "1")
    assert predicted.returncode == 0, predicted.stderr
    checked = command("mpiml.predict", "check", str(directory))
    assert checked.returncode in (0, 1), checked.stderr
    assert "point: median error" in checked.stdout
