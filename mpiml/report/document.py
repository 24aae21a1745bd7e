"""The page of one run or of several, put together."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from mpiml.command import plural
from mpiml.pages import page
from mpiml.pages.drawing import Drawing
from mpiml.report import tables
from mpiml.report.curves import axes_of
from mpiml.report.learning import LEARNED, SPED, learned, quantities
from mpiml.report.runs import Run, printable
from mpiml.report.timing import RUNS, timed

DAMAGED = 5  # lines that are named


@dataclass
class Document:
    """A page and its figures."""

    html: str
    drawings: list[Drawing]


def document(runs: list[Run]) -> Document:
    """The page of some runs."""
    axes = axes_of(runs)
    curves, more, speed = learned(runs, axes), quantities(runs, LEARNED), [*quantities(runs, SPED), *timed(runs)]
    title = runs[0].label if len(runs) == 1 else plural(len(runs), "run")
    several = len(runs) > 1
    parts = [
        f"<header>\n<h1>{escape(title)}</h1>\n{_about(runs)}\n</header>",
        *(page.text(problem, "warning") for run in runs for problem in problems(run, several)),
        page.section("Runs" if several else "Run", tables.runs_table(runs)),
        page.section("Learning", _boxes(curves)),
        page.section("Learning rate and gradient", _boxes(more)),
        page.section("Speed", "\n".join(filter(None, [_boxes(speed), _left_out(runs), _slow(runs)]))),
        page.section("Jobs", tables.jobs_table(runs)),
        page.section(f"Settings that differ{'' if several else ' from the defaults'}", _settings(runs)),
        page.section("Environment", tables.environment_table(runs)),
    ]
    return Document(page.page(f"{title} - mpiml", "\n".join(filter(None, parts))), [*curves, *more, *speed])


def problems(run: Run, named: bool = False) -> list[str]:
    """What a reader should know of a run, each a sentence, which may be `named` by the run."""
    texts = []
    metrics, known = run.metrics, str(run.environment.get("mpiml", "another version"))
    if run.status == "failed":
        texts.append(f"the run failed: {run.result.get('reason')}")
    if not len(metrics.steps["step"]) and not len(metrics.evaluations["step"]):
        texts.append("no lines yet: metrics.jsonl is empty or not there, so there is no curve to draw")
    if metrics.problems:
        more = len(metrics.problems) - DAMAGED
        texts.append("; ".join(metrics.problems[:DAMAGED]) + (f"; and {more} more lines" if more > 0 else ""))
    if run.unknown:
        names = ", ".join(run.unknown)
        texts.append(f"{names}: no settings of this version; the run is of mpiml {known}, and is drawn as far as known")
    return [f"{run.label}: {text}" if named else text for text in texts]


def _about(runs: list[Run]) -> str:
    """What the page is of, and how far."""
    texts = [str(run.path.resolve()) for run in runs] if len(runs) == 1 else [run.label for run in runs]
    going = [run for run in runs if run.status == "running"]
    lines = [page.text(", ".join(printable(text) for text in texts), "note")]
    if going:
        who = "The run says" if len(runs) == 1 else f"{', '.join(run.label for run in going)}: the run says"
        lines.append(page.text(f"{who} that it is still running: the page shows it as far as it is.", "note"))
    return "\n".join(lines)


def _boxes(drawings: list[Drawing]) -> str:
    return page.figures([drawing.html() for drawing in drawings])


def _left_out(runs: list[Run]) -> str:
    more = len(runs) - RUNS
    return page.text(f"Figures of their own have the first {RUNS} runs.", "note") if more > 0 else ""


def _slow(runs: list[Run]) -> str:
    if table := tables.slow_table(runs):
        return f"<h3>Slow ranks</h3>\n{table}"
    return page.text("No rank was named slow.", "note") if any(len(run.seconds) for run in runs) else ""


def _settings(runs: list[Run]) -> str:
    if not any(run.settings for run in runs):
        return page.text("config.toml is not there yet.", "note")
    return tables.settings_table(runs) or page.text("None.", "note")
