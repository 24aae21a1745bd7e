"""Tables of runs: how each ended, what differs between their settings, their jobs, slow ranks, and what they ran on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from mpiml.flags import text
from mpiml.pages import colours, page
from mpiml.pages.page import Cell, number
from mpiml.report.runs import Run, known_settings
from mpiml.report.timing import slow_ranks
from mpiml.run.environment import essentials

ABSENT = "\u2013"
HOSTS = 4  # that are named
Facts = list[tuple[str, Cell]]


def runs_table(runs: list[Run]) -> str:
    """A row for each run; of one run, a list of facts."""
    facts = [_facts(run, index, len(runs) == 1) for index, run in enumerate(runs)]
    if len(runs) == 1:
        return page.facts(facts[0])
    heads = list(dict.fromkeys(head for one in facts for head, _ in one))
    rows = [[dict(one).get(head, Cell()) for head in heads] for one in facts]
    kept = [place for place in range(len(heads)) if any(row[place] != Cell() for row in rows)]
    numbers = [new for new, place in enumerate(kept) if any(row[place].sort is not None for row in rows)]
    return page.table([heads[place] for place in kept], [[row[place] for place in kept] for row in rows], numbers)


def _facts(run: Run, index: int, alone: bool) -> Facts:
    """What there is to say of how a run did."""
    result, metric = run.result, run.metrics.metric
    steps = run.last_step
    done = result.get("step")
    best = result.get("best_step")
    last = {
        "training loss": _last(run.metrics.steps["loss"]),
        f"{run.evaluated} loss": _last(run.metrics.evaluations["loss"]),
        metric or "score": _last(run.metrics.evaluations["score"]),
    }
    facts = [
        ("run", Cell() if alone else Cell(run.label, html=key(index) + escape(run.label))),
        ("status", status(run)),
        ("step", Cell() if done is None else Cell(f"{done:,}" + (f" of {steps:,}" if steps else ""), done)),
        *((name, number(value)) for name, value in last.items()),
        ("best", Cell() if best is None else Cell(f"{_short(result.get('best_score'))} at step {best:,}")),
        ("noise scale", number(result.get("noise_scale"), "{:,.0f} rows")),
        ("samples/s", number(result.get("samples_per_second"), "{:,.0f}")),
        ("ranks", number(result.get("ranks"), "{:,}")),
        ("stages", number(result.get("pipe"), "{:,}")),
        ("micro-batches", number(result.get("microbatches"), "{:,}")),
        ("time in steps", Cell(duration(run.seconds[-1]), float(run.seconds[-1])) if len(run.seconds) else Cell()),
        ("last job took", Cell() if (took := result.get("seconds")) is None else Cell(duration(took), took)),
        ("weights", Cell(html=f"<code>{escape(result['weights_sha256'][:12])}</code>" if weights(run) else "")),
        ("reason", Cell(str((run.status != "failed" and result.get("reason")) or ""))),  # else it stands above
    ]
    return [(head, cell) for head, cell in facts if not alone or cell != Cell()]


def weights(run: Run) -> str:
    """The digest of a run's weights; empty if it is not known."""
    return str(run.result.get("weights_sha256", ""))


def status(run: Run) -> Cell:
    """How a run ended, in its colour."""
    kind = run.status if run.status in ("done", "running", "stopped", "failed") else ""
    return Cell(run.status, html=f'<span class="status {kind}">{escape(run.status)}</span>')


def key(index: int) -> str:
    """A patch of the colour of a run's curves."""
    colour = colours.SERIES[index % len(colours.SERIES)].name
    return f'<span class="key" style="background: var(--{colour})"></span>'


def settings_table(runs: list[Run]) -> str:
    """Settings that differ between runs; of one run, those that differ from the defaults."""
    defaults = known_settings()
    columns = [{name: _text(value) for name, value in run.settings.items()} for run in runs if run.settings]
    named = [run.label for run in runs if run.settings]
    if len(columns) == 1:
        columns, named = [*columns, {name: _text(value) for name, value in defaults.items()}], ["this run", "default"]
    order = [*defaults, *sorted({name for column in columns for name in column if name not in defaults})]
    return _compared("setting", named, columns, order)


def environment_table(runs: list[Run]) -> str:
    """What the runs' last jobs ran on; the same for all in one column."""
    told = [run for run in runs if run.environment]
    columns = [_environment(run) for run in told]
    order = list(dict.fromkeys(name for column in columns for name in column))
    if len(told) > 1 and all(column == columns[0] for column in columns):
        return page.table(["environment", "all runs"], [[name, columns[0][name]] for name in order])
    return _compared("environment", [run.label for run in told], columns, order, all_rows=True)


def _environment(run: Run) -> dict[str, str]:
    content = run.environment
    ranks = content.get("ranks", [])
    hosts = list(dict.fromkeys(str(rank["host"]) for rank in ranks if "host" in rank))
    cores = sorted({str(rank["cores"]) for rank in ranks if "cores" in rank})
    threads = sorted({str(rank["threads"]) for rank in ranks if "threads" in rank})
    packages = {name: version for name, version in content.get("packages", {}).items() if name != "numpy"}
    look = content.get("look")
    about = {
        **essentials(content),
        "system": content.get("platform"),
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items() if version),
        "hosts": f"{len(hosts)}: {', '.join(hosts[:HOSTS])}{', ...' if len(hosts) > HOSTS else ''}" if hosts else "",
        "ranks": str(len(ranks) or ""),
        "cores of a rank": ", ".join(cores),
        "threads of a rank": ", ".join(threads),
        "data": "; ".join(" ".join(part) for part in content.get("data", ())),
        "data's notes": "; ".join(map(str, look.get("notes", ()))) if isinstance(look, dict) else "",
    }
    for entry in content.get("earlier", ()):
        others = ", ".join(f"{name} {value}" for name, value in entry.items() if name != "until")
        about[f"until step {entry.get('until')}"] = others
    return {name: str(value) for name, value in about.items() if value}


def jobs_table(runs: list[Run]) -> str:
    """The jobs of the runs that have had several."""
    rows: list[list[Cell | str]] = [
        [run.label, number(place, "{}"), number(job["after"], "{:,}"), *_grid(job), str(job.get("at", ""))]
        for run in runs
        if len(run.jobs) > 1 or run.restarts
        for place, job in enumerate(run.jobs, 1 if run.jobs[0]["after"] == 0 else 2)
    ]
    heads = ["run", "job", "went on from step", "ranks", "stages", "began"]
    return _for_one(runs, heads, rows, (1, 2, 3, 4))


def _grid(job: Mapping[str, Any]) -> list[Cell]:
    return [number(job.get("ranks"), "{:,}"), number(job.get("pipe"), "{:,}")]


def slow_table(runs: list[Run]) -> str:
    """The ranks that the others waited for."""
    rows: list[list[Cell | str]] = [
        [
            run.label,
            number(rank, "{}"),
            host,
            activity,
            number(len(lines), "{:,}"),
            f"{lines[0].step:,} to {lines[-1].step:,}",
            number(max(line.times for line in lines), "{:.1f}"),
        ]
        for run in runs
        for rank, host, activity, lines in slow_ranks(run)
    ]
    heads = ["run", "rank", "host", "slow in", "lines that name it", "steps", "times the other replicas, at most"]
    return _for_one(runs, heads, rows, (1, 4, 6))


def duration(seconds: float) -> str:
    """A time that a person reads: "12.3 s", "3 min 20 s", "2 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def _for_one(runs: list[Run], heads: list[str], rows: list[list[Cell | str]], numbers: Iterable[int]) -> str:
    """A table whose first column is the run, which is left out if there is only one."""
    if not rows:
        return ""
    if len(runs) > 1:
        return page.table(heads, rows, numbers)
    return page.table(heads[1:], [row[1:] for row in rows], [column - 1 for column in numbers])


def _compared(
    what: str, named: Sequence[str], columns: Sequence[Mapping[str, str]], order: list[str], all_rows: bool = False
) -> str:
    """Rows of what columns have under each name: of all, or only where they differ."""
    rows = [[name, *(column.get(name, ABSENT) for column in columns)] for name in order]
    kept = [row for row in rows if all_rows or len(set(row[1:])) > 1]
    return page.table([what, *named], kept) if kept else ""


def _text(value: Any) -> str:
    """A value of config.toml as its flag takes it; nothing for what is not set."""
    return ABSENT if value in (None, "", [], ()) else text(tuple(value) if isinstance(value, list) else value)


def _last(values: Any) -> float | None:
    known = values[values == values]
    return float(known[-1]) if len(known) else None


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "unknown"
