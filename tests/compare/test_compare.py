"""mpiml.compare on real runs: equal ones, and those that differ by one cause, a damaged file, or one element."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mpiml.compare import weights
from mpiml.compare.__main__ import main
from mpiml.compare.sides import RUN, Side
from mpiml.run import verified
from tests.conftest import launch_all
from tests.forging import forge, in_format_before

SHORT = "--steps 6 --save-every 2 --log-every 1 --eval-every 3 --hidden 16 --quiet"
RUNS = {  # of 4 micro-batches unless it says otherwise
    "one": "--microbatches 4",
    "parts": "--microbatches 2",
    "seed": "--microbatches 4 --seed 1",
    "sparse": "--microbatches 4 --log-every 4 --save-every 3",
    "double": "--microbatches 4 --dtype float64",
    "double again": "--microbatches 4 --dtype float64 --lr 0.002",
    "unsaved": "--microbatches 4 --save-every 0",
    "other data": "--microbatches 4 --data DATA",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of runs by these names, and "four", which is "one" on 4 ranks."""
    path = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    np.savez(path / "data.npz", x_train=rng.random((1437, 8, 8), np.float32), y_train=np.arange(1437) % 10)
    flags = {name: f"{SHORT} {more.replace('DATA', str(path / 'data.npz'))}" for name, more in RUNS.items()}
    assert {job.code for job in launch_all(1, [(path / name, line) for name, line in flags.items()])} == {0}
    assert launch_all(4, [(path / "four", f"{flags['one']} --pipe 2")])[0].code == 0
    return path


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a run, for a test that changes it."""

    def copy(name: str) -> Path:
        return shutil.copytree(made / name, tmp_path / name)

    return copy


Compare = Callable[..., tuple[int, str, dict[str, Any]]]


@pytest.fixture
def compare(capsys: pytest.CaptureFixture[str]) -> Compare:
    """Exit code, text and JSON of a comparison."""

    def run(a: Path, b: Path, *flags: str) -> tuple[int, str, dict[str, Any]]:
        code = main([str(a), str(b), *flags])
        text = capsys.readouterr()
        assert main([str(a), str(b), *flags, "--json"]) == code
        said = capsys.readouterr().out
        return code, text.out + text.err, json.loads(said) if said else {}

    return run


def step(run: Path, number: int) -> Path:
    return run / f"checkpoints/step-{number:09d}.safetensors"


def change(path: Path, arrays: Callable[[dict[str, Any]], object]) -> None:
    """Write a checkpoint anew, whole and with right digests, after `arrays` has changed its arrays."""
    held, contents = verified.read(path, lambda name: True)
    arrays(held)
    verified.write(path, held, contents.texts, replace=True)


def test_one_run_on_two_layouts_is_equal(made: Path, compare: Compare) -> None:
    code, text, said = compare(made / "one", made / "four")
    assert code == 0
    assert text.splitlines() == [
        f"equal: A is {made}/one (step 6, 1 rank), B is {made}/four (step 6, 4 ranks)",
        "metrics: all numbers are equal, of 6 steps and 2 evaluations that both have logged",
        "checkpoints: all arrays are equal, in those of step 6, 4, 2",
        "settings that do not change results: --pipe 1 in A, 2 in B",
        "layout: ranks 1 in A, 4 in B; stages 1 in A, 2 in B",
    ]
    assert said["verdict"] == "equal"
    assert said["weights"]["equal"] == [2, 4, 6]


def test_micro_batches_are_named_first(made: Path, compare: Compare) -> None:
    code, text, said = compare(made / "one", made / "parts")
    assert code == 1
    assert "metrics: step 1 is the first to differ, of 6 steps" in text
    assert said["causes"]["likely"] == [
        "other micro-batches: --microbatches 4 in A, 2 in B; equal bits need equal ones"
    ]
    loss = said["metrics"]["fields"][0]
    losses = [json.loads((made / run / "metrics.jsonl").open().readline())["loss"] for run in ("one", "parts")]
    assert (loss["name"], [loss["a"], loss["b"]]) == ("loss", losses)
    assert all(f"{value!r}" in text for value in losses)
    assert loss["ulp"] == abs(int(np.diff(np.array(losses).view(np.int64))[0]))


@pytest.mark.parametrize(
    ("other", "cause"),
    [
        ("seed", "other settings: --seed 0 in A, 1 in B"),
        ("double", "other settings: --dtype float32 in A, float64 in B"),
        ("other data", "other data: digits.npz has "),
    ],
)
def test_another_cause_is_named(made: Path, compare: Compare, other: str, cause: str) -> None:
    code, text, said = compare(made / "one", made / other)
    assert code == 1
    assert said["causes"]["likely"][0].startswith(cause)
    assert f"likely cause: {cause}" in text


def test_other_dtypes_are_said(made: Path, compare: Compare) -> None:
    _, text, said = compare(made / "one", made / "double")
    assert "layers.1.bias is float32 (16,) in A, float64 (16,) in B" in text
    assert len(said["weights"]["differ"]["kinds"]) == 4


def test_the_first_element_that_differs(made: Path, compare: Compare) -> None:
    """Against NumPy: of all arrays in the order of the layers, at the first checkpoint."""
    for a, b, kind in (("one", "seed", "float32"), ("double", "double again", "float64")):
        code, text, said = compare(made / a, made / b)
        assert code == 1
        held, other = (verified.read(step(made / run, 2), lambda name: name.startswith("layers."))[0] for run in (a, b))
        names = [name for name in sorted(held) if not np.array_equal(held[name], other[name])]
        index = tuple(np.argwhere(held[names[0]] != other[names[0]])[0].tolist())
        values = held[names[0]][index], other[names[0]][index]
        first = said["weights"]["differ"]["first"]
        assert (first["array"], tuple(first["index"]), first["dtype"]) == (names[0], index, kind)
        assert (first["a"], first["b"]) == values
        assert all(str(value) in text for value in values)
        assert said["weights"]["differ"]["elements"] == sum(int((held[n] != other[n]).sum()) for n in held)


def test_one_changed_element_is_found(runs: Any, made: Path, compare: Compare) -> None:
    run = runs("one")

    def touch(arrays: dict[str, Any]) -> None:
        weight = arrays["layers.3.weight"]
        for _ in range(3):
            weight[2, 5] = np.nextafter(weight[2, 5], np.float32(9))

    change(step(run, 4), touch)
    code, text, said = compare(made / "one", run)
    assert code == 1
    assert "metrics: all numbers are equal" in text
    assert "those of step 4 differ in the weights; those of step 2 are equal" in text
    differ = said["weights"]["differ"]
    assert (differ["elements"], differ["arrays"], differ["also"]) == (1, 1, [])
    assert {name: differ["first"][name] for name in ("array", "index", "ulp")} == {
        "array": "layers.3.weight",
        "index": [2, 5],
        "ulp": 3,
    }
    assert "layers.3.weight[2, 5]" in text
    assert said["causes"]["likely"][0].startswith("nothing that is known of them explains it: look for memory errors")


def test_optimizer_state_is_compared_where_weights_are_equal(runs: Any, made: Path, compare: Compare) -> None:
    run = runs("one")
    change(step(run, 6), lambda arrays: arrays["optimizer.mean.layers.1.bias"].__setitem__(3, -0.0))
    code, text, said = compare(made / "one", run)
    assert (code, said["weights"]["differ"]["part"]) == (1, "optimizer state")
    assert "optimizer.mean.layers.1.bias[3]" in text


def test_arrays_that_one_alone_has_are_said(runs: Any, made: Path, compare: Compare) -> None:
    run = runs("one")
    change(step(run, 6), lambda arrays: arrays.pop("layers.3.bias"))
    code, text, _ = compare(made / "one", run)
    assert code == 1
    assert "  only A has layers.3.bias\n" in text


def test_a_flipped_bit_is_damage(runs: Any, made: Path, compare: Compare) -> None:
    run = runs("one")
    content = bytearray(step(run, 6).read_bytes())
    content[-5] ^= 1
    step(run, 6).write_bytes(content)
    code, text, said = compare(made / "one", run)
    assert code == 2
    assert text.startswith("equal as far as they can be read: ")
    assert "in those of step 4, 2\n" in text
    assert f"problem: {step(run, 6)} is damaged: " in text
    assert said["weights"]["compared"] == [4, 4]
    assert compare(made / "one", run, "--quick")[0] == 0  # by the digests that both had when they were written
    code, text, _ = compare(step(made / "one", 6), step(run, 6))
    assert (code, text.count("\n")) == (2, 1)
    assert "is damaged" in text


def test_a_checkpoint_that_is_cut_short_is_damage(runs: Any, made: Path, compare: Compare) -> None:
    run = runs("seed")
    step(run, 2).write_bytes(step(run, 2).read_bytes()[:-100])
    code, text, said = compare(made / "one", run)
    assert (code, said["weights"]["compared"]) == (1, [4, 4])
    assert f"problem: {step(run, 2)} is damaged" in text


def test_two_formats_of_checkpoints_are_equal(runs: Any, made: Path, compare: Compare) -> None:
    run = runs("one")
    for number in (2, 4, 6):
        in_format_before(step(run, number))
    assert compare(made / "one", run)[0] == 0
    assert compare(made / "seed", run)[0] == 1
    content = bytearray(step(run, 6).read_bytes())
    content[-5] ^= 1
    step(run, 6).write_bytes(content)
    assert compare(made / "one", run)[0] == 2


def test_runs_that_log_and_save_at_other_steps(made: Path, compare: Compare) -> None:
    code, text, _ = compare(made / "one", made / "sparse")
    assert code == 0
    assert "of 2 steps and 2 evaluations that both have logged (4 of A alone)" in text
    assert "in those of step 6\n" in text
    assert "settings that do not change results: --save-every 2 in A, 3 in B; --log-every 1 in A, 4 in B" in text


def test_runs_without_checkpoints_are_compared_by_their_digests(runs: Any, made: Path, compare: Compare) -> None:
    code, text, _ = compare(made / "one", made / "unsaved")
    assert code == 0
    assert "weights after the last step: equal, by weights_sha256 in result.json" in text
    run = runs("unsaved")
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"weights_sha256": "0" * 64}))
    assert compare(made / "one", run)[0] == 1


def test_what_is_not_compared_is_said(runs: Any, made: Path, compare: Compare) -> None:
    run = runs("unsaved")
    (run / "result.json").unlink()
    code, text, _ = compare(made / "one", run)
    assert code == 0
    one = made / "one"
    assert f"note: no checkpoints of one step: {one} has those of step 2, 4, 6, {run} has none\n" in text
    (run / "metrics.jsonl").write_text("")
    code, text, _ = compare(one, run)
    assert (code, text.count("\n")) == (2, 1)
    assert "nothing to compare: no line of " in text


def test_half_written_and_damaged_files_of_a_run(runs: Any, made: Path, compare: Compare) -> None:
    run = runs("one")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    assert compare(made / "one", run)[0] == 0
    for name in ("config.toml", "environment.json", "result.json"):
        (run / name).write_text("{")
    code, text, said = compare(made / "one", run)
    assert (code, said["verdict"]) == (0, "equal")  # these explain results, and are none
    assert all(
        f"note: {run / name} is damaged: " in text for name in ("config.toml", "environment.json", "result.json")
    )
    with open(run / "metrics.jsonl", "a") as file:
        file.write("\n")
    code, text, said = compare(made / "one", run)
    assert (code, said["verdict"]) == (2, "incomplete")
    assert f"problem: {run / 'metrics.jsonl'}, line 9, is damaged" in text


def test_settings_are_taken_from_checkpoints_where_config_toml_is_gone(runs: Any, made: Path, compare: Compare) -> None:
    run = runs("parts")
    (run / "config.toml").unlink()
    _, _, said = compare(made / "one", run)
    assert said["causes"]["likely"] == [
        "other micro-batches: --microbatches 4 in A, 2 in B; equal bits need equal ones"
    ]


def test_a_run_and_its_checkpoint_or_metrics(made: Path, compare: Compare) -> None:
    one, parts = made / "one", made / "parts"
    assert compare(one, step(made / "four", 4))[0] == 0
    assert compare(one / "checkpoints", made / "four")[0] == 0
    code, text, _ = compare(step(parts, 4), one)
    assert code == 1
    assert "likely cause: other micro-batches: --microbatches 2 in A, 4 in B" in text
    assert compare(one / "metrics.jsonl", made / "four")[0] == 0
    code, text, _ = compare(one / "metrics.jsonl", parts / "metrics.jsonl")
    assert code == 1
    assert "--microbatches 4 in A, 2 in B" in text
    code, text, _ = compare(step(one, 2), step(one, 4))
    assert code == 1
    assert "likely cause: other steps: 2 in A, 4 in B" in text


@pytest.mark.parametrize(
    ("a", "b", "line"),
    [
        ("one", "nowhere", "nowhere: No such file or directory; give the directory of a run"),
        ("one", ".", " holds no run: it has neither config.toml nor metrics.jsonl nor checkpoints/"),
        ("one", "data.npz", "data.npz is neither a run nor a checkpoint (.safetensors) nor metrics (.jsonl)"),
        ("one/checkpoints/step-000000002.safetensors", "one/metrics.jsonl", "nothing to compare: "),
        ("sparse/checkpoints/step-000000003.safetensors", "one", "one has those of step 2, 4, 6"),
    ],
)
def test_what_cannot_be_compared_is_one_line(made: Path, compare: Compare, a: str, b: str, line: str) -> None:
    code, text, _ = compare(made / a, made / b)
    assert code == 2
    assert text.startswith("mpiml.compare: ")
    assert line in text
    assert text.count("\n") == 1


def test_a_checkpoint_that_a_run_removes_meanwhile_is_no_problem(made: Path) -> None:
    steps = {4: step(made / "one", 4), 6: step(made / "one", 6)}
    a, b = (Side(name, made, RUN, checkpoints=held) for name, held in (("A", steps), ("B", steps | {4: made / "gone"})))
    compared = weights.compare(a, b)
    assert (compared.equal, compared.problems) == ([6], [])


def test_another_version_of_the_format_is_one_line(made: Path, tmp_path: Path, compare: Compare) -> None:
    code, text, _ = compare(forge(tmp_path / "a.safetensors", format="mpiml-9"), step(made / "one", 6))
    assert (code, text.count("\n")) == (2, 1)
    assert "a.safetensors is no checkpoint that this version of mpiml can read: its format is 'mpiml-9', not" in text


def test_a_file_of_another_program_is_one_line(made: Path, tmp_path: Path, compare: Compare) -> None:
    save_file({"x": np.ones(3)}, tmp_path / "a.safetensors")
    code, text, _ = compare(tmp_path / "a.safetensors", step(made / "one", 6))
    assert (code, text.count("\n")) == (2, 1)
    assert "is no checkpoint that this version of mpiml can read: its metadata have no format" in text


def test_settings_of_another_version_are_compared_as_text(runs: Any, made: Path, compare: Compare) -> None:
    run = runs("one")
    with open(run / "config.toml", "a") as file:
        file.write("hyperdrive = true\n")
    code, text, said = compare(made / "one", run)
    assert (code, said["causes"]["arithmetic"]) == (0, [{"what": "--hyperdrive", "a": "none", "b": "true"}])
    assert "settings that change results, though these are equal: --hyperdrive none in A, true in B" in text


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["a"]) == 2
    assert capsys.readouterr().err == "mpiml.compare: the following arguments are required: B\n"
