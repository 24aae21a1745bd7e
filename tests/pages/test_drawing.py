"""Figures: the same bytes each time, with their titles in files and without in pages, and no name twice in a page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mpiml.pages.drawing import Drawing, save

pytest.importorskip("matplotlib")


def line(figure: Any) -> None:
    axes = figure.subplots()
    axes.plot([1, 2, 3], [1, 4, 2], "o-", color="#0072b2")
    axes.set_xlabel("a < b")


def test_a_drawing_in_a_page() -> None:
    drawing = Drawing("one", 'Title & "more"', line)
    svg = drawing.svg()
    assert svg == Drawing("one", 'Title & "more"', line).svg()
    assert svg.startswith('<svg viewBox="0 0 316.8 194.4" role="img" aria-label="Title &amp; &quot;more&quot;">')
    assert svg.endswith("</svg>")
    assert not re.search(r"<\?xml|<!DOCTYPE|<metadata|xlink|#[0-9a-f]{6}", svg)
    assert set(re.findall(r'\bid="(\w+)-', svg)) == {"one"}
    assert set(re.findall(r'(?:href="|url\()#([\w-]+)', svg)) <= set(re.findall(r'\bid="([\w-]+)"', svg))
    assert ">a &lt; b</text>" in svg


def test_the_files_of_a_drawing(tmp_path: Path) -> None:
    paths = save([Drawing("one", "Title", line)], Path.write_bytes, tmp_path)
    assert [path.name for path in paths] == ["one.svg", "one.png"]
    assert ">Title</text>" in paths[0].read_text()
    assert "var(" not in paths[0].read_text()
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    again = Drawing("one", "Title", line).files()
    assert [path.read_bytes() for path in paths] == [again["one.svg"], again["one.png"]]
