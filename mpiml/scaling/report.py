"""The report of a scaling study: JSON, CSV, input for Extra-P, figures, and one page with all of it,
in Markdown and in HTML."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from mpiml.command import markdown
from mpiml.documents import to_json
from mpiml.pages import page
from mpiml.pages.drawing import Drawing, check_matplotlib, save
from mpiml.run.directory import write_atomically
from mpiml.scaling.laws import Fit, amdahl, gustafson, universal
from mpiml.scaling.plots import drawings
from mpiml.scaling.results import Study, load_study
from mpiml.scaling.results import rows as table
from mpiml.scaling.trained import about_epochs, several, training_rows, training_table

NUMBER = re.compile(r"-?[\d,]+(\.\d+)?")  # begins a cell


def report(directory: Path) -> None:
    """Write all files of the report into a study's directory and print the table. Raises ConfigError if there is
    nothing to report, or no matplotlib to draw with."""
    check_matplotlib()
    study = load_study(directory)
    fits = fit(study)
    rows = [line.row() for line in study.lines]
    content = {
        "mode": study.mode,
        "settings": list(study.settings),
        "base": study.base.row(),
        "open": study.open,
        "rows": rows,
        "fits": [asdict(law) for law in fits],
        "trainings": training_rows(study.trained, study.law) if study.law is not None else [],
        "environment": study.environment,
    }
    write_atomically(directory / "scaling.json", to_json(content, indent=1) + "\n")
    write_atomically(directory / "scaling.csv", _csv(rows))
    write_atomically(directory / "scaling.jsonl", extra_p(study))
    figures = drawings(study)
    save(figures, write_atomically, directory)
    text = "\n".join(map(markdown, tables(study))) + f"\n{fits_text(fits)}\n\n" + "\n\n".join(notes(study)) + "\n"
    head = f"# {study.mode.capitalize()} scaling\n\nSettings: `{' '.join(study.settings) or 'defaults'}`\n"
    images = "".join(f"\n![{figure.name}]({figure.name}.svg)\n" for figure in figures)
    write_atomically(directory / "scaling.md", f"{head}\n{text}{images}")
    write_atomically(directory / "scaling.html", html(study, fits, figures))
    print(f"{text}\n{directory / 'scaling.md'}\n{directory / 'scaling.html'}")


def tables(study: Study) -> list[list[list[str]]]:
    """The study's table, and that of its trainings if there are several; of each the rows, heads first."""
    if study.law is None or study.target is None or not several(study.trained):
        return [table(study)]
    return [table(study), training_table(study.trained, study.law, study.target)]


def html(study: Study, fits: list[Fit], figures: list[Drawing]) -> str:
    """The report as a page that needs no other file."""
    title, settings = f"{study.mode.capitalize()} scaling", escape(" ".join(study.settings) or "defaults")
    heads = ["Times", "Trainings"]
    parts = [
        f'<header>\n<h1>{title}</h1>\n<p class="note">Settings: <code>{settings}</code></p>\n</header>',
        *(page.section(head, _html_table(rows)) for head, rows in zip(heads, tables(study), strict=False)),
        page.section("Figures", page.figures([figure.html() for figure in figures])),
        page.section("Laws", page.bullets([line.removeprefix("- ") for line in fits_text(fits).splitlines()])),
        page.section("Notes", "\n".join(map(page.text, notes(study)))),
    ]
    return page.page(f"{title} - mpiml", "\n".join(parts))


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    """A table of numbers, each of which may have an interval behind it."""

    def cell(text: str) -> page.Cell:
        match = NUMBER.match(text)
        return page.Cell(text, float(match[0].replace(",", "")) if match else None)

    return page.table(rows[0], [list(map(cell, row)) for row in rows[1:]], range(len(rows[0])))


def fit(study: Study) -> list[Fit]:
    """The laws for this mode of study, fitted to the fastest grid of each number of ranks, and of epochs to the target.
    Points with more ranks than cores are left out: no law describes ranks that take turns."""
    times = {line.point.ranks: line.medians for line in study.best() if not line.oversubscribed}
    laws = [gustafson(times)] if study.mode == "weak" else [amdahl(times), universal(times)]
    return laws + ([study.law.fit] if study.law is not None else [])


def fits_text(fits: list[Fit]) -> str:
    """A line for each law."""
    return "\n".join(
        f"- {law.law}: "
        + ", ".join(f"{name} {value.text()}" for name, value in law.parameters.items())
        + (f"; {law.verdict}" if law.parameters else law.verdict)
        for law in fits
    )


def notes(study: Study) -> list[str]:
    """What explains the table: the base of the speed-up in absolute numbers, marks, targets, and what is missing."""
    base = study.base
    best = f"the fastest so far (M = {_listed(study.bases)} not yet measured)" if study.bases else "the fastest"
    paragraphs = [
        f"Speed-up is against one rank with M = {base.point.microbatches}, {best}: "
        f"{base.step.value * 1e3:.2f} ms a step, {base.samples_per_second:,.0f} samples/s; same M: against one rank "
        "with micro-batches of the same size. Intervals are of 95 % (or the range of fewer than 6 repeats); a step "
        "takes as long as on its slowest rank. Grid: stages x replicas. M: micro-batches. Communication includes "
        "waiting for other stages."
    ]
    if any(line.oversubscribed for line in study.lines):
        paragraphs.append(
            "Points marked * have more ranks than cores: the ranks took turns. They say nothing about a machine with "
            "more cores, and no law is fitted to them."
        )
    if study.target is not None:
        every = sorted({(line.point.batch, line.target.every) for line in study.lines if line.target})
        intervals = _listed([f"{steps} with a batch of {batch}" for batch, steps in every])
        paragraphs.append(
            f"Steps to {study.target:g}: in a training run of {study.max_epochs} epochs, the steps until an evaluation "
            "first reached that score; one run (with --trainings, the first) for each batch and number of "
            "micro-batches, whose weights are the same, bit for bit, on any grid. All other settings are the same for "
            "all, the learning rate too unless --lr-scaling makes it another. Seconds are these steps at the point's "
            "median time, without evaluations." + (f" Steps between evaluations: {intervals}." if every else "")
        )
    if several(study.trained):
        paragraphs.append(about_epochs(study.trained))
    if study.damaged:
        paragraphs.append(f"Damaged and left out: {_listed(study.damaged)}. The same command measures them again.")
    if study.open:
        paragraphs.append(f"Not complete: {study.open} of the study's jobs are open. The same command does them.")
    return paragraphs


def _listed(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))


def extra_p(study: Study) -> str:
    """A line of Extra-P's JSON Lines format for each repeat: github.com/extra-p/extrap."""
    return "".join(
        json.dumps({"params": {"p": line.point.ranks}, "callpath": "step", "metric": "time", "value": seconds}) + "\n"
        for line in study.best()
        for seconds in line.medians
    )


def _csv(rows: list[dict[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
