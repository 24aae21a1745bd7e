"""`python -m mpiml.bench`: compares the package with NumPy, MPI and PyTorch, in pairs on the same ranks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mpiml.bench.jobs import measure_row
from mpiml.bench.rows import ROWS, figure, table
from mpiml.command import Parser, run_command
from mpiml.errors import ConfigError
from mpiml.run.environment import blas, cpu_model


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 1 if a row could not be measured; rows that only lack PyTorch or h5py do not count."""
    return run_command("mpiml.bench", lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    about = "Compare the package with NumPy, MPI and PyTorch: each row times both sides in turn, in one job."
    parser = Parser(prog="python -m mpiml.bench", description=about, allow_abbrev=False)
    parser.add_argument("--json", metavar="FILE", help="write all figures to this file")
    parser.add_argument("--only", metavar="TEXT", default="", help="measure only rows whose text contains this")
    parser.add_argument("--table", metavar="FILE", help="measure nothing: print the figures in this file as Markdown")
    chosen = parser.parse_args(arguments)
    if chosen.table:
        print(table(json.loads(Path(chosen.table).read_text())))
        return 0
    rows = [row for row in ROWS if chosen.only in f"{row.group} {row.text} {row.call[0]}"]
    if not rows:
        raise ConfigError(f"--only {chosen.only}: no row contains this; leave it out to see all rows")
    machine = f"{os.cpu_count()} cores, {cpu_model()}, {blas()}"
    print(f"{machine}; median of the pairs (range of their middle half)")
    results, group = [], ""
    for row in rows:
        if row.group != group:
            group = row.group
            print(f"\n{group}")
        result = measure_row(row)
        verdict = row.verdict(result["median"]) if "median" in result else ""
        results.append({**asdict(row), "verdict": verdict, **result})
        print(f"  {row.ranks:>2} ranks  {row.text:<66} {figure(result):<22} {verdict}", flush=True)
    if chosen.json:
        Path(chosen.json).write_text(json.dumps({"machine": machine, "rows": results}, indent=2) + "\n")
    return int(any(not result.get("error", "needs").startswith("needs") for result in results))


if __name__ == "__main__":
    sys.exit(main())
