"""HTML: a self-contained document, its tables, which a click sorts, and the boxes of its figures.

Functions whose argument is called `html` take markup as it is; every other text is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from mpiml.pages.colours import variables

HERE = Path(__file__).parent
# Nothing is loaded from anywhere, whatever a name in a file says.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, or its markup, and what it is sorted by if that is not its text."""

    text: str = ""
    sort: float | None = None
    html: str = ""


def number(value: float | None, form: str = "{:,.4g}") -> Cell:
    """A cell that shows a number, or nothing."""
    return Cell() if value is None else Cell(form.format(value), value)


def page(title: str, html: str) -> str:
    """A document that needs no other file and no network."""
    styles = (HERE / "style.css").read_text(encoding="utf-8")
    light, dark = variables(dark=False), variables(dark=True)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
:root {{ color-scheme: light dark; {light} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}
{styles}</style>
</head>
<body>
{html}
<script>
{(HERE / "sort.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def text(words: str, kind: str = "") -> str:
    """A paragraph, of a kind that the style sheet knows: note, warning."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{escape(words)}</p>"


def bullets(items: Iterable[str]) -> str:
    """A list."""
    return "<ul>\n" + "".join(f"<li>{escape(item)}</li>\n" for item in items) + "</ul>"


def section(title: str, html: str) -> str:
    """A heading and what stands below it; nothing if that is nothing."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{html}\n</section>" if html else ""


def table(heads: Sequence[str], rows: Iterable[Sequence[Cell | str]], numbers: Iterable[int] = ()) -> str:
    """A table in a box that scrolls if it is wide; the columns `numbers` stand at the right of theirs."""
    right = set(numbers)

    def kind(column: int) -> str:
        return ' class="number"' if column in right else ""

    def cell(column: int, one: Cell | str) -> str:
        one = Cell(one) if isinstance(one, str) else one
        sort = "" if one.sort is None else f' data-sort="{one.sort!r}"'
        return f"<td{kind(column)}{sort}>{one.html or escape(one.text)}</td>"

    head = "".join(
        f'<th scope="col"{kind(column)}><button type="button">{escape(name)}</button></th>'
        for column, name in enumerate(heads)
    )
    body = "\n".join(f"<tr>{''.join(cell(column, one) for column, one in enumerate(row))}</tr>" for row in rows)
    box = '<div class="table" tabindex="0" role="group" aria-label="table">'
    return f"{box}<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"


def facts(pairs: Iterable[tuple[str, Cell]]) -> str:
    """Values with what they are, beside each other as far as there is room."""
    items = (f"<div><dt>{escape(name)}</dt><dd>{one.html or escape(one.text)}</dd></div>" for name, one in pairs)
    return '<dl class="facts">' + "".join(items) + "</dl>"


def figure(name: str, title: str, note: str, html: str) -> str:
    """A drawing with its title and a sentence about it."""
    small = f"<small>{escape(note)}</small>" if note else ""
    return f'<figure id="{escape(name)}">\n<figcaption>{escape(title)}{small}</figcaption>\n{html}\n</figure>'


def figures(html: Sequence[str]) -> str:
    """Figures beside each other, as many as there is room for; nothing if there are none."""
    return '<div class="figures">\n' + "\n".join(html) + "\n</div>" if html else ""
