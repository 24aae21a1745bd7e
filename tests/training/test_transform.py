"""The user's transform is tried before the first step, and what it draws belongs to the step."""

from __future__ import annotations

import random
import sys
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.errors import DataError
from mpiml.train import train

OWN = np.random.default_rng(0)  # lives on from call to call
THREADS: set[str] = set()


def of_rng(x: Any, y: Any, rng: Any) -> Any:
    THREADS.add(threading.current_thread().name)
    return x + rng.random(x.shape), y


def of_numpy(x: Any, y: Any, rng: Any) -> Any:
    THREADS.add(threading.current_thread().name)
    return x + np.random.random(x.shape), y


def of_python(x: Any, y: Any, rng: Any) -> Any:
    THREADS.add(threading.current_thread().name)
    return x + random.random(), y


def of_own(x: Any, y: Any, rng: Any) -> Any:
    return x + OWN.random(), y


def nothing(x: Any, y: Any, rng: Any) -> Any:
    x += 1


def three(x: Any, y: Any, rng: Any) -> Any:
    return x, y, rng


def raising(x: Any, y: Any, rng: Any) -> Any:
    raise ValueError("no such key\n  in two lines")


def shorter(x: Any, y: Any, rng: Any) -> Any:
    return x[1:], y


def text(x: Any, y: Any, rng: Any) -> Any:
    return x.astype(str).astype(object) + "px", y


def trained(out: Path, function: Any, **settings: Any) -> dict[str, Any]:
    module = types.ModuleType("of_a_user")
    module.function = function  # type: ignore[attr-defined]
    sys.modules["of_a_user"] = module
    THREADS.clear()
    x, y = np.arange(200.0).reshape(50, 4) / 200, np.arange(50) % 3
    asked: dict[str, Any] = {"batch": 8, "microbatches": 3, "hidden": (5,), "steps": 8, "eval_every": 0}
    config = Config(**asked | {"out": str(out), "transform": "of_a_user:function"} | settings)
    return train(config, MPI.COMM_SELF, data=Dataset.from_arrays(x, y, x, y))


@pytest.mark.parametrize("function", [of_numpy, of_python])
def test_draws_from_generators_of_the_process_belong_to_the_step(tmp_path: Path, function: Any, capsys: Any) -> None:
    whole = trained(tmp_path / "whole", function, prefetch=2)
    assert {"MainThread"} == THREADS
    assert "--prefetch 2: nothing is read ahead, because --transform" in capsys.readouterr().out
    trained(tmp_path / "cut", function, steps=4, save_every=4)
    assert "--prefetch" not in capsys.readouterr().out
    random.seed(99)
    np.random.seed(99)
    before = random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[index,union-attr]
    done = trained(tmp_path / "cut", function, resume=True, steps=8)
    after = random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[index,union-attr]
    assert done["weights_sha256"] == whole["weights_sha256"]
    assert after == before


def test_a_transform_that_draws_from_rng_alone_is_called_ahead(tmp_path: Path, capsys: Any) -> None:
    trained(tmp_path, of_rng, prefetch=2)
    assert {"MainThread", "reading ahead"} == THREADS
    out = capsys.readouterr().out
    assert "warning" not in out
    assert "--prefetch" not in out


def test_a_transform_that_does_not_repeat_itself_is_warned_of(tmp_path: Path, capsys: Any) -> None:
    trained(tmp_path, of_own)
    assert "warning: --transform of_a_user:function gives other rows when called again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (nothing, r"--transform of_a_user:function returned NoneType; a pair \(x, y\) is needed$"),
        (three, r"--transform of_a_user:function returned tuple of length 3; a pair \(x, y\) is needed$"),
        (
            raising,
            r"--transform of_a_user:function raises ValueError: no .* in two lines \(.*test_transform.py, line \d+\)$",
        ),
        (shorter, r"--transform gave x of shape \(1, 4\); \(2, 4\) is needed$"),
        (text, r"--transform of_a_user:function raises ValueError: could not convert string to float"),
    ],
)
def test_a_transform_that_cannot_be_used_is_refused_before_there_is_a_run(
    tmp_path: Path, function: Any, words: str
) -> None:
    with pytest.raises(DataError, match=words) as refused:
        trained(tmp_path / "run", function)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def of_table(x: Any, y: Any, rng: Any) -> Any:
    np.arange(7)[x["b"].astype(int)]
    assert (x["b"] == x["b"].round()).all()
    return x, y


def test_it_is_tried_on_rows_as_the_model_wants_them(tmp_path: Path) -> None:
    """Integers that a module takes as such are not normalised."""
    torch = pytest.importorskip("torch")

    class Two(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = torch.nn.Embedding(7, 3), torch.nn.Linear(5, 2)

        def forward(self, a: Any, b: Any) -> Any:
            return self.out(torch.cat([a, self.table(b)], 1))

    rng = np.random.default_rng(0)
    data = Dataset.from_arrays({"a": rng.random((40, 2)), "b": np.arange(40) % 7}, np.arange(40) % 2)
    flags: dict[str, Any] = {"normalize": True, "transform": f"{__name__}:of_table", "steps": 2, "quiet": True}
    assert train(Config(**flags, out=str(tmp_path)), MPI.COMM_SELF, Two(), data)["step"] == 2
