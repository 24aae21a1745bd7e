"""Run directories as their users see them, and how a run that was disturbed differs from one that was not."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from mpiml.errors import OutputError
from mpiml.run import checkpoint
from tests.chaos.jobs import Ended, Job

COMMON = "--microbatches 12 --batch 256 --log-every 1 --eval-every 4 --save-every 2 --keep 3"  # of most runs
TIMES = ("seconds", "samples_per_second", "time")  # no two runs have the same
# Of result.json, the same in all runs.
ENDS = ("status", "step", "loss", "test_loss", "accuracy", "best_step", "best_score", "weights_sha256")
LIMIT = 60.0  # seconds in which a small run ends on a busy machine
STEP = re.compile(r"step-(\d+)\.safetensors$")


@dataclass
class Reference:
    """A run that nobody disturbed: its settings, directory, result, lines of metrics, and how long it took."""

    arguments: tuple[str, ...]
    path: Path
    seconds: float

    def __post_init__(self) -> None:
        self.result, self.metrics = result(self.path), metrics(self.path)
        self.names = {_pattern(name) for name in names(self.path)}


class Lab:
    """A directory for the campaign, in which undisturbed runs are made once and kept."""

    def __init__(self, path: Path):
        self.path, self._lock = path, Lock()
        self._references: dict[str, Reference] = {}

    def reference(self, settings: str) -> Reference:
        """The run with these settings, made with one rank if it has not been made yet."""
        with self._lock:
            if settings not in self._references:
                path = self.path / f"reference-{len(self._references)}"
                with Job(0, *settings.split(), "--out", path) as job:
                    ended = job.wait(LIMIT)
                assert ended.code == 0, f"a run that nobody disturbs fails: {ended.text}"
                self._references[settings] = Reference(tuple(settings.split()), path, ended.seconds)
            return self._references[settings]


def result(run: Path) -> dict[str, Any]:
    """What result.json says, nothing if there is none that can be read."""
    try:
        content = json.loads((run / "result.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def metrics(run: Path) -> list[Any]:
    """The lines of metrics.jsonl without what no two runs have in common; those that are not whole as text."""
    entries: list[Any] = []
    try:
        lines = (run / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            entries.append({key: value for key, value in json.loads(line).items() if key not in TIMES})
        except (ValueError, AttributeError):
            entries.append(repr(line[:40]))
    return entries


def names(run: Path) -> set[str]:
    """Everything in a run directory, by its path from there."""
    return {str(path.relative_to(run)) for path in run.rglob("*")}


def checkpoints(run: Path) -> dict[int, Path]:
    """The files of checkpoints by their step, whole or not."""
    return {int(match[1]): path for path in (run / "checkpoints").glob("*") if (match := STEP.search(path.name))}


def damaged(run: Path) -> list[str]:
    """The names of checkpoints that do not verify."""
    return [path.name for path in checkpoints(run).values() if not _is_whole(path)]


def newest(run: Path) -> int:
    """The step of the newest whole checkpoint; 0 if there is none."""
    return next((step for step, path in sorted(checkpoints(run).items(), reverse=True) if _is_whole(path)), 0)


def strange(run: Path, reference: Reference) -> str:
    """What is wrong if a directory has files that an undisturbed run's has not: halves, mostly."""
    others = sorted(name for name in names(run) if _pattern(name) not in reference.names)
    return f"left behind: {', '.join(others)}" if others else ""


def weights_differ(run: Path, ended: Ended, reference: Reference) -> str:
    """What is wrong with the weights of a run that has ended, if anything."""
    if ended.hung or ended.code != 0:
        return f"resumed: code {ended.code} {ended.hung} {ended.last}"
    if "Traceback" in ended.text:
        return f"resumed: traceback, {ended.last}"
    if result(run).get("weights_sha256") != reference.result["weights_sha256"]:
        return "resumed: other weights"
    if newest(run) != reference.result["step"]:
        return f"resumed: newest checkpoint is of step {newest(run)}"
    return ""


def records_differ(run: Path, reference: Reference) -> str:
    """What is wrong with metrics.jsonl and result.json of a run that has ended, if anything."""
    lines, ends = metrics(run), result(run)
    if lines != reference.metrics:
        lost = sorted({e["step"] for e in reference.metrics} - {e["step"] for e in lines if isinstance(e, dict)})
        return f"metrics.jsonl has {len(lines)} lines, not {len(reference.metrics)} (steps {lost} lost)"
    other = [key for key in ENDS if ends.get(key) != reference.result.get(key)]
    return f"result.json differs in {', '.join(other)}" if other else ""


def resumed(run: Path, reference: Reference, ranks: int = 0, *more: object) -> Ended:
    """Go on with the run in a directory until it is done."""
    with Job(ranks, *reference.arguments, *more, "--resume", "--out", run) as job:
        return job.wait(LIMIT)


def _is_whole(path: Path) -> bool:
    try:
        checkpoint.load(path)
    except OutputError:
        return False
    return True


def _pattern(name: str) -> str:
    return STEP.sub("step-N.safetensors", name)
