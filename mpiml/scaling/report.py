"""The report of a scaling study: JSON, CSV, input for Extra-P, plots, and one Markdown page with all of it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mpiml.documents import to_json
from mpiml.run.directory import write_atomically
from mpiml.scaling.laws import Fit, amdahl, gustafson, universal
from mpiml.scaling.results import Study, load_study, markdown
from mpiml.scaling.trained import about_epochs, several, training_rows, training_table


def report(directory: Path) -> None:
    """Write all files of the report into a study's directory and print the table. Raises ConfigError if there is
    nothing to report, or no matplotlib to draw with."""
    from mpiml.scaling.plots import draw

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
    tables = [markdown(study)]
    if study.law is not None and study.target is not None and several(study.trained):
        tables.append(training_table(study.trained, study.law, study.target))
    text = "\n".join(tables) + f"\n{fits_text(fits)}\n\n" + "\n\n".join(notes(study)) + "\n"
    page = directory / "scaling.md"
    head = f"# {study.mode.capitalize()} scaling\n\nSettings: `{' '.join(study.settings) or 'defaults'}`\n"
    images = "".join(f"\n![{name}]({name}.svg)\n" for name in draw(study, directory))
    write_atomically(page, f"{head}\n{text}{images}")
    print(f"{text}\n{page}")


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
