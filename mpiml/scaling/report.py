"""The report of a scaling study: JSON, CSV, Markdown, Extra-P input, plots, and one page with all of it."""

from __future__ import annotations

import csv
import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mpiml.documents import to_json
from mpiml.run.directory import write_atomically
from mpiml.scaling.laws import Fit, Interval, amdahl, gustafson, karp_flatt_trend, universal
from mpiml.scaling.table import Study, load, markdown

STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 84em; margin: 2em auto; padding: 0 1em; color: #222 }
p, li { max-width: 62em } .table { overflow-x: auto } table { border-collapse: collapse; font-size: 12px }
td, th { padding: .2em .5em; border-bottom: 1px solid #ddd; text-align: right } td { white-space: nowrap }
th { border-bottom: 2px solid #888 } .plots { display: flex; flex-wrap: wrap } .plots svg { width: 48%; height: auto }
pre { font-size: 12px; background: #f6f6f6; padding: 1em; overflow-x: auto }"""


def report(directory: Path) -> None:
    """Write all files of the report into a study's directory and print the table. Raises ConfigError if there is
    nothing to report, or no matplotlib to draw with."""
    from mpiml.scaling.plots import draw

    study = load(directory)
    fits = fit(study)
    table = markdown(study)
    rows = [line.row() for line in study.lines]
    content = {
        "mode": study.mode,
        "settings": list(study.settings),
        "base": study.base.row(),
        "open": study.open,
        "rows": rows,
        "fits": [asdict(law) for law in fits],
        "environment": study.environment,
    }
    write_atomically(directory / "scaling.json", to_json(content, indent=1) + "\n")
    write_atomically(directory / "scaling.csv", _csv(rows))
    write_atomically(directory / "scaling.jsonl", extra_p(study))
    text = f"{table}\n{fits_text(fits)}\n\n" + "\n\n".join(notes(study)) + "\n"
    write_atomically(directory / "scaling.md", text)
    plots = draw(study, directory)
    write_atomically(directory / "scaling.html", page(study, fits, plots))
    print(f"{text}\n{directory / 'scaling.html'}")


def fit(study: Study) -> list[Fit]:
    """The laws that speak of this kind of study, fitted to the fastest grid of each number of ranks that have a core
    each: no law knows of ranks that take turns."""
    lines = [line for line in study.best() if not line.oversubscribed]
    times = {line.point.ranks: line.medians for line in lines}
    course = karp_flatt_trend({line.point.ranks: line.speed_up for line in lines if line.point.ranks > 1})
    return [*([gustafson(times)] if study.mode == "weak" else [amdahl(times), universal(times)]), course]


def fits_text(fits: list[Fit]) -> str:
    """A line for each law."""
    return "\n".join(
        f"- {law.law}: "
        + ", ".join(f"{name} {_interval(value)}" for name, value in law.parameters.items())
        + (f"; {law.word}" if law.parameters else law.word)
        for law in fits
    )


def notes(study: Study) -> list[str]:
    """What speed-up is measured against, in absolute numbers, and what else the table needs to be understood."""
    base = study.base
    if study.bases:
        best = f"the best so far, for M = {_listed(study.bases)} is still to be measured: "
    else:
        best = "which suits it best: "
    found = [
        f"Speed-up is against one rank with M = {base.point.microbatches}, {best}"
        f"{base.step.value * 1e3:.2f} ms a step, {base.samples_per_second:,.0f} samples/s; same M: against one rank "
        "with micro-batches of the same size. Intervals are of 95 % (or the range of fewer than 6 repeats); the time "
        "of a step is its slowest rank's. Grid: stages x replicas. M: micro-batches. Communication includes "
        "waiting for other stages."
    ]
    if any(line.oversubscribed for line in study.lines):
        found.append(
            "Marked * are more ranks than cores: they took turns. It says nothing of a machine with more cores, and "
            "no law is fitted to it."
        )
    if study.target is not None:
        every = sorted({(line.point.batch, line.target.every) for line in study.lines if line.target})
        looks = _listed([f"{steps} with a batch of {batch}" for batch, steps in every])
        found.append(
            f"Steps to {study.target:g}: in a training run of {study.max_epochs} epochs, the first after which an "
            "evaluation gave that test score; one run for each batch and number of micro-batches, for its weights are "
            "the same, bit for bit, on any grid. All other settings, the learning rate too, are the same for all. "
            "Seconds are as many steps of the point's median time, without evaluations."
            + (f" Steps from one look at the score to the next: {looks}." if every else "")
        )
    if study.damaged:
        found.append(f"Damaged, and left out: {_listed(study.damaged)}. The same command measures it again.")
    if study.open:
        found.append(f"Not complete: {study.open} of the study's jobs still to be done. The same command does them.")
    return found


def _listed(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))


def extra_p(study: Study) -> str:
    """A line of Extra-P's JSON Lines format for each repeat: github.com/extra-p/extrap."""
    return "".join(
        json.dumps({"params": {"p": line.point.ranks}, "callpath": "step", "metric": "time", "value": seconds}) + "\n"
        for line in study.best()
        for seconds in line.medians
    )


def page(study: Study, fits: list[Fit], plots: dict[str, str]) -> str:
    """One page that needs no other file."""
    header, _, *lines = markdown(study).strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *lines)]
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in cells[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in cells[1:])
    drawn = "".join(text[text.index("<svg") :] for text in plots.values())
    said = "".join(f"<p>{html.escape(note)}</p>" for note in notes(study))
    laws = "".join(f"<li>{html.escape(line[2:])}</li>" for line in fits_text(fits).splitlines())
    environment = html.escape(json.dumps(study.environment, indent=1))
    settings = html.escape(" ".join(study.settings)) or "defaults"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{study.mode} scaling</title><style>{STYLE}</style>
<h1>{study.mode.capitalize()} scaling</h1>
<p>Settings: <code>{settings}</code></p>
<div class="table"><table><tr>{head}</tr>{body}</table></div>
{said}
<div class="plots">{drawn}</div>
<h2>Laws</h2><ul>{laws}</ul>
<h2>Environment</h2><pre>{environment}</pre>
</html>
"""


def _interval(interval: Interval) -> str:
    if math.isinf(interval.high):
        return f"{interval.value:.3g}"
    return f"{interval.value:.3g} ({interval.low:.3g} to {interval.high:.3g})"


def _csv(rows: list[dict[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
