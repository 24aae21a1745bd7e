"""`python -m tests.chaos`: the campaign, `make chaos`; see tests.chaos."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos import report
from tests.chaos.campaign import Figures, only, run, space
from tests.chaos.parts import PARTS
from tests.chaos.runs import Lab
from tests.conftest import shared_memory_tidied


def main() -> int:
    """Run the campaign. Returns 1 if anything was missed that is this package's."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0, help="time for all parts together (default: 15)")
    parser.add_argument("--seed", type=int, help="repeats a campaign; it is the first thing printed")
    parser.add_argument("--parts", default=",".join(PARTS), help="of %(default)s; PART:NUMBER is that trial alone")
    parser.add_argument("--json", type=Path, default=Path("chaos.json"), help="where to write (default: chaos.json)")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="print the table of such a file, and do nothing else"
    )
    asked = parser.parse_args()
    if asked.table:
        said = json.loads(asked.table.read_text())
        print(report.table(report.by_part(said, {name: part.text for name, part in PARTS.items()})))
        return 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends jobs and tidies up
    seed = time.time_ns() % 1_000_000 if asked.seed is None else asked.seed
    print(f"seed {seed}", flush=True)
    began, figures = time.monotonic(), Figures()
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch, shared_memory_tidied():
        campaign(asked.parts.split(","), seed, 60 * asked.minutes, figures, Path(scratch))
    said = report.content(figures, seed, (time.monotonic() - began) / 60)
    report.write(asked.json, said)
    print(report.table(said))
    print("\n".join(["", *(f"MISS {miss}" for miss in figures.own)]))
    return 1 if figures.own else 0


def campaign(asked: list[str], seed: int, seconds: float, figures: Figures, scratch: Path) -> None:
    """Try what was asked for. Parts share the time that is left, so that what one leaves over is the later ones'."""
    end, lab = time.monotonic() + seconds, Lab(scratch)
    todo = [(name, number) for name, _, number in (text.partition(":") for text in asked)]
    if unknown := [name for name, _ in todo if name not in PARTS]:
        sys.exit(f"--parts {','.join(unknown)}: choose from {', '.join(PARTS)}")
    for i, (name, number) in enumerate(todo):
        shares = [PARTS[later].share for later, _ in todo[i:]]
        drawn = space(name, PARTS[name].cases, lab, seed)
        time_left = (end - time.monotonic()) * shares[0] / sum(shares)
        run(name, only(drawn, int(number)) if number else drawn, figures, scratch, time_left)


if __name__ == "__main__":
    sys.exit(main())
