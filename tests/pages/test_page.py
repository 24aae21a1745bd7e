"""Pages: what comes from files is escaped, colours are those of the light figures in light and others in dark."""

from __future__ import annotations

import re

from mpiml.pages import colours, page

ODD = '<script>alert("&")</script>'


def test_texts_are_escaped() -> None:
    parts = [
        page.page(ODD, ""),
        page.text(ODD, "note"),
        page.bullets([ODD]),
        page.section(ODD, "x"),
        page.table([ODD], [[ODD]]),
        page.facts([(ODD, page.Cell(ODD))]),
        page.figure("name", ODD, ODD, ""),
    ]
    for part in parts:
        assert "<script>alert" not in part
        assert "&lt;script&gt;alert(&quot;&amp;&quot;)" in part


def test_cells_sort_by_their_numbers() -> None:
    html = page.table(["a", "b"], [[page.number(1234.5, "{:,.0f}"), page.number(None)]], numbers=[0])
    assert '<td class="number" data-sort="1234.5">1,234</td><td></td>' in html
    assert html.count('<th scope="col"') == 2


def test_nothing_has_no_heading() -> None:
    assert page.section("Empty", "") == ""
    assert page.figures([]) == ""


def test_a_document_is_whole() -> None:
    html = page.page("Title", "<p>body</p>")
    assert html.startswith("<!DOCTYPE html>\n<html lang=")
    assert "<title>Title</title>" in html
    used = set(re.findall(r"var\(--(\w+)\)", html))
    assert used <= {colour.name for colour in colours.ALL}
    assert "default-src 'none'" in html


def test_a_figure_has_both_colours() -> None:
    assert colours.as_variables("fill: #0072b2; stroke: #ffffff") == "fill: var(--blue); stroke: var(--paper)"
    assert "--blue: #0072b2;" in colours.variables(dark=False)
    assert "--blue: #0072b2;" not in colours.variables(dark=True)
    assert len({one.light for one in colours.ALL}) == len(colours.ALL)
