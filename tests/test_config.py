"""Settings: every one as flag and TOML key, one-line errors that say what to do, and what a resumed run may change."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import mpiml
from mpiml.config import Config, from_toml, parse, settings
from mpiml.errors import ConfigError
from mpiml.flags import flag
from mpiml.training.saved import resumed

# For every setting another value than the default: as text, as TOML, and what it becomes.
OTHERS = {
    "data": ("d.npz", '"d.npz"', "d.npz"),
    "label": ("y", '"y"', "y"),
    "drop_columns": ('Id,"a, b"', '["Id", "a, b"]', ("Id", "a, b")),
    "fill": ("mean", '"mean"', "mean"),
    "context": ("64", "64", 64),
    "arrays": ("x_train=a,y_train=b", '"x_train=a,y_train=b"', "x_train=a,y_train=b"),
    "held_out": ("0.2", "0.2", 0.2),
    "validation": ("0.25", "0.25", 0.25),
    "token_dtype": ("uint32", '"uint32"', "uint32"),
    "normalize": ("", "true", True),
    "look": ("first", '"first"', "first"),
    "transform": ("my:augment", '"my:augment"', "my:augment"),
    "model": ("cnn", '"cnn"', "cnn"),
    "hidden": ("64,32", "[64, 32]", (64, 32)),
    "activation": ("tanh", '"tanh"', "tanh"),
    "channels": ("16", "16", 16),
    "blocks": ("3", "3", 3),
    "norm": ("batch", '"batch"', "batch"),
    "width": ("64", "64", 64),
    "heads": ("2", "2", 2),
    "tie": ("", "true", True),
    "dropout": ("0.25", "0.25", 0.25),
    "classes": ("12", "12", 12),
    "ignore": ("255", "255", 255),
    "loss": ("mse", '"mse"', "mse"),
    "metric": ("my.metrics:F1", '"my.metrics:F1"', "my.metrics:F1"),
    "init": ("w.safetensors", '"w.safetensors"', "w.safetensors"),
    "init_partial": ("", "true", True),
    "init_names": ("names.toml", '"names.toml"', "names.toml"),
    "pipe": ("4", "4", 4),
    "cuts": ("1,3", "[1, 3]", (1, 3)),
    "balance": ("measured", '"measured"', "measured"),
    "schedule": ("gpipe", '"gpipe"', "gpipe"),
    "recompute": ("", "true", True),
    "batch": ("96", "96", 96),
    "microbatches": ("12", "12", 12),
    "leaf": ("3", "3", 3),
    "average_every": ("16", "16", 16),
    "workers": ("4", "4", 4),
    "average_from": ("100", "100", 100),
    "outer_lr": ("0.7", "0.7", 0.7),
    "outer_momentum": ("0.9", "0.9", 0.9),
    "averaged_at": ("30,50", "[30, 50]", (30, 50)),
    "noise_scale": ("", "true", True),
    "shuffle": ("blocks", '"blocks"', "blocks"),
    "block_rows": ("64", "64", 64),
    "shards": ("strided", '"strided"', "strided"),
    "prefetch": ("3", "3", 3),
    "epochs": ("7", "7", 7),
    "steps": ("70", "70", 70),
    "optimizer": ("nesterov", '"nesterov"', "nesterov"),
    "lr": ("0.004", "4e-3", 0.004),
    "lr_scaling": ("sqrt", '"sqrt"', "sqrt"),
    "base_batch": ("64", "64", 64),
    "momentum": ("0.8", "0.8", 0.8),
    "betas": ("0.8,0.95", "[0.8, 0.95]", (0.8, 0.95)),
    "weight_decay": ("0.1", "0.1", 0.1),
    "warmup_steps": ("5", "5", 5),
    "decay": ("cosine", '"cosine"', "cosine"),
    "decay_steps": ("50", "50", 50),
    "lr_floor": ("0.001", "1e-3", 0.001),
    "lr_history": ("until=3 lr=1,until=9", '["until=3 lr=1", "until=9"]', ("until=3 lr=1", "until=9")),
    "rates": ("layers.0=0,head.*=10", '["layers.0=0", "head.*=10"]', ("layers.0=0", "head.*=10")),
    "ema": ("0.99", "0.99", 0.99),
    "clip": ("1", "1", 1.0),
    "seed": ("3", "3", 3),
    "dtype": ("float64", '"float64"', "float64"),
    "allreduce": ("mpi", '"mpi"', "mpi"),
    "memory": ("private", '"private"', "private"),
    "bucket": ("2.5", "2.5", 2.5),
    "threads": ("2", "2", 2),
    "device": ("cuda", '"cuda"', "cuda"),
    "share_devices": ("", "true", True),
    "tf32": ("", "true", True),
    "autocast": ("bfloat16", '"bfloat16"', "bfloat16"),
    "eval_every": ("0", "0", 0),
    "eval_rows": ("32", "32", 32),
    "out": ("runs/a", '"runs/a"', "runs/a"),
    "resume": ("", "true", True),
    "save_every": ("9", "9", 9),
    "save": ("sync", '"sync"', "sync"),
    "keep": ("1", "1", 1),
    "keep_best": ("2", "2", 2),
    "best": ("accuracy", '"accuracy"', "accuracy"),
    "patience": ("5", "5", 5),
    "log_every": ("2", "2", 2),
    "log": ("tensorboard", '"tensorboard"', "tensorboard"),
    "stall_timeout": ("2.5", "2.5", 2.5),
    "time_limit": ("1:30:00", '"1:30:00"', "1:30:00"),
    "stop_grace": ("5", "5", 5.0),
    "trace": ("t.json", '"t.json"', "t.json"),
    "rank_log": ("", "true", True),
    "quiet": ("", "true", True),
}
LAYOUT_AND_LOGGING = {"pipe", "cuts", "schedule", "epochs", "steps", "out", "resume", "quiet", "keep", "stall_timeout"}
LAYOUT_AND_LOGGING |= {
    "memory",
    "bucket",
    "prefetch",
    "time_limit",
    "eval_every",
    "save_every",
    "save",
    "log_every",
    "log",
    "trace",
    "rank_log",
    "look",
}
LAYOUT_AND_LOGGING |= {"balance", "recompute", "keep_best", "best", "patience", "noise_scale", "workers", "stop_grace"}
LAYOUT_AND_LOGGING |= {"device", "share_devices"}
PLACES = {
    "data",
    "init",
    "init_partial",
    "init_names",
}  # of what the fingerprint tells, or of what only the first step needs
NEEDED = {"resume": ("out", "runs/a"), "tie": ("model", "gpt")}  # what else has to be given with a setting
every_setting = pytest.mark.parametrize("name", OTHERS)


def as_flags(name: str) -> list[str]:
    needed = [f"--{key}={value}" for key, value in [NEEDED[name]]] if name in NEEDED else []
    return [flag(name), *filter(None, [OTHERS[name][0]]), *needed]


def toml(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return ["--config", str(path)]


def refusal(arguments: list[str]) -> str:
    with pytest.raises(ConfigError) as error:
        parse(arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_these_are_all_settings() -> None:
    assert [field.name for field in settings()] == list(OTHERS)


@every_setting
def test_flag_and_key_say_the_same(tmp_path: Path, name: str) -> None:
    expected, kind = OTHERS[name][2], type(OTHERS[name][2])
    extra = f'{NEEDED[name][0]} = "{NEEDED[name][1]}"\n' if name in NEEDED else ""
    by_flag = parse(as_flags(name))
    by_key = parse(toml(tmp_path, f"{extra}{name.replace('_', '-')} = {OTHERS[name][1]}\n"))
    assert by_flag == by_key
    for config in (by_flag, by_key):
        assert getattr(config, name) == expected
        assert type(getattr(config, name)) is kind
        assert config.given == {name, *NEEDED.get(name, ())[:1]}
    changed = {f.name for f in settings() if getattr(by_flag, f.name) != f.default}
    assert changed <= by_flag.given  # and no other setting has been touched


@every_setting
def test_help_explains_it(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    (field,) = (f for f in settings() if f.name == name)
    assert len(field.metadata["help"]) > 5
    assert f"\n  {flag(name)}" in out
    text = " ".join(out.split())
    assert " ".join(field.metadata["help"].split()) in text
    (own,) = (option for option in out.split("\n  --") if option.split()[0] == flag(name)[2:])
    assert ("[R]" in own) is (name in LAYOUT_AND_LOGGING | PLACES)
    if field.metadata["choices"] and len(field.metadata["choices"]) > 1:
        assert "|".join(field.metadata["choices"]) in out


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    config = parse(["--batch", "64", *toml(tmp_path, 'batch = 32\nseed = 5\noptimizer = "sgd"')])
    assert (config.batch, config.seed, config.optimizer) == (64, 5, "sgd")
    assert config.given == {"batch", "seed", "optimizer"}


def test_underscores_and_lists_of_one_are_fine_in_a_file(tmp_path: Path) -> None:
    config = parse(toml(tmp_path, 'weight_decay = 1\nhidden = 9\ncuts = "1,2"'))
    assert (config.weight_decay, config.hidden, config.cuts) == (1.0, (9,), (1, 2))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bacth", "5"], ["--bacth", "did you mean --batch?"]),
        (["--hidde=64"], ["--hidde=64", "did you mean --hidden?"]),
        (["--log-evry", "5"], ["did you mean --log-every?"]),
        (["--hid", "64"], ["--hid is not a setting"]),  # no abbreviations: a new setting must not change their meaning
        (["digits"], ["digits is not a setting", "--help"]),
        (["--batch"], ["--batch", "expected one argument"]),
        (["--batch", "many"], ["--batch many", "whole number"]),
        (["--batch", "1.5"], ["--batch 1.5", "whole number"]),
        (["--lr", "fast"], ["--lr fast", "a number"]),
        (["--hidden", "64,x"], ["--hidden 64,x", "whole number"]),
        (["--batch", "0"], ["--batch 0", "at least 1"]),
        (["--lr", "-1"], ["--lr -1", "at least 0"]),
        (["--lr", "nan"], ["--lr nan"]),
        (["--clip", "inf"], ["--clip inf"]),
        (["--save", "later"], ["--save later", "auto", "async", "sync"]),
        (["--fill", "median"], ["--fill median: must be mean or a finite number"]),
        (["--fill", "inf"], ["--fill inf: must be mean or a finite number"]),
        (["--bucket", "4", "--allreduce", "mpi"], ["--bucket 4.0 --allreduce mpi", "all at once"]),
        (["--dropout", "1"], ["--dropout 1", "at least 0", "less than 1"]),
        (["--momentum", "-0.1"], ["--momentum -0.1", "at least 0", "less than 1"]),
        (["--hidden", "64,0"], ["--hidden 64,0", "at least 1"]),
        (["--average-every", "-1"], ["--average-every -1", "at least 0"]),
        (["--workers", "0"], ["--workers 0", "at least 1"]),
        (["--leaf", "0"], ["--leaf 0", "at least 1"]),
        (["--leaf", "2.5"], ["--leaf 2.5", "whole number"]),
        (["--average-from", "1.5"], ["--average-from 1.5", "whole number"]),
        (["--outer-lr", "-0.5"], ["--outer-lr -0.5", "at least 0"]),
        (["--outer-lr", "inf"], ["--outer-lr inf", "must be a finite number"]),
        (["--outer-lr", "inf"], ["--outer-lr inf"]),
        (["--outer-momentum", "1"], ["--outer-momentum 1", "at least 0", "less than 1"]),
        (["--averaged-at", "0"], ["--averaged-at 0", "at least 1"]),
        (["--stop-grace", "nan"], ["--stop-grace nan"]),
        (["--activation", "rleu"], ["--activation rleu", "relu, gelu, tanh", "did you mean relu?"]),
        (["--model", "cn"], ["--model cn", "gpt, package.module:function", "did you mean cnn?"]),
        (["--model", "my.models:"], ["--model my.models:", "package.module:function"]),
        (["--loss", "my models:f"], ["--loss my models:f", "package.module:function"]),
        (["--activation", "my.models:f"], ["--activation my.models:f", "relu, gelu, tanh"]),
        (["--optimizer", "lion"], ["--optimizer lion", "sgd, momentum, nesterov, adam, adamw"]),
        (["--quiet=yes"], ["--quiet", "yes"]),
        (["--batch", "1" + 400 * "0"], ["--batch 10", "whole number of at most 64 bits"]),
        (["--blocks", "10000"], ["--blocks 10000", "less than 10000"]),
        (["--epochs", "3", "--steps", "9"], ["--epochs 3", "--steps 9", "one of the two"]),
        (["--resume"], ["--resume", "--out DIR"]),
        (["--shuffle", "blocks", "--shards", "strided"], ["--shuffle blocks", "--shards strided"]),
        (["--out", ""], ["--out", "empty"]),
        (["--config", "none.toml"], ["--config none.toml", "No such file"]),
    ],
)
def test_a_wrong_flag_is_one_line_that_says_what_to_do(arguments: list[str], words: list[str]) -> None:
    message = refusal(arguments)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bacth = 5", ["bacth is not a setting", "did you mean batch?"]),
        ("given = []", ["given is not a setting"]),
        ("[grid]\npipe = 2", ["grid is not a setting"]),
        ('batch = "many"', ["batch = 'many'", "whole number"]),
        ("batch = 1.5", ["batch = 1.5", "whole number"]),
        ("batch = true", ["batch = True", "whole number"]),
        ("batch = [1]", ["batch = [1]", "whole number"]),
        ("lr = true", ["lr = True", "a number"]),
        ("hidden = [[1]]", ["hidden = [[1]]", "whole number"]),
        ("data = 5", ["data = 5", "text"]),
        ('quiet = "no"', ["quiet = 'no'", "true or false"]),
        ("batch = = 1", ["line 1"]),
    ],
)
def test_a_wrong_key_is_one_line_that_names_the_file(tmp_path: Path, text: str, words: list[str]) -> None:
    message = refusal(toml(tmp_path, text))
    assert all(word in message for word in [str(tmp_path / "settings.toml"), *words]), message


@pytest.mark.parametrize(
    ("text", "words"), [("batch = 0", ["batch 0", "at least 1"]), ("epochs=1\nsteps=2", ["one of"])]
)
def test_values_in_a_file_are_checked_alike(tmp_path: Path, text: str, words: list[str]) -> None:
    assert all(word in refusal(toml(tmp_path, text)) for word in words)


def test_a_file_that_is_not_text_or_no_file(tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "deep.toml").write_text("a = " + "[" * 100_000)
    os.mkfifo(tmp_path / "pipe.toml")
    for name, words in (("b", "damaged"), ("deep", "nested too deeply"), ("pipe", "not a regular file")):
        message = refusal(["--config", str(tmp_path / f"{name}.toml")])
        assert message.startswith(f"--config {tmp_path / name}.toml")
        assert words in message


@every_setting
def test_toml_is_read_back_alike(tmp_path: Path, name: str) -> None:
    config = parse(as_flags(name))
    (tmp_path / "c.toml").write_text(config.to_toml(), encoding="utf-8")
    assert not any("_" in key for key in tomllib.loads(config.to_toml()))
    back = Config(**from_toml(tmp_path / "c.toml"))
    assert back == config.replace(out=None, resume=False, quiet=False, time_limit=None, trace=None, rank_log=False)


@pytest.mark.parametrize(
    ("data", "lr"),
    [('quo"te\\.npz', 1e-05), ("\u00fc.npz", 1e22), ("tab\t.npz", 0.1 + 0.2), ("\U0001f600.npz", 1.0)],
    ids=["quote", "accent", "tab", "emoji"],
)
def test_any_text_and_number_survive_toml(tmp_path: Path, data: str, lr: float) -> None:
    config = Config(data=data, lr=lr)
    (tmp_path / "c.toml").write_text(config.to_toml(), encoding="utf-8")
    assert Config(**from_toml(tmp_path / "c.toml")) == config


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        ({"average_every": 4}, None),
        ({"average_every": 4, "outer_lr": 0.7}, (0.7, 0.0)),
        ({"average_every": 4, "outer_momentum": 0.9}, (1.0, 0.9)),
        ({}, None),
    ],
)
def test_when_there_is_an_outer_step(settings: dict[str, Any], step: tuple[float, float] | None) -> None:
    assert Config(**settings).outer_step == step


def test_every_character_survives_toml() -> None:
    every = "".join(map(chr, [*range(1, 0xD800), *range(0xE000, 0x11000)]))
    assert tomllib.loads(Config(data=every).to_toml())["data"] == every


@pytest.mark.parametrize("name", sorted(LAYOUT_AND_LOGGING | PLACES))
def test_a_resumed_run_may_change_layout_length_logging_and_places(name: str) -> None:
    cuts = () if name == "balance" else (4,)
    before = Config(seed=8, microbatches=6, steps=30, pipe=2, cuts=cuts, average_every=4)
    asked = parse(["--resume", *as_flags(name)] + (["--out", "runs/a"] if name not in ("out", "resume") else []))
    after = resumed(asked, before)
    assert getattr(after, name) == OTHERS[name][2]
    assert (after.seed, after.microbatches, after.resume, after.out) == (8, 6, True, "runs/a")


@pytest.mark.parametrize("name", sorted(set(OTHERS) - LAYOUT_AND_LOGGING - PLACES))
def test_a_resumed_run_may_not_change_its_arithmetic(name: str) -> None:
    asked = parse(["--resume", "--out", "runs/a", *as_flags(name)])
    before = Config(**dict([NEEDED[name]] if name in NEEDED else []))
    with pytest.raises(ConfigError, match=rf"^{flag(name)} {OTHERS[name][0]}.*: the run in runs/a has [^,]") as error:
        resumed(asked, before)
    assert "\n" not in str(error.value)
    same = before.replace(**{name: OTHERS[name][2]})
    assert getattr(resumed(asked, same), name) == OTHERS[name][2]  # saying what is so already is fine


def test_a_resumed_run_may_say_that_it_ignores_what_it_does_not_have() -> None:
    """Or what it has always ignored: runs begun before there was this setting have no other way to go on."""
    asked = parse(["--resume", "--out", "a", "--ignore", "-1"])
    assert resumed(asked, Config()).ignore == -1
    with pytest.raises(ConfigError, match="--ignore -1: the run in a has 255"):
        resumed(asked, Config(ignore=255))


@pytest.mark.parametrize("name", ["lr", "decay_steps", "lr_floor"])
def test_a_resumed_run_whose_learning_rate_falls_may_be_given_another(name: str) -> None:
    asked = parse(["--resume", "--out", "a", *as_flags(name)])
    assert getattr(resumed(asked, Config(decay="cosine")), name) == OTHERS[name][2]


def test_a_resumed_run_keeps_what_is_not_said_even_where_it_is_not_the_default() -> None:
    stored = Config(batch=7, log_every=3, hidden=(4, 4), pipe=2, cuts=(2,))
    assert resumed(parse(["--resume", "--out", "a"]), stored) == stored.replace(resume=True, out="a")
    with pytest.raises(ConfigError, match="--batch 128: the run in a has 7"):  # the default, but said
        resumed(parse(["--resume", "--out", "a", "--batch", "128"]), stored)


def test_other_stages_forget_the_old_cuts_and_epochs_the_old_steps() -> None:
    stored = Config(pipe=2, cuts=(2,), steps=30)
    assert resumed(parse(["--resume", "--out", "a", "--pipe", "4"]), stored).cuts == ()
    assert resumed(parse(["--resume", "--out", "a", "--pipe", "2"]), stored).cuts == (2,)
    assert resumed(parse(["--resume", "--out", "a", "--epochs", "9"]), stored).steps is None
    assert resumed(parse(["--resume", "--out", "a", "--steps", "9"]), stored).steps == 9


@pytest.mark.parametrize(
    ("option", "shown"), [("--help", "--pipe"), ("-h", "--batch"), ("--version", mpiml.__version__)]
)
def test_help_and_version_need_no_mpi(tmp_path: Path, option: str, shown: str) -> None:
    # In place of mpi4py a package that ends the program as soon as it is imported.
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("import os\nos._exit(99)\n")
    path = os.pathsep.join([str(tmp_path), str(Path(mpiml.__file__).parents[1])])
    command = [sys.executable, "-m", "mpiml.train"]
    environment = os.environ | {"PYTHONPATH": path}
    without, done = (
        subprocess.run(line, env=environment, timeout=30, capture_output=True, text=True, check=False)
        for line in (command, [*command, option])
    )
    assert without.returncode == 99
    assert (done.returncode, done.stderr) == (0, "")
    assert shown in done.stdout
