"""What a run begins with: settings and arrays from files that anybody may have written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpiml import restart
from mpiml.build import Task
from mpiml.config import Config, parse
from mpiml.errors import ConfigError, OutputError
from mpiml.nn import layer as nn
from mpiml.nn.layers import Linear
from mpiml.nn.parameters import Layout
from mpiml.parallel.state import VALUES
from mpiml.run import checkpoint
from mpiml.run.checkpoint import Checkpoint
from tests.forging import ARRAYS, forge

TASK = Task((4,), (), True, 3, 0)


def layouts(*layers: Linear) -> list[Layout]:
    """A stage for each layer."""
    nn.name(layers)
    return [Layout(nn.parameters([layer]), "float32") for layer in layers]


def test_arrays_come_back_under_their_names() -> None:
    (layout,) = stages = layouts(Linear(4, 3))
    values = [{VALUES: np.arange(layout.size, dtype="f"), "mean": np.ones(layout.size, "f")}]
    arrays = restart.named(stages, values, VALUES, "mean")
    assert checkpoint.kinds_of(arrays) == restart.needed_kinds(stages, (VALUES, "mean"))
    (found,) = restart.vectors(stages, Checkpoint(1, "", arrays), (VALUES, "mean"))
    back = restart.named(stages, [found], VALUES, "mean")
    assert all((back[name] == array).all() for name, array in arrays.items())


def test_shapes_are_compared_before_memory_is_asked_for() -> None:
    huge = layouts(Linear(4, 10**12), Linear(10**12, 3))
    with pytest.raises(OutputError, match=r"layers.0.weight is float32 \(4, 3\), the model's float32 \(4, 10+\)"):
        restart.vectors(huge, Checkpoint(1, "", ARRAYS), (VALUES,))


def test_a_longer_model_is_another_one(tmp_path: Path) -> None:
    more = {"layers.1.weight": np.ones((3, 3), "f")}
    with pytest.raises(OutputError, match=r"the checkpoint has layers.1.weight, which the model does not have"):
        restart.vectors(layouts(Linear(4, 3)), Checkpoint(1, "", ARRAYS | more), (VALUES,))
    first = forge(tmp_path / "longer.safetensors", arrays=ARRAYS | more | {"optimizer.mean.layers.0.bias": np.ones(3)})
    newest = forge(tmp_path / "run" / "checkpoints" / checkpoint.file_name(6), arrays=ARRAYS | more)
    for config in (Config(init=str(first)), resumed(newest)):
        with pytest.raises(OutputError, match=r"safetensors has layers.1.weight, which the model does not have"):
            restart.check_saved(config, layouts(Linear(4, 3)))
    forge(newest)
    for config in (Config(init=str(newest)), resumed(newest), parse(["--resume", "--out", str(tmp_path / "new")])):
        restart.check_saved(config, layouts(Linear(4, 3)))


def resumed(file: Path) -> Config:
    return parse(["--resume", "--out", str(file.parent.parent)])


def test_a_run_without_config_toml_takes_settings_from_its_checkpoint_and_code_from_flags(tmp_path: Path) -> None:
    config = 'model = "my:net"\nloss = "my:loss"\nbatch = 7\nhidden = []\n'
    asked = resumed(forge(tmp_path / "checkpoints" / checkpoint.file_name(6), config))
    with pytest.raises(ConfigError, match=r"names code, .*: repeat --model my:net --loss my:loss$"):
        restart.settings(asked)
    named = parse(["--resume", "--out", str(tmp_path), "--model", "my:net", "--loss", "my:loss"])
    going_on, stored = restart.settings(named)
    assert stored is not None
    assert (going_on.model, going_on.batch, stored.batch) == ("my:net", 7, 7)
    (tmp_path / "config.toml").write_text(config)  # which the user points at
    assert restart.settings(asked)[0].loss == "my:loss"


def test_a_damaged_config_of_a_run_is_one_line(tmp_path: Path) -> None:
    asked = parse(["--resume", "--out", str(tmp_path)])
    for text in ("]]]", "a = " + "[" * 100_000):
        (tmp_path / "config.toml").write_text(text)
        with pytest.raises(OutputError, match=rf"^{tmp_path}/config.toml is damaged: "):
            restart.settings(asked)
    for text in ("nonsense = 1", "batch = 0", 'batch = "x"'):
        (tmp_path / "config.toml").write_text(text)
        with pytest.raises(ConfigError, match=rf"^{tmp_path}/config.toml: "):
            restart.settings(asked)


def test_a_done_result_needs_no_more(tmp_path: Path) -> None:
    config = Config(resume=True, out=str(tmp_path), steps=8, quiet=True)
    assert restart.finished(config) is None
    for text, done in (('{"status": "done", "step": 8}', True), ('{"status": "done"}', False)):
        (tmp_path / "result.json").write_text(text)
        assert bool(restart.finished(config)) is done
    (tmp_path / "result.json").write_text('{"status": "done", "step": 9, "exit_code": null}')
    assert (restart.finished(config) or {})["exit_code"] == 0


@pytest.mark.parametrize(
    "changes",
    [{"data.mean": np.zeros(3)}, {"data.scale": np.zeros(4, "f")}, {"data.mean": np.zeros((4, 1))}],
    ids=["length", "dtype", "axes"],
)
def test_inputs_are_normalised_by_arrays_of_their_shape(changes: dict[str, np.ndarray]) -> None:
    good = {"data.mean": np.zeros(4), "data.scale": np.ones(4)}
    assert restart.normalization(Checkpoint(1, "", ARRAYS | good), TASK).scale.sum() == 4
    for arrays in (ARRAYS | good | changes, ARRAYS):
        with pytest.raises(OutputError, match=r"data\.(mean|scale)"):
            restart.normalization(Checkpoint(1, "", arrays), TASK)
