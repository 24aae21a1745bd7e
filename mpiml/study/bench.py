"""The benchmark: each row pits the package against something else, side by side on the same ranks, as a ratio."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpiml.run.environment import cpu_model


@dataclass(frozen=True)
class Row:
    """A measurement: on how many ranks, of what, and the ratio of times that it should not exceed (if any)."""

    text: str
    ranks: int
    arguments: tuple[str, ...]
    at_most: float | None = None


ROWS = [
    *(
        Row(f"step, MLP 784-{h}-{h}-10, batch {b}, against NumPy by hand", 1, ("step", f"{h}-{h}", str(b), "1"), 1.10)
        for h, b in ((256, 64), (1024, 64), (2048, 128))
    ),
    *(
        Row(f"ordered all-reduce, {mb} MB, private memory, against MPI_Allreduce", ranks, ("allreduce", mb, "bare"))
        for ranks in (2, 4)
        for mb in ("1", "4", "16", "64")
    ),
    *(
        Row(f"the same with SGD update, {mb} MB", ranks, ("allreduce", mb, "update"))
        for ranks in (2, 4)
        for mb in ("1", "64")
    ),
]


def launcher() -> list[str]:
    """mpirun beside this Python, or the machine's."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if not found:
        raise SystemExit("mpiml.bench: no mpirun found; install one with pip install mpich, or load a module")
    return [found]


def measure(row: Row) -> dict[str, Any]:
    """Run one row in a job of its own."""
    single = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    command = [*launcher(), "-n", str(row.ranks), sys.executable, "-m", "mpiml.study.rows", *row.arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | single, timeout=600)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def verdict(row: Row, result: dict[str, Any]) -> str:
    """Whether a row reached its figure; those that have none are only shown."""
    if "error" in result:
        return "FAILED"
    if row.at_most is None:
        return ""
    return "reached" if result["median"] <= row.at_most else "MISSED"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 1 if a row could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m mpiml.bench", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write all figures to this file")
    parser.add_argument("--only", metavar="WORD", default="", help="rows whose text has this word in it")
    chosen = parser.parse_args(arguments)
    print(f"{os.cpu_count()} cores, {cpu_model()}; times are ratios, ours / other: median (middle half)")
    results = []
    for row in ROWS:
        if chosen.only not in row.text:
            continue
        result = measure(row)
        judged = verdict(row, result)
        results.append({"row": row.text, "ranks": row.ranks, "at_most": row.at_most, "verdict": judged, **result})
        figure = result.get("error") or f"{result['median']:.2f} ({result['low']:.2f} to {result['high']:.2f})"
        limit = f"at most {row.at_most:.2f}: {judged}" if row.at_most else judged
        print(f"{row.ranks:>2} ranks  {row.text:<78} {figure:<22} {limit}", flush=True)
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(results, indent=2) + "\n")
    return int(any("error" in result for result in results))
