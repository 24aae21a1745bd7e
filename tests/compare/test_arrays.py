"""Arrays of two checkpoints: in the order of layers, of all types, one at a time."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpiml.compare import arrays
from mpiml.compare.__main__ import main
from mpiml.compare.arrays import Compared, natural
from mpiml.run import verified
from mpiml.run.checkpoint import OF_LOOPS
from tests.forging import forge


def compare(path: Path, a: dict[str, Any], b: dict[str, Any]) -> Compared | None:
    return arrays.compare(
        *(arrays.opened(forge(path / f"{name}.safetensors", arrays=held)) for name, held in (("a", a), ("b", b)))
    )


def test_names_are_in_the_order_of_the_layers() -> None:
    names = ["layers.10.bias", "layers.2.weight", "layers.2.bias", "head", "layers.02.bias", "\u0663", "3", "9" * 5000]
    ordered = sorted(names, key=natural)
    assert ordered[-5:] == ["layers.02.bias", "layers.2.bias", "layers.2.weight", "layers.10.bias", "\u0663"]
    assert ordered[:3] == ["3", "9" * 5000, "head"]


def test_the_first_array_is_that_of_the_first_layer(tmp_path: Path) -> None:
    a = {f"layers.{number}.weight": np.zeros((2, 3), np.float32) for number in (2, 10)}
    made = compare(tmp_path, a, {name: array + 1 for name, array in a.items()})
    assert made
    assert made.first
    assert (made.first.array, made.first.index, made.elements, made.arrays) == ("layers.2.weight", (0, 0), 12, 2)


def test_nan_is_farther_than_any_number(tmp_path: Path) -> None:
    a = {"x": np.array([-np.inf]), "y": np.array([1.0]), "z": np.array([-np.inf])}
    made = compare(tmp_path, a, {"x": np.array([np.inf]), "y": np.array([np.nan]), "z": np.array([np.inf])})
    assert made
    assert made.farthest
    assert made.farthest.place == ("y", (0,))


@pytest.mark.parametrize(
    ("a", "b", "ulp"),
    [
        (np.array([1, 2], np.int64), np.array([1, -5], np.int64), 7),
        (np.array([True, True]), np.array([True, False]), 1),
        (np.array([1, 2 + 1j], np.complex64), np.array([1, 3 + 1j], np.complex64), 2**22),
        (np.array([1, 2], np.float16), np.array([1, 4], np.float16), 2**10),
        (np.array([1, np.nan]), np.array([1, 4.0]), None),
        (np.array(5.0), np.array(5.000000000000001), 1),
    ],
    ids=lambda value: str(getattr(value, "dtype", value)),
)
def test_elements_of_all_types(tmp_path: Path, a: Any, b: Any, ulp: int | None) -> None:
    made = compare(tmp_path, {"x": a}, {"x": b})
    assert made
    assert made.first
    assert made.farthest
    assert made.first.place == made.farthest.place
    assert (made.elements, made.first.ulp) == (1, ulp)
    assert made.first.index == (() if not a.ndim else (1, 0) if a.dtype.kind == "c" else (1,))


def test_other_shapes_and_dtypes_are_said(tmp_path: Path) -> None:
    same = np.ones(3, np.float32)
    made = compare(
        tmp_path, {"x": same, "y": same, "z": same}, {"x": same.astype(np.float64), "y": same[:2], "w": same}
    )
    assert made
    assert made.kinds == {
        "x": (("float32", (3,)), ("float64", (3,))),
        "y": (("float32", (3,)), ("float32", (2,))),
    }
    assert (made.alone, made.arrays, made.of) == ((["z"], ["w"]), 0, 0)


def test_equal_digests_settle_it_without_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = {"x": np.ones(3, np.float32), "y": np.ones(2, np.float32)}
    read = []
    one_array = verified.one_array
    monkeypatch.setattr(verified, "one_array", lambda *about: read.append(about[2]) or one_array(*about))
    assert compare(tmp_path, a, a) is None
    assert read == []
    assert compare(tmp_path, a, a | {"y": np.zeros(2, np.float32)})
    assert read == ["y", "y"]


def test_one_array_of_each_is_in_memory(tmp_path: Path) -> None:
    a = {f"layers.{number}.weight": np.full(1 << 18, number, np.float32) for number in range(12)}  # of 1 MiB
    pair = [
        forge(tmp_path / f"{name}.safetensors", arrays={n: x + by for n, x in a.items()})
        for name, by in (("a", 0), ("b", 1))
    ]
    tracemalloc.start()
    try:
        made = arrays.compare(*map(arrays.opened, pair))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert made
    assert made.elements == 12 << 18
    assert peak < 8 << 20


def test_checkpoints_of_a_loop_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        held = {"w": np.full(3, value)}
        (tmp_path / name).mkdir()
        verified.write(
            tmp_path / name / "step-000000005.safetensors", held, {"format": OF_LOOPS, "step": "5", "meta": "{}"}
        )
    assert main([str(tmp_path / "a"), str(tmp_path / "a")]) == 0
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "  first  w[0]     float64  1.0  2.0  4,503,599,627,370,496\n" in capsys.readouterr().out


def test_a_name_cannot_write_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = [forge(tmp_path / f"{n}.safetensors", arrays={"\x1b[2J": np.full(1, x)}) for n, x in (("a", 1), ("b", 2))]
    assert main([str(path) for path in pair]) == 1
    assert "'\\x1b[2J'[0]" in capsys.readouterr().out
