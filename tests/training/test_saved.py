"""A checkpoint is data: its settings are checked, and code that they name is followed only if the user names it."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

import mpiml
from mpiml.config import Config, parse
from mpiml.errors import ConfigError, OutputError
from mpiml.flags import flag
from mpiml.run.checkpoint import Checkpoint
from mpiml.training.saved import CODE, code_of, resumed, settings_of
from tests.forging import loaded

OWN = (
    'model = "evil:net"\nloss = "evil:loss"\nmetric = "evil.metrics:F1"\ndata = "evil:load"\ntransform = "evil:turn"\n'
    'decay = "evil:fall"\n'
)


def saved(config: str) -> Checkpoint:
    return loaded({"layers.0.weight": np.zeros(1)}, config, "step-1.safetensors")


def test_all_names_that_are_missing_are_named_at_once_as_flags() -> None:
    with pytest.raises(ConfigError) as error:
        settings_of(saved(OWN), CODE, {})
    assert str(error.value) == (
        "step-1.safetensors names code, which is run only if you name it: repeat "
        "--data evil:load --transform evil:turn --model evil:net --loss evil:loss --metric evil.metrics:F1 "
        "--decay evil:fall"
    )
    with pytest.raises(ConfigError, match=r"repeat --loss evil:loss$"):
        settings_of(saved(OWN), ("model", "loss", "metric"), {"model": object(), "metric": "evil.metrics:F1"})


def test_the_users_word_takes_the_place_of_the_checkpoints() -> None:
    config = settings_of(saved(OWN), ("model", "loss"), {"model": "mine:net", "loss": "mse", "batch": 7})
    assert (config.model, config.loss, config.batch) == ("mine:net", "mse", Config().batch)
    assert settings_of(saved(OWN), (), {}).model == "evil:net"  # as text, for those who only compare
    assert settings_of(saved('model = "cnn"\n'), CODE, {"model": None}).model == "cnn"
    assert code_of(Config(model="a:b", loss="mse", transform="c:d")) == {"transform": "c:d", "model": "a:b"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("]]]", "is damaged"),
        ("a = " + "[" * 5000, "nested too deeply"),
        ("nonsense = 1", "nonsense is not a setting"),
        ('"a\\nb" = 1', r"a\nb' is not a setting"),
        ('batch = "many"', "batch = 'many': must be a whole number"),
        ("batch = 1" + 400 * "0", "must be a whole number"),
        ("lr = nan", "lr = nan: must be a number"),
        ("blocks = 1000000000", "--blocks 1000000000: must be"),
        ('model = "subprocess:"', "--model subprocess:: choose"),
        ("resume = true", "--resume"),
        ('lr-history = ["until=36"]', "--lr-history 'until=36': must be like"),
        ("hidden = [[1]]", "must be a whole number"),
    ],
)
def test_settings_that_are_none_are_one_line_that_names_the_file(config: str, words: str) -> None:
    with pytest.raises(OutputError) as error:
        settings_of(saved(config), CODE, {})
    assert str(error.value).startswith("step-1.safetensors: config")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_every_setting_that_is_followed_to_code_says_so() -> None:
    """Whoever imports what a setting names says which flag it is: these are the settings that may name code."""
    followed = set()
    for path in Path(mpiml.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "named" and len(node.args) == 2:
                followed |= {ast.literal_eval(node.args[1])} if isinstance(node.args[1], ast.Constant) else set()
    assert followed == {flag(name) for name in CODE}


def test_auto_takes_the_place_of_what_a_job_was_told_but_not_of_what_a_run_has_settled_on() -> None:
    before = Config(save="async", memory="private", loss="mse", out="a")
    flags = "--resume --out a --save auto --memory auto --loss auto"
    after = resumed(parse(flags.split()), before)
    assert (after.save, after.memory, after.loss) == ("auto", "auto", "mse")
