"""--init-names: which names and patterns say what, and what is wrong with a map."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpiml.errors import ConfigError, first_few
from mpiml.training.init_names import NameMap

MODEL = {n: [n] for n in ("layers.0.weight", "layers.0.bias", "layers.1.head.weight", "layers.1.head.bias")}


def read(path: Path, text: str) -> NameMap:
    (path / "n.toml").write_text(text)
    return NameMap.read(str(path / "n.toml"))


def mapped(path: Path, text: str, *file: str) -> dict[str, str]:
    return {name: one.name for name, one in read(path, text).of(MODEL, dict(zip(file, file, strict=True))).items()}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('"layers.0.weight" = "a.b"', {"layers.0.weight": "a.b"}),
        ('layers.0.weight = "a.b"', {"layers.0.weight": "a.b"}),
        ('[layers]\n0.weight = "a"\n"1.head.bias" = "b"', {"layers.0.weight": "a", "layers.1.head.bias": "b"}),
        ('"layers.0.*" = "x.*"', {"layers.0.weight": "x.weight", "layers.0.bias": "x.bias"}),
        ('"layers.*.head.*" = "h.*.*.y"', {"layers.1.head.weight": "h.1.weight.y", "layers.1.head.bias": "h.1.bias.y"}),
        ('"head.weight" = "w"', {"layers.1.head.weight": "w"}),
        ('"head.*" = "*"', {"layers.1.head.weight": "weight", "layers.1.head.bias": "bias"}),
        ('"*.head.*" = "z"\n"layers.1.head.bias" = "b"', {"layers.1.head.weight": "z", "layers.1.head.bias": "b"}),
        ("", {}),
    ],
)
def test_names_and_patterns(tmp_path: Path, text: str, names: dict[str, str]) -> None:
    assert mapped(tmp_path, text) == names


def test_a_pattern_stands_for_what_the_file_has(tmp_path: Path) -> None:
    """The whole name, or what follows the layer in it."""
    assert mapped(tmp_path, '"*" = "m.*"', "m.head.weight", "m.layers.0.bias") == {
        "layers.0.weight": "m.layers.0.weight",
        "layers.0.bias": "m.layers.0.bias",
        "layers.1.head.weight": "m.head.weight",
        "layers.1.head.bias": "m.layers.1.head.bias",
    }


def test_a_matrix_may_be_transposed(tmp_path: Path) -> None:
    (one,) = read(tmp_path, '"layers.0.weight" = { name = "a", transpose = true }').of(MODEL, {}).values()
    assert (one.name, one.entry.transpose) == ("a", True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('"layers.2.*" = "a.*"', r'"layers.2.\*" = "a.\*": the model has no such array; it has layers.0.weight, '),
        ('"layers.0.*" = "a"', r"layers.0.bias and layers.0.weight would both take a of the file$"),
        ('"*.weight" = "*"\n"layers.0.*" = "*"', r'"\*.weight" = "\*": and "layers.0.\*" are both of layers.0.weight'),
        ('"head.bias" = "a"\n"layers.1.head.bias" = "b"', 'and "layers.1.head.bias" are both of layers.1.head.bias'),
        ('"layers.0.weight" = 3', 'layers.0.weight = 3: must be a name in the file, or { name = "...", transpose = t'),
        ('"layers.0.weight" = ""', "layers.0.weight = '': must be a name"),
        ('"layers.0.weight" = ["a"]', "must be a name"),
        ('"layers.0.weight" = { name = "a", transpose = 1 }', "must be a name"),
        ('"layers.0.weight" = { transpose = true }', "must be a name"),
        (
            '"layers.0.weight" = { name = "a", transposed = true }',
            "transposed is unknown; there are name and transpose",
        ),
        ('"layers.0.weight" = "a.*"', r"layers.0.weight = 'a.\*': has more \* than layers.0.weight"),
        ('layers.0.weight = "a"\n"layers.0.weight" = "b"', "layers.0.weight is there twice"),
        ('layers.* = "a"', r"n.toml is damaged: .*; a line is \"layers.0.weight\" = "),
        ('"a" = "b"\n"a" = "c"', "n.toml is damaged: "),
    ],
)
def test_what_is_wrong_with_a_map(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        read(tmp_path, text).of(MODEL, {})
    assert str(error.value).startswith(f"--init-names {tmp_path}/n.toml")


def test_a_map_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--init-names .*/none.toml: No such file"):
        NameMap.read(str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match="is not a regular file"):
        NameMap.read(str(tmp_path))


def test_names_are_listed_from_the_first_or_from_the_most_similar() -> None:
    names = [f"layers.{number}.weight" for number in range(9)]
    assert first_few(names) == "layers.0.weight, layers.1.weight, layers.2.weight, layers.3.weight and 5 more"
    assert first_few([*names, "head.weight", "head.bias"], most=2, like="haed.weight") == (
        "head.weight, layers.8.weight and 9 more"
    )
    assert first_few([], like="a") == ""
