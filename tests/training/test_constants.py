"""What a checkpoint says of constants is compared with the model's, and what it holds of them takes their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from mpiml.errors import OutputError
from mpiml.nn.constants import Constant
from mpiml.nn.layers import Layer, Linear, name
from mpiml.run.checkpoint import Header
from mpiml.run.verified import kinds_of
from mpiml.training.constants import Constants

WEIGHTS = {"layers.0.weight": ("float32", (4, 3)), "layers.0.bias": ("float32", (3,))}


class Own(Layer):
    def __init__(self, **arrays: Any):
        self._constants = {key: Constant(np.array(array), key != "beside") for key, array in arrays.items()}

    def own_constants(self) -> Mapping[str, Constant]:
        return self._constants


def constants(**arrays: Any) -> Constants:
    layers = [Linear(4, 3), Own(**arrays)]
    name(layers)
    return Constants.of(layers)


OURS = constants(mask=[0, -np.inf], on=[[True, False]], beside=[5])
HELD = WEIGHTS | {"layers.1.mask": ("float64", (2,)), "layers.1.on": ("bool", (1, 2))}
OLD = {
    f"layers.1.{key}": own.checksum
    for key, own in Own(mask=[0, -np.inf], on=[[True, False]], beside=[5])._constants.items()
}


def test_their_entries_in_a_checkpoint() -> None:
    assert OURS.entries == OLD | {"layers.1.mask": "array", "layers.1.on": "array"}
    assert kinds_of(OURS.arrays) == {name: kind for name, kind in HELD.items() if name not in WEIGHTS}


@pytest.mark.parametrize(
    ("kinds", "entries"),
    [
        (HELD | {"optimizer.mean.layers.0.bias": ("float32", (3,))}, OURS.entries),
        (WEIGHTS, OLD),
        (WEIGHTS, None),  # of a file that does not tell
    ],
)
def test_checkpoints_that_fit(kinds: Any, entries: Any) -> None:
    OURS.check(Header("a", kinds, entries), WEIGHTS)


@pytest.mark.parametrize(
    ("kinds", "entries", "words"),
    [
        (WEIGHTS, OURS.entries, r"a has no layers.1.mask: it is of another model"),
        (
            HELD | {"layers.1.mask": ("float64", (3,))},
            OURS.entries,
            r"a: layers.1.mask is float64 \(3,\), the model's float64 \(2,\)",
        ),
        (
            HELD | {"layers.1.on": ("uint8", (1, 2))},
            OURS.entries,
            r"layers.1.on is uint8 \(1, 2\), the model's bool \(1, 2\)",
        ),
        (HELD | {"layers.1.more": ("bool", ())}, OURS.entries, "a has layers.1.more, which the model does not have"),
        (HELD, OURS.entries | {"layers.1.more": "array"}, r"another model: it has a constant layers.1.more \(a buffer"),
        (WEIGHTS, {}, r"a is of another model: it has no constant layers.1.beside \(a buffer"),
        (
            HELD,
            OURS.entries | {"layers.1.beside": "1"},
            r"^layers.1.beside: not what the checkpoint was trained with: a has",
        ),
        (
            HELD,
            OURS.entries | {"layers.1.beside": "array"},
            "a holds layers.1.beside, which is a buffer with persistent=F",
        ),
        (
            WEIGHTS,
            OLD | {"layers.1.mask": "1", "layers.1.on": "2"},
            "^layers.1.mask and 1 more: not what the checkpoint",
        ),
        ({"layers.0.bias": ("float32", (3,))}, OLD, "a has no layers.0.weight"),
    ],
)
def test_checkpoints_of_other_models(kinds: Any, entries: Any, words: str) -> None:
    with pytest.raises(OutputError, match=words):
        OURS.check(Header("a", kinds, entries), WEIGHTS)


def test_a_checkpoints_values_take_the_place_of_those_that_are_others() -> None:
    ours = constants(mask=[0.0, 1.0], same=[np.nan, -0.0], turned=np.arange(6).reshape(2, 3), beside=[5])
    ours.arrays["layers.1.same"].flags.writeable = False  # as of a file that is mapped into memory
    saved = {
        "layers.1.mask": np.array([-0.0, np.nan]),
        "layers.1.same": np.array([np.nan, -0.0]),
        "layers.0.bias": np.ones(3),
    }
    saved["layers.1.turned"] = np.arange(6, 12).reshape(3, 2).T
    assert ours.changed(saved) == ["layers.1.mask", "layers.1.turned"]
    ours.take(saved)
    assert not ours.changed(saved)
    assert all(ours.arrays[key].tobytes() == array.tobytes() for key, array in saved.items() if key in ours.arrays)
