"""What --init takes of a file, by its header and a map of names, and what is said of the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from mpiml.errors import ConfigError, OutputError
from mpiml.nn import base as nn
from mpiml.nn.constants import Constant
from mpiml.nn.export import forms
from mpiml.nn.layers import BatchNorm2d, Conv2d, Flatten, Layer, Linear
from mpiml.nn.losses import R2, mean_squared_error
from mpiml.nn.parameters import Layout
from mpiml.run.checkpoint import Header
from mpiml.run.verified import Kind
from mpiml.training.constants import Constants
from mpiml.training.init_names import Entry, NameMap
from mpiml.training.init_plan import Plan, plan
from mpiml.training.model import Scoring
from mpiml.training.place import BuiltModel
from mpiml.training.task import Task


class Fixed(Layer):
    """Constants of one's own."""

    def own_constants(self) -> Mapping[str, Constant]:
        arrays = {"mask": np.zeros(2), "count": np.array(7)}
        return {name: Constant(array, saved=True) for name, array in arrays.items()}


def model() -> BuiltModel:
    """layers.1, a Linear after a flattened image, layers.2.mask and layers.2.count, and layers.3, a BatchNorm2d."""
    layers = [Flatten(), Linear(12, 3), Fixed(), BatchNorm2d(3)]
    nn.name(layers)
    layouts = [Layout(nn.parameters(layers[:2]), "float32"), Layout(nn.parameters(layers[2:]), "float32")]
    scoring, of_pytorch = Scoring(mean_squared_error, R2(3), None), forms(layers[:3], (2, 2, 3))
    of_pytorch |= forms(layers[3:], (1, 1, 3))
    task = Task((2, 2, 3), (), False, 3, 0)
    return BuiltModel(task, layouts, scoring, Constants.of(layers), (1, ""), [], forms=of_pytorch)


MODEL = model()
OWN: dict[str, Kind] = {
    "layers.1.weight": ("float32", (12, 3)),
    "layers.1.bias": ("float32", (3,)),
    "layers.3.gain": ("float32", (3,)),
    "layers.3.bias": ("float32", (3,)),
    "layers.3.running_mean": ("float32", (3,)),
    "layers.3.running_variance": ("float32", (3,)),
    "layers.2.mask": ("float64", (2,)),
    "layers.2.count": ("int64", ()),
}
CONSTANTS = {"layers.2.mask": "array", "layers.2.count": "array"}
PYTORCH: dict[str, Kind] = {
    "1.weight": ("float32", (3, 12)),
    "1.bias": ("float32", (3,)),
    "3.weight": ("float32", (3,)),
    "3.bias": ("float32", (3,)),
    "3.running_mean": ("float32", (3,)),
    "3.running_var": ("float32", (3,)),
    "2.mask": ("float64", (2,)),
    "2.count": ("int64", ()),
}


def without(kinds: Mapping[str, Kind], *names: str) -> dict[str, Kind]:
    return {name: kind for name, kind in kinds.items() if name not in names}


def of(kinds: Mapping[str, Kind], partial: bool = False, names: NameMap | None = None, **entries: str) -> Plan:
    """The plan for a file with these arrays; a checkpoint if its names are ours."""
    foreign = not any(name.startswith("layers.") for name in kinds)
    return plan(MODEL, Header("f", kinds, {**CONSTANTS, **entries}), foreign, names, partial)


def types(dtype: str, kinds: Mapping[str, Kind]) -> dict[str, Kind]:
    return {name: (dtype if kind[0].startswith("float") else kind[0], kind[1]) for name, kind in kinds.items()}


@pytest.mark.parametrize("kinds", [OWN, PYTORCH])
def test_all_is_taken_by_default(kinds: Mapping[str, Kind]) -> None:
    for partial in (False, True):
        result = of(kinds, partial)
        assert {name: source.name for name, source in result.sources.items()} == dict(zip(OWN, kinds, strict=True))
        assert result.notes() == []


@pytest.mark.parametrize("kinds", [OWN, PYTORCH])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_types_are_converted_and_that_is_said(kinds: Mapping[str, Kind], dtype: str) -> None:
    assert of(types(dtype, kinds)).notes() == [f"{dtype} in f: converted to the model's type"]


def test_names_may_all_begin_with_the_same() -> None:
    for prefix in ("module.", "module._orig_mod."):
        sources = of({prefix + name: kind for name, kind in PYTORCH.items()}).sources
        assert sources["layers.3.gain"].name == f"{prefix}3.weight"


def test_a_checkpoint_may_lack_constants_and_have_others_and_ones_that_are_weights_now() -> None:
    kinds = without(OWN, "layers.2.mask") | {
        "layers.2.gone": ("int64", (9,)),
        "optimizer.mean.layers.9.x": ("bool", ()),
    }
    result = of(kinds, **{"layers.2.gone": "array", "layers.1.weight": "array"})
    assert result.notes() == [
        "taken by no array of the model: layers.2.gone",
        "constants as the model makes them: layers.2.mask",
    ]
    assert of(PYTORCH | {"3.num_batches_tracked": ("int64", ())}).left == ["3.num_batches_tracked"]


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        (
            without(OWN, "layers.3.bias"),
            r"^f has no layers.3.bias: it is of another model; --init-partial takes what fi",
        ),
        (OWN | {"layers.9.x": ("bool", ())}, r"^f has layers.9.x, which the model does not have: .*, 8 of 8 arrays$"),
        (
            OWN | {"layers.1.weight": ("float32", (12, 4))},
            r"^f: layers.1.weight is float32 \(12, 4\), the model's float32 \(12, 3\); --init-.*, 7 of 8 arrays$",
        ),
        (
            OWN | {"layers.1.bias": ("int64", (3,))},
            r"layers.1.bias is int64 \(3,\), the model's float32 \(3,\); --init",
        ),
        (OWN | {"layers.2.count": ("int32", ())}, r"layers.2.count is int32 \(\), the model's int64 \(\)"),
        (OWN | {"layers.2.mask": ("float64", (3,))}, r"layers.2.mask is float64 \(3,\), the model's float64 \(2,\)"),
        (
            without(PYTORCH, "3.weight"),
            r"^f has no 3.weight for the model's layers.3.gain: it is of another model; it has 1.weight \(3, 12\), "
            r"3.bias \(3,\), 1.bias \(3,\), .* and 3 more; --init-partial .*; --init-names says w",
        ),
        (without(PYTORCH, "2.mask"), r"^f has no 2.mask for the model's layers.2.mask"),
        (
            PYTORCH | {"1.weight": ("float32", (12, 3))},
            r"^f: 1.weight is float32 \(12, 3\), layers.1.weight of the model takes float32 \(3, 12\) in PyTorch's "
            r"order; --init-names can say transpose = true; --init-partial takes what fits, 7 of 8 arrays; --init-na",
        ),
        (
            PYTORCH | {"1.bias": ("F8_E4M3", (3,))},
            r"1.bias is F8_E4M3 \(3,\), layers.1.bias of the model takes float32",
        ),
        (PYTORCH | {"4.bias": ("float32", (3,))}, r"^f has 4.bias, which the model does not have"),
        (
            {"a": ("float32", (1,))},
            r"^f has no 1.weight for the model's layers.1.weight.*it has a \(1,\); --init-names",
        ),
    ],
)
def test_without_partial_all_must_fit(kinds: Mapping[str, Kind], words: str) -> None:
    with pytest.raises(OutputError, match=words):
        of(kinds)


def test_partial_takes_what_fits_and_says_what_does_not() -> None:
    kinds = without(OWN, "layers.3.gain", "layers.2.mask") | {
        "layers.1.weight": ("float32", (12, 4)),
        "layers.1.bias": ("int64", (3,)),
        **{f"layers.9.x{number}": ("float32", ()) for number in range(10)},
    }
    result = of(kinds, partial=True)
    assert [*result.sources] == [
        "layers.3.bias",
        "layers.3.running_mean",
        "layers.3.running_variance",
        "layers.2.count",
    ]
    assert result.count() == "4 of 8 arrays"
    assert result.notes() == [
        "not taken, because of another shape or type: layers.1.weight ((12, 4) there, (12, 3) here), layers.1.bias "
        "(int64 there, float32 here)",
        "taken by no array of the model: layers.9.x0, layers.9.x1, layers.9.x2, layers.9.x3, "
        "layers.9.x4, layers.9.x5, layers.9.x6, layers.9.x7 and 2 more",
        "as drawn: layers.1.weight, layers.1.bias, layers.3.gain",
        "constants as the model makes them: layers.2.mask",
    ]


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        (
            {"layers.1.weight": ("float32", (3, 12))},
            r"it has layers.1.weight \(3, 12\), the model layers.1.weight \(12, ",
        ),
        ({"a.b": ("float32", (1,))}, r"nothing in f fits the model: it has a.b \(1,\), the model 1.weight \(3, 12\), "),
        ({"2.count": ("int64", ())}, "nothing in f fits"),  # a constant alone
        ({}, "nothing in f fits the model: it has no arrays, "),
    ],
)
def test_something_must_fit(kinds: Mapping[str, Kind], words: str) -> None:
    with pytest.raises(OutputError, match=words):
        of(kinds, partial=True)


def maps(tmp_path: Path, text: str) -> NameMap:
    (tmp_path / "n.toml").write_text(text)
    return NameMap.read(str(tmp_path / "n.toml"))


def test_a_map_renames_and_leaves_what_it_does_not_name(tmp_path: Path) -> None:
    kinds = without(PYTORCH, "3.weight", "1.weight") | {
        "g": ("float32", (3,)),
        "w": ("float32", (12, 3)),
        "x": ("U4", ()),
    }
    text = '"layers.3.gain" = "g"\n"layers.1.weight" = { name = "w", transpose = true }'
    result = of(kinds, names=maps(tmp_path, text))
    names = {name: source.name for name, source in result.sources.items()}
    assert names == dict(zip(OWN, PYTORCH, strict=True)) | {"layers.3.gain": "g", "layers.1.weight": "w"}
    assert result.left == ["x"]
    array = np.arange(36.0, dtype="f").reshape(12, 3)
    by_channel = result.value("layers.1.weight", array).reshape(4, 3, 3)
    np.testing.assert_array_equal(by_channel, array.reshape(3, 4, 3).swapaxes(0, 1))


def test_a_map_may_have_pytorchs_names_of_our_arrays(tmp_path: Path) -> None:
    kinds = {name.replace("3.", "norm."): kind for name, kind in PYTORCH.items()}
    for text in ('"layers.3.*" = "norm.*"', '"layers.3.weight" = "norm.weight"\n"layers.3.*" = "norm.*"'):
        result = of(kinds, names=maps(tmp_path, text))
        assert result.sources["layers.3.gain"].name == "norm.weight"
        assert result.sources["layers.3.running_variance"].name == "norm.running_var"
    with pytest.raises(ConfigError, match=r"n.toml: \"layers.3.weight\" = \"x\": the model has no such array"):
        of(OWN, names=maps(tmp_path, '"layers.3.weight" = "x"'))


def test_a_map_of_a_checkpoint_has_our_axes(tmp_path: Path) -> None:
    kinds = OWN | {f"mean.{name}": kind for name, kind in OWN.items()}
    result = of(kinds, names=maps(tmp_path, '"layers.*" = "mean.layers.*"'))
    assert all(source.name == f"mean.{name}" for name, source in result.sources.items())
    assert len(result.left) == len(OWN)
    array = np.arange(36.0, dtype="f").reshape(12, 3)
    np.testing.assert_array_equal(result.value("layers.1.weight", array), array)


def test_the_average_of_what_is_not_averaged_is_the_array_itself(tmp_path: Path) -> None:
    """Frozen parameters, running averages and constants."""
    names = maps(tmp_path, '"layers.*" = "ema.layers.*"')
    sources = of(OWN | {"ema.layers.1.bias": ("float32", (3,))}, names=names).sources
    assert {name: source.name for name, source in sources.items()} == {
        name: "ema.layers.1.bias" if name == "layers.1.bias" else name for name in OWN
    }
    with pytest.raises(
        ConfigError, match=r"f has no ema.layers.1.weight for the model's layers.1.weight: it has layer"
    ):
        of(OWN, names=names)  # no run with --ema
    twice = maps(tmp_path, '"layers.1.*" = "ema.layers.1.*"\n"layers.3.bias" = "layers.1.bias"')
    with pytest.raises(ConfigError, match=r"would both take layers\.1\.bias"):
        of(OWN | {"ema.layers.1.weight": ("float32", (12, 3))}, names=twice)


def test_an_array_is_taken_once(tmp_path: Path) -> None:
    names = maps(tmp_path, '"layers.3.bias" = "layers.1.bias"')
    with pytest.raises(OutputError, match=r"f has no layers.1.bias that no other takes: it is of another model"):
        of(OWN, names=names)
    result = of(OWN, partial=True, names=names)
    assert result.sources["layers.3.bias"].name == "layers.1.bias"
    assert [*result.absent] == ["layers.1.bias"]


def test_what_the_model_shares_must_be_equal_in_the_file(tmp_path: Path) -> None:
    """Each of the names of a shared tensor may be in it, or several."""
    forms = {
        **MODEL.forms,
        "layers.1.bias": dataclasses.replace(MODEL.forms["layers.1.bias"], names=["1.bias", "tied"]),
    }
    shares = dataclasses.replace(MODEL, forms=forms)

    def planned(shape: tuple[int, ...], names: NameMap | None = None) -> Plan:
        return plan(shares, Header("f", PYTORCH | {"tied": ("float32", shape)}, None), True, names, True)

    assert planned((3,)).sources["layers.1.bias"].others == ["tied"]
    with pytest.raises(OutputError, match=r"^f: 1.bias and tied are not equal, but one array in the model; --init-nam"):
        planned((4,))
    mapped = planned((4,), maps(tmp_path, '"layers.1.bias" = "1.bias"'))
    assert (mapped.sources["layers.1.bias"].others, mapped.left) == ((), ["tied"])


def test_only_matrices_are_transposed() -> None:
    layers = [Conv2d(2, 3)]
    nn.name(layers)
    layouts, constants = [Layout(nn.parameters(layers), "float32")], Constants.of(layers)
    built = dataclasses.replace(MODEL, layouts=layouts, constants=constants, forms=forms(layers, (4, 4, 2)))

    def planned(key: str, name: str, shape: tuple[int, ...]) -> Plan:
        kinds = {"0.weight": ("float32", shape), "0.bias": ("float32", (3,))}
        names = NameMap("n.toml", [Entry(key, name, transpose=True)])
        return plan(built, Header("f", kinds, None), True, names, False)

    with pytest.raises(ConfigError, match=r"layers.0.weight has more than two axes, so there is nothing to transpose"):
        planned("layers.0.weight", "0.weight", (3, 3, 2, 3))
    assert len(planned("layers.0.bias", "0.bias", (3, 2, 3, 3)).sources) == 2  # nor what has one axis: it stays


@pytest.mark.parametrize(
    ("text", "partial", "words"),
    [
        (
            '"layers.1.bias" = "b"',
            True,
            r'n.toml: "layers.1.bias" = "b": f has no b for the model\'s layers.1.bias: it has .*1.b',
        ),
        (
            '"layers.1.*" = "a.*"',
            False,
            r'n.toml: "layers.1.\*" = "a.\*": f has no a.weight for the model\'s layers.1.w',
        ),
        (
            '"layers.1.bias" = "1.weight"',
            True,
            r'"layers.1.bias" = "1.weight": f: 1.weight is float32 \(3, 12\), layers.1',
        ),
        (
            '"layers.2.mask" = "2.count"',
            False,
            r"2.count is int64 \(\), layers.2.mask of the model takes float64 \(2,\)",
        ),
        (
            '"layers.1.weight" = {name="1.weight", transpose=true}',
            True,
            r"1.weight is float32 \(3, 12\), .* \(12, 3\) in .*order$",
        ),
    ],
)
def test_a_map_that_does_not_fit(tmp_path: Path, text: str, partial: bool, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        of(PYTORCH, partial=partial, names=maps(tmp_path, text))


def test_a_pattern_need_not_fit_everywhere_with_partial(tmp_path: Path) -> None:
    result = of(PYTORCH, partial=True, names=maps(tmp_path, '"layers.1.*" = "a.*"'))
    assert [*result.absent] == ["layers.1.weight", "layers.1.bias"]


def test_values() -> None:
    result = of(types("float64", OWN))
    assert result.value("layers.1.bias", np.array([1.0, 2.0, 0.1])).dtype == np.float32
    for values, words in (
        ([1, np.nan, 1], "layers.1.bias is not finite; n"),
        ([1, 1e300, 1], "layers.1.bias is not finite as float32; n"),
    ):
        with pytest.raises(OutputError, match=f"^f: {words}othing of it is taken"):
            result.value("layers.1.bias", np.array(values))
    np.testing.assert_array_equal(result.value("layers.2.mask", np.array([np.inf, np.nan])), [np.inf, np.nan])


def test_counters_are_averages_and_averages_of_counters_are_rounded() -> None:
    kinds = PYTORCH | {"3.running_mean": ("int64", (3,))}
    assert of(kinds).value("layers.3.running_mean", np.array([1, 2, 3])).dtype == np.float32
    kinds = OWN | {"layers.2.count": ("float32", ())}
    saved = Header("f", kinds, {"layers.2.mask": "array"})
    count = plan(MODEL, saved, False, None, False).value("layers.2.count", np.array(6.7, "f"))
    assert (count, count.dtype) == (7, np.int64)
