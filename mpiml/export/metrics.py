"""The metrics of a run as CSV tables, or as event files for TensorBoard."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mpiml.command import plural
from mpiml.errors import DirectoryError, OutputError
from mpiml.run import tensorboard
from mpiml.run.directory import CONFIG, METRICS, TENSORBOARD, named_errors, settings_in, write_atomically
from mpiml.run.metrics import content_of, lines
from mpiml.run.result import read_result

STEPS, EVALUATIONS = "steps.csv", "evaluations.csv"


def export(run: Path, to: str, out: Path | None) -> tuple[list[str], list[str]]:
    """Write the metrics of a run `to` tensorboard or csv, into the directory `out`.

    Returns lines that say what has been written, and warnings. A last line that is half written is left out.
    Raises OutputError for a directory that holds no metrics, and for what cannot be read or written, DirectoryError for
    event files that the run is writing itself, ConfigError if the library for event files is missing.
    """
    metrics, settings = _metrics_of(run), settings_in(run)
    if to == "csv":
        return _to_csv(metrics, out or run)
    directory = out or run / TENSORBOARD
    running = settings.get("log") == "tensorboard" and read_result(run).get("status") == "running"
    if running and directory.resolve() == (run / TENSORBOARD).resolve():
        raise DirectoryError(f"the job in {run} writes {directory} itself; give another directory by --out DIR")
    rows = "validation" if settings.get("validation") else "test"
    events, problems = tensorboard.of_run(metrics, directory, rows)
    return [str(events.path)], _warnings(problems)


def table(entries: Iterable[Mapping[str, Any]]) -> str:
    """Entries as CSV: a column for every field that any of them has, named as the path to it, seconds/compute/max. A
    field that is not known is empty; numbers have all their digits."""
    rows = [dict(_fields(entry)) for entry in entries]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _to_csv(metrics: Path, directory: Path) -> tuple[list[str], list[str]]:
    good, problems = lines(metrics, content_of(metrics))
    entries = [entry for _, entry in good]
    tables = {
        STEPS: [entry for entry in entries if "evaluation" not in entry],
        EVALUATIONS: [_flat(entry) for entry in entries if "evaluation" in entry],
    }
    with named_errors("create", directory):
        directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, rows in tables.items():
        write_atomically(directory / name, table(rows))
        written.append(f"{directory / name}: {plural(len(rows), 'row')}")
    return written, _warnings(problems)


def _flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The line of an evaluation, with loss, score and rows in the place of `evaluation`."""
    flat: dict[str, Any] = {}
    for name, value in entry.items():
        flat |= value if name == "evaluation" else {name: value}
    return flat


def _fields(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The fields of an entry that are no objects, those within others too, by their paths."""
    for name, item in value.items():
        if isinstance(item, Mapping):
            yield from _fields(item, f"{prefix}{name}/")
        else:
            yield prefix + name, item


def _warnings(problems: list[str]) -> list[str]:
    more = f" (damaged lines in all: {len(problems)})" if len(problems) > 1 else ""
    return [f"{problems[0]}{more}; the rest is exported"] if problems else []


def _metrics_of(run: Path) -> Path:
    """The metrics of a run. Raises OutputError if there are none."""
    metrics = run / METRICS
    if not run.is_dir():
        what = "is not a directory" if run.exists() else "does not exist"
        raise OutputError(f"{run} {what}; give the directory of a run, as runs/digits-mlp-001")
    if not metrics.exists():
        what = "has logged nothing yet" if (run / CONFIG).exists() else "is not the directory of a run"
        raise OutputError(f"{run} {what}: there is no {METRICS} in it")
    return metrics
