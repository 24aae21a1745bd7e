"""A checkpoint is data: what it names is not run, and what it asks for gets no memory, unless the user says so."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.config import Config, parse
from mpiml.errors import ConfigError, OutputError
from mpiml.evaluate import evaluate
from mpiml.evaluate import parse as parse_evaluate
from mpiml.run import step_files
from mpiml.run.result import update_result
from mpiml.train import train
from mpiml.training import export
from tests.forging import forge

pytestmark = pytest.mark.contract

TASK = {"shape": [8, 8], "labels": [], "classification": True, "outputs": 10, "tokens": 0}
ARRAYS = {"layers.1.weight": np.ones((64, 10), "f"), "layers.1.bias": np.zeros(10, "f")}
CODE = ("data", "transform", "model", "loss", "metric", "decay")
EVIL = """
from pathlib import Path
Path(__file__).with_name("imported").touch()
def run(*arguments):
    Path(__file__).with_name("called").touch()
"""
OWN = """
import numpy as np
from mpiml.nn.layers import Flatten, Linear
from mpiml.nn.losses import Accuracy, softmax_cross_entropy as loss
def net(shape, outputs):
    return [Flatten(), Linear(64, outputs)]
class Undecided(Accuracy):
    name = "undecided"
    def value(self, totals):
        return np.nan
def metric(outputs):
    return Undecided()
"""
NAMED = "--model mine:net --loss mine:loss --metric mine:metric"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that modules are imported from: `mine` is the user's, `evil` would leave traces there."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text(EVIL)
    (tmp_path / "mine.py").write_text(OWN)
    yield tmp_path
    sys.modules.pop("mine", None)
    assert not (tmp_path / "imported").exists()
    assert not (tmp_path / "called").exists()


def forged(here: Path, config: str) -> Path:
    """The only checkpoint of a run whose config.toml is gone."""
    return forge(here / "run" / "checkpoints" / step_files.file_name(6), f"hidden = []\n{config}", TASK, ARRAYS)


def going_on(run: Path, steps: int, flags: str = "") -> dict[str, Any]:
    return train(parse(["--resume", "--quiet", "--steps", str(steps), "--out", str(run), *flags.split()]))


COMMANDS = {  # how a checkpoint is used, and which of the names in it are then followed
    "trained": (export.trained, ("model",)),
    "torch": (export.torch_state_dict, ("model",)),
    "--checkpoint": (lambda file: evaluate(checkpoint=str(file)), ("data", "model", "loss", "metric")),
    "--checkpoint --data": (lambda file: evaluate(checkpoint=str(file), data="digits"), ("model", "loss", "metric")),
    "--run": (lambda file: evaluate(str(file.parents[1])), ("data", "model", "loss", "metric")),
    "--resume": (lambda file: going_on(file.parents[1], 7), CODE),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_code_that_a_checkpoint_names_is_not_run(here: Path, command: str) -> None:
    if command == "torch":
        pytest.importorskip("torch")
    use, followed = COMMANDS[command]
    with pytest.raises(ConfigError) as error:
        use(forged(here, "".join(f'{name} = "evil:run"\n' for name in CODE)))
    flags = " ".join(f"--{name} evil:run" for name in CODE if name in followed)
    file = here / "run" / "checkpoints" / step_files.file_name(6)
    assert str(error.value) == f"{file} names code, which is run only if you name it: repeat {flags}"
    if command != "--resume":
        use(forged(here, "".join(f'{name} = "evil:run"\n' for name in CODE if name not in followed)))


def test_weights_of_a_checkpoint_that_names_code_can_be_begun_with(here: Path) -> None:
    file = forged(here, "".join(f'{name} = "evil:run"\n' for name in CODE))
    config = Config(hidden=(), steps=1, quiet=True, init=str(file), out=str(here / "begun"))
    assert train(config)["status"] == "done"


def test_code_is_named_by_flags_by_arguments_or_by_the_runs_own_config(here: Path) -> None:
    run = here / "run"
    flags = f"{NAMED} --hidden 4 --steps 2 --quiet --out {run}"
    result = train(parse(flags.split()))
    text = (run / "result.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == result  # though the metric is not a number
    assert result["undecided"] is None
    scored = evaluate(str(run))
    assert scored["test_loss"] == result["test_loss"]
    file = run / "checkpoints" / step_files.file_name(2)
    with pytest.raises(ConfigError, match=f"repeat {NAMED}$"):
        evaluate(checkpoint=str(file))
    with pytest.raises(ConfigError, match=r"repeat --model mine:net$"):
        export.trained(file)
    asked = vars(parse_evaluate(["--checkpoint", str(file), *NAMED.split()]))
    del asked["json"]
    assert evaluate(**asked)["test_loss"] == result["test_loss"]
    mine = sys.modules["mine"]
    for model in ("mine:net", mine.net, mine.net((8, 8), 10)):
        layers, _ = export.trained(file, model)
        assert len(layers) == 2

    update_result(run, {"status": "running"})  # as if it had been killed at the very end
    assert going_on(run, 2)["weights_sha256"] == result["weights_sha256"]
    (run / "config.toml").unlink()
    with pytest.raises(ConfigError, match=f"repeat {NAMED}$"):
        going_on(run, 3)
    with pytest.raises(ConfigError, match=r"repeat --loss mine:loss --metric mine:metric$"):
        going_on(run, 3, "--model mine:net")
    assert going_on(run, 3, NAMED)["step"] == 3


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Memory for this process of two gigabytes more than it has mapped."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (2 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("command", ["trained", "--checkpoint", "--run", "--resume"])
@pytest.mark.usefixtures("little_memory")
def test_a_small_file_asks_for_no_memory(here: Path, command: str) -> None:
    config = 'hidden = [100000000]\nmemory = "private"\n'
    file = forge(here / "run" / "checkpoints" / step_files.file_name(6), config, TASK, ARRAYS)
    with pytest.raises(
        OutputError, match=rf"^{file}: layers.1.weight is float32 \(64, 10\), the model's .*100000000\)"
    ):
        COMMANDS[command][0](file)


def test_a_loss_that_does_not_fit_the_labels_is_refused(here: Path) -> None:
    with pytest.raises(ConfigError, match="--loss mse --metric auto: for values, but the run's labels are classes"):
        evaluate(checkpoint=str(forged(here, 'loss = "mse"\n')))


@pytest.mark.parametrize("command", ["trained", "--checkpoint", "--run", "--resume"])
def test_a_longer_model_is_another_one(here: Path, command: str) -> None:
    arrays = ARRAYS | {"layers.2.weight": np.ones((10, 10), "f")}
    file = forge(here / "run" / "checkpoints" / step_files.file_name(6), "hidden = []\n", TASK, arrays)
    with pytest.raises(OutputError, match=rf"^{file} has layers.2.weight, which the model does not have"):
        COMMANDS[command][0](file)
