"""The check on a GPU: it holds on a pretended device, and says what differs where something does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.bench import gpu_check, gpu_rows, gpu_runs
from mpiml.bench.gpu_runs import Ended, Runs
from mpiml.bench.rows import Ratio
from tests.conftest import launch

LINES = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


@pytest.mark.contract
def test_bits_and_a_killed_run_on_a_pretended_device(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    file = tmp_path / "rows.json"
    command = ["-m", "mpiml.bench.gpu_check", "--device", "fake", "--short", "--only", "bits,resume"]
    done = launch(0, *command, "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(file.read_text())
    assert written["device"] == "fake"
    assert [(row["part"], row["value"], row["verdict"]) for row in written["rows"]] == [
        ("bits", "the same", "reached"),
        ("resume", "the same", "reached"),
    ]


@pytest.mark.contract
def test_the_gradients_are_those_of_plain_pytorch(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    rows = list(gpu_check.gradients(Runs("fake", 1, tmp_path)))
    assert [row.reached for row in rows] == [True] * 4, rows
    assert [row.value for row in rows if "gradients" in row.text] == ["equal bits"] * 2


@pytest.mark.contract
def test_speed_and_transfers_are_measured_there_without_marks(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    runs = Runs("fake", 1, tmp_path)
    rows = [*gpu_check.speed(runs), *gpu_check.transfers(runs)]
    assert len(rows) == 3 * 3 + 2 * 2, rows
    assert all(row.figures["median"] > 0 and row.reached is None for row in rows)


def test_a_difference_is_named() -> None:
    run = Ended("a", LINES, 1.0)
    assert run.differs(Ended("a", LINES, 2.0)) == ""
    assert run.differs(Ended("b", LINES, 1.0)) == "weights differ, metrics do not"
    assert run.differs(Ended("a", [LINES[0], {"step": 2, "loss": 1.5}], 1.0)) == "metrics differ from step 2 on"
    assert run.differs(Ended("a", LINES[:1], 1.0)) == "1 lines of metrics instead of 2"


def test_how_far_arrays_are_apart() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("mpi4py.MPI")
    from mpiml.bench.gpu_job import near

    one = np.array([1, -1e-30, 0.5], np.float32)
    next_to_it = np.nextafter(one, np.float32(2))
    assert near("", {"w": one}, {"w": one}).value == "equal bits"
    beside = near("", {"w": next_to_it}, {"w": one})
    assert (beside.figures["units_in_the_last_place"], beside.reached) == (1, True)
    for other in (one + np.float32(1e-5), one * np.float32(np.nan)):
        assert not near("", {"w": other, "b": one}, {"w": one, "b": one}).reached


def test_a_row_of_correctness_decides_and_a_mark_of_speed_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    slow = gpu_rows.speed("speed", "slow", Ratio(0.5, 0.4, 0.6), "", 0.9)
    wrong = gpu_rows.same("bits", "wrong", "weights differ")
    for rows, code in ([slow], 0), ([slow, wrong], 1), ([gpu_rows.failed("bits", "", "no memory")], 1):
        monkeypatch.setattr(gpu_check, "PARTS", {"bits": lambda runs, rows=rows: iter(rows)})
        assert gpu_check.main(["--device", "fake"]) == code
        assert "MISSED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--only", "bits,speeds"], "--only bits,speeds: there is no part 'speeds'; there are bits, gradients"),
        (["--json", "/no/such/x.json"], "--json /no/such/x.json: its directory is not there, or cannot be written to"),
        (["--device", "cpu"], "--device: invalid choice: 'cpu'"),
    ],
)
def test_what_it_cannot_do_is_one_line(flags: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--device", "fake", *flags]) in (74, 78)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"mpiml.bench.gpu_check: {line}")


def test_a_run_that_ends_before_it_is_killed_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(self: Any, flags: str, out: Path) -> list[str]:
        return [
            "-c",
            f"import pathlib; pathlib.Path({str(out)!r}, 'result.json').write_text('{{\"status\": \"done\"}}')",
        ]

    monkeypatch.setattr(Runs, "arguments", ended)
    with pytest.raises(gpu_runs.JobError, match="was to be killed after 2 checkpoints, but is done; 0 ranks"):
        gpu_runs.kill(Runs("cuda", 1, tmp_path), "", tmp_path)
