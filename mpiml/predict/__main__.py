"""`python -m mpiml.predict calibrate|predict|check STUDY`: steps on grids that nobody has measured; no MPI.

`calibrate` starts the job that measures the pieces of a step (mpiml.predict.calibration), `predict` puts them together
for any grid (mpiml.predict.step), `check` compares that with a study's points: none of which goes into a prediction.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mpiml.command import Parser, ended, positive, whole, wholes
from mpiml.command import table as columns
from mpiml.config import parse
from mpiml.documents import to_json
from mpiml.errors import ConfigError
from mpiml.predict.machine import MACHINE, load
from mpiml.predict.predictor import Prediction, Predictor, compare, told
from mpiml.run.launcher import check_program, environment, launcher
from mpiml.scaling.points import read


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 1 if a check shows that predictions are off, 78 if it was asked for what cannot be."""
    return ended("mpiml.predict", lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    chosen = _parser().parse_args(arguments)
    return int(chosen.act(chosen))


def _parser() -> Parser:
    parser = Parser(prog="python -m mpiml.predict", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="calibrate|predict|check")
    measure = commands.add_parser("calibrate", help="measure what predictions need", allow_abbrev=False)
    measure.add_argument("directory", metavar="DIR", help="of a study")
    measure.add_argument("--ranks", type=whole(), metavar="N", help="that compute at once (default: the node's cores)")
    measure.add_argument("--launcher", metavar="TEXT", help="as of mpiml.scaling run")
    measure.add_argument(
        "--repeats",
        type=whole(),
        default=3,
        metavar="N",
        help="jobs; medians count, also of earlier ones (default: 3)",
    )
    measure.set_defaults(act=calibrate)
    tell = commands.add_parser("predict", help="the step on grids that are not measured", allow_abbrev=False)
    tell.add_argument("directory", metavar="DIR", help="of a study")
    tell.add_argument("--ranks", type=wholes, required=True, metavar="N,N", help="numbers of ranks")
    tell.add_argument("--node-ranks", type=whole(), metavar="N", help="of a node (default: its cores)")
    tell.add_argument("--latency", type=positive, metavar="X", help="seconds of a message between nodes")
    tell.add_argument("--bandwidth", type=positive, metavar="X", help="of a node, bytes per second")
    tell.add_argument("--json", action="store_true", help="print all grids as JSON")
    tell.set_defaults(act=predict)
    compare = commands.add_parser("check", help="predictions against what was measured", allow_abbrev=False)
    compare.add_argument("directories", nargs="+", metavar="DIR", help="of studies")
    compare.set_defaults(act=check)
    return parser


def calibrate(chosen: argparse.Namespace) -> int:
    """Start the jobs that measure. Returns the exit code of one that failed."""
    directory = Path(chosen.directory)
    settings = read(directory)["settings"]
    config = parse(settings)
    ranks = chosen.ranks or max(len(os.sched_getaffinity(0)) // config.threads, 1)
    command = [*launcher(chosen.launcher, ranks), sys.executable, "-m", "mpiml.predict.calibration"]
    check_program(command)
    target = (directory / MACHINE).absolute()
    target.mkdir(exist_ok=True)
    env = environment()
    for _ in range(chosen.repeats):
        path = target / f"{len(list(target.iterdir())):03d}.json"
        done = subprocess.run([*command, str(path), *settings], check=False, env=env)
        if done.returncode:
            return done.returncode
    print(told(load(directory)))
    return 0


def predict(chosen: argparse.Namespace) -> int:
    """Print the best grid for each number of ranks, or all grids as JSON."""
    predictor = Predictor(Path(chosen.directory), chosen.latency, chosen.bandwidth)
    node_ranks = chosen.node_ranks or max(predictor.machine.cores // predictor.config.threads, 1)
    found = {ranks: list(predictor.grids(ranks, node_ranks)) for ranks in chosen.ranks}
    if chosen.json:
        every = [asdict(one) for predictions in found.values() for one in predictions]
        print(to_json({"machine": asdict(predictor.machine), "predictions": every}, indent=1))
        return 0
    one = max(predictor.grids(1, 1), key=lambda prediction: prediction.samples_per_second)
    print(told(predictor.machine, chosen.latency, chosen.bandwidth))
    needed = min(node_ranks, max(chosen.ranks)) * predictor.config.threads
    if needed > predictor.machine.cores:
        print(f"ASSUMED: nodes of {needed} cores, on each of which a rank computes as fast as here")
    print("\n".join(["", *_screen(found, one, node_ranks)]))
    return 0


def _screen(found: dict[int, list[Prediction]], one: Prediction, node_ranks: int) -> list[str]:
    rows = [["ranks", "best grid", "M", "batch", "step ms", "samples/s", "speed-up"]]
    rows[0] += ["compute", "waiting", "communication", "update"]
    refused = []
    for ranks, predictions in found.items():
        if not predictions:
            refused.append(f"{ranks} ranks: no grid has a row of the batch for each of its micro-batches")
            continue
        best = max(predictions, key=lambda prediction: prediction.samples_per_second)
        took = best.step
        shares = [took.compute, took.waiting, took.communication, took.update]
        cells = [str(ranks), f"{best.stages} x {ranks // best.stages}", str(best.microbatches), str(best.batch)]
        cells += [f"{took.seconds * 1e3:.2f}", f"{best.samples_per_second:,.0f}"]
        cells += [f"{best.samples_per_second / one.samples_per_second:.1f}"]
        rows.append([*cells, *(f"{share / took.seconds:.0%}" for share in shares)])
    return [
        *columns(rows, "r" * len(rows[0])),
        *refused,
        f"grids are stages x replicas, with {node_ranks} ranks a node; speed-up is against one rank as predicted",
        "not known, and not in it: other jobs on nodes and network, ranks slower than others, file systems",
    ]


def check(chosen: argparse.Namespace) -> int:
    """Print predictions beside measurements. Returns 0 if the median error is at most GOAL; 1 if it is larger, or if
    that cannot be told because repeats are as far apart."""
    compared = [compare(Path(directory)) for directory in chosen.directories]
    found, left_out = [one for some, _ in compared for one in some], sum(count for _, count in compared)
    if not found:
        raise ConfigError("nothing to compare: all points have more ranks than cores")
    rows = [["study", "grid", "batch", "M", "measured ms", "repeats apart", "predicted ms", "error"]]
    for one in found:
        cells = [one.study, one.grid, str(one.batch), str(one.microbatches), f"{one.measured * 1e3:.3f}"]
        rows.append([*cells, f"{one.spread:.0%}", f"{one.predicted * 1e3:.3f}", f"{one.error:+.0%}"])
    print("\n".join(columns(rows, "l" + "r" * 7)))
    if left_out:
        print(f"left out, for they have more ranks than cores: {left_out}")
    error = statistics.median(abs(one.error) for one in found)
    spread = statistics.median(one.spread for one in found)
    if error <= GOAL:
        verdict = "good"
    elif error <= spread:
        verdict = f"cannot be told, repeats are {spread:.0%} apart"
    else:
        verdict = f"predictions are off by more than {GOAL:.0%} and the repeats"
    worst = max(abs(one.error) for one in found)
    print(f"{len(found)} points: median error {error:.0%}, largest {worst:.0%}; repeats {spread:.0%} apart: {verdict}")
    return int(error > GOAL)


GOAL = 0.15  # the largest median error of a prediction that is good


if __name__ == "__main__":
    sys.exit(main())
