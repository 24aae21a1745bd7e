"""The examples that `make` runs: digits as images, a gpt beside a bigram model, one's own program; and a page's."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.data.dataset import Dataset
from mpiml.examples import gpt_stdlib, learning_apart
from tests.conftest import Job, launch

ROOT = Path(__file__).parents[2]
TINY = ["--context", "16", "--width", "16", "--blocks", "1", "--held-out", "0.2", "--batch", "16"]


def made(target: str) -> list[str]:
    """What a target of the Makefile passes to Python's -m."""
    done = subprocess.run(["make", "-n", target], check=True, cwd=ROOT, capture_output=True, text=True)
    (command,) = (line for line in done.stdout.splitlines() if "-m mpiml" in line)
    assert " -n 4 " in command
    return command.split(" -m ")[1].split()


@pytest.mark.contract
def test_cnn_knows_the_digits(train: Callable[..., Job]) -> None:
    program, *flags = made("example-cnn")
    assert program == "mpiml.train"
    assert train(4, " ".join([*flags, "--quiet"])).result["accuracy"] > 0.97


@pytest.mark.contract
def test_own_program_trains_the_same_model_alone_and_on_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (program,) = made("example-own")
    for ranks in (0, 2):
        done = launch(ranks, "-m", program)
        assert done.returncode == 0, done.stderr
    alone, on_ranks = (json.loads(path.read_text()) for path in sorted(tmp_path.glob("runs/*/result.json")))
    assert alone["accuracy"] > 0.9
    assert (alone["ranks"], on_ranks["ranks"]) == (1, 2)
    assert alone["weights_sha256"] == on_ranks["weights_sha256"]


@pytest.mark.contract
def test_a_model_of_ten_digits_helps_with_five_classes(train: Callable[..., Job], tmp_path: Path) -> None:
    """As the page on going on differently has it; beside the same without --init."""
    page = (ROOT / "mpiml/run/GOING_ON.md").read_text().replace("\\\n", "").replace('"', "")
    ten, five = re.findall(r"-m mpiml.train (.*) --out runs/\w+(.*)", page)[:2]
    first = train(0, f"{''.join(ten)} --quiet --microbatches 2", out="runs/ten")
    assert first.result["accuracy"] > 0.9
    flags = f"{''.join(five)} --quiet --microbatches 2".replace("runs/ten", str(first.run))
    begun = train(0, flags, out="five")
    fresh = train(0, re.sub(r"--init \S+ --init-partial", "", flags), out="fresh")
    assert begun.result["accuracy"] > fresh.result["accuracy"] + 0.02, (begun.err, fresh.err)


@pytest.mark.contract
@pytest.mark.parametrize(("example", "needs"), [("own_loop_numpy", "numpy"), ("own_loop_jax", "jax")])
def test_loops_of_ones_own_have_the_same_bits_on_any_ranks(example: str, needs: str) -> None:
    if not importlib.util.find_spec(needs):
        pytest.skip(f"needs {needs}")
    said = []
    for ranks in (1, 2, 4):
        done = launch(ranks, "-m", f"mpiml.examples.{example}")
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert len(set(said)) == 1
    loss, digest = said[0].splitlines()
    assert float(loss.split()[-1]) < 0.3
    assert re.fullmatch("weights_sha256 [0-9a-f]{64}", digest)
    assert len((ROOT / "mpiml/examples" / f"{example}.py").read_text().splitlines()) < 40


def gpt(ranks: int, text: str, out: Path, *flags: str) -> tuple[int, str, dict[str, float]]:
    """The example on a text: exit code, what it says of the two models, result.json."""
    source = out.with_suffix(".txt")
    source.write_text(text)
    (program,) = made("example-gpt")
    done = launch(ranks, "-m", program, *TINY, "--data", str(source), "--out", str(out), *flags)
    said = [line for line in done.stdout.splitlines() if "bigram" in line]
    assert len(said) == 1, done.stderr
    return done.returncode, said[0], json.loads((out / "result.json").read_text())


@pytest.mark.contract
def test_gpt_sees_further_than_a_byte(tmp_path: Path) -> None:
    """In aabbaabb... either letter follows a letter as often: ln 2 nats for a bigram, nothing to guess for a gpt."""
    code, said, result = gpt(4, "aabb" * 4000, tmp_path / "four", "--steps", "60")
    assert code == 0
    assert re.fullmatch(rf".*: gpt {result['test_loss']:.3f}, bigram model 0\.69\d: the gpt is below", said)
    one = gpt(0, "aabb" * 4000, tmp_path / "one", "--steps", "60")
    assert one[2]["weights_sha256"] == result["weights_sha256"]


@pytest.mark.contract
def test_gpt_that_is_no_better_is_told_so(tmp_path: Path) -> None:
    code, said, _ = gpt(2, "ab" * 4000, tmp_path / "run", "--steps", "1")
    assert code == 1
    assert said.endswith("the gpt is NOT below")


def test_bigram_loss_by_hand() -> None:
    """Byte 1 has been followed by 1 and 2, and 2 by 1; asked is for 2 after either."""
    rows = [np.array(part, np.uint8) for part in ([[1, 1], [2, 3]], [[1, 2], [1, 3]], [[1, 2]], [[2, 2]])]
    x_train, y_train, x_test, y_test = rows
    dataset = Dataset.from_arrays(x_train, y_train, x_test, y_test)
    everywhere = 256 * gpt_stdlib.UNSEEN
    after_1, after_2 = 1.1 / (2 + everywhere), 0.1 / (1 + everywhere)
    assert gpt_stdlib.bigram_loss(dataset) == pytest.approx(-(math.log(after_1) + math.log(after_2)) / 2)


def test_bigram_counts_every_row_once() -> None:
    random = np.random.default_rng(0)
    x, y = random.integers(0, 256, (2, 2500, 3))
    counts = gpt_stdlib.pairs(Dataset.from_arrays(x, y, x, y).train)
    assert counts.sum() == x.size
    expected = np.zeros((256, 256))
    np.add.at(expected, (x, y), 1)
    np.testing.assert_array_equal(counts, expected)


def test_the_example_reads_the_standard_library() -> None:
    assert gpt_stdlib.settings([]).data == str(Path(sysconfig.get_path("stdlib")) / "*.py")


@pytest.mark.parametrize("flags", [[], ["--config", str(Path(gpt_stdlib.__file__).with_name("nanogpt.toml"))]])
def test_files_of_settings_of_the_gpt(flags: list[str]) -> None:
    config = gpt_stdlib.settings([*flags, "--batch", "7"])
    assert (config.model, config.decay, config.clip, config.batch) == ("gpt", "cosine", 1.0, 7)
    assert (config.tie, config.steps) == ((True, 2000) if flags else (False, 500))


def test_without_a_standard_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    library = tmp_path / "python[3].zip"
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(library))
    assert gpt_stdlib.main([]) == 65
    (said,) = capfd.readouterr().err.splitlines()
    assert str(library) in said
    assert "--data" in said
    assert gpt_stdlib.settings(["--data", "mine.txt"]).data == "mine.txt"


def line(step: int, speed: float, sent: int) -> dict[str, Any]:
    return {"step": step, "samples_per_second": speed, "seconds": {"bytes_sent": {"min": 0, "max": sent}}}


@pytest.mark.parametrize(
    ("score", "target", "expected"),
    [("loss", 0.5, (8, 3.0, 30)), ("accuracy", 0.8, (8, 3.0, 30)), ("loss", 0.1, (None, 4.0, 35))],
)
def test_what_it_took_to_be_good_is_added_up_over_lines(score: str, target: float, expected: Any) -> None:
    """Steps of 10 rows; the last four are not needed for the first two targets."""
    poor, good = ({"loss": loss, "accuracy": 1 - loss, "rows": 7} for loss in (0.9, 0.2))
    entries = [line(4, 40.0, 10), {"step": 4, "evaluation": poor}, line(8, 20.0, 20), {"step": 8, "evaluation": good}]
    problem = learning_apart.Problem("", score, target, [])
    assert learning_apart.reached([*entries, line(12, 40.0, 5)], problem, rows=10) == expected


def test_a_problem_that_is_not_there_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert learning_apart.main(["letters"]) == 78
    assert "letters: there are digits, gpt," in capfd.readouterr().err
