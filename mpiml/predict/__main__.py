"""`python -m mpiml.predict calibrate|predict|check STUDY`: predicts steps on grids that are not measured; no MPI."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from mpiml.command import Parser, plural, positive, run_command, table, whole, wholes
from mpiml.config import parse
from mpiml.documents import to_json
from mpiml.errors import ConfigError
from mpiml.predict.machine import MACHINE, load_machine
from mpiml.predict.predictor import Prediction, Predictor, compare, describe
from mpiml.run.launcher import check_program, environment, launcher
from mpiml.scaling.points import read_study

GOAL = 0.15  # the largest median error of good predictions


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 1 if a check does not show good predictions, or the exit code of an error."""
    return run_command("mpiml.predict", lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    chosen = _parser().parse_args(arguments)
    return int(chosen.act(chosen))


def _parser() -> Parser:
    parser = Parser(
        prog="python -m mpiml.predict",
        description="Predict steps on grids that are not measured. `calibrate` measures the pieces of a step on this "
        "machine, `predict` puts them together for any grid, `check` compares predictions with the measured points of "
        "studies, which are not used for the predictions.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="calibrate|predict|check")

    def add(name: str, act: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help.capitalize() + ".", allow_abbrev=False)
        command.set_defaults(act=act)
        return command

    one = add("calibrate", calibrate, "measure the pieces of a step")
    one.add_argument("directory", metavar="DIR", help="directory of the study")
    what = "ranks that compute at once (default: this node's cores)"
    one.add_argument("--ranks", type=whole(), metavar="N", help=what)
    one.add_argument("--launcher", metavar="TEXT", help="how to start a job, as for mpiml.scaling run")
    what = "jobs; the medians of these and of earlier ones count (default: 3)"
    one.add_argument("--repeats", type=whole(), default=3, metavar="N", help=what)
    one = add("predict", predict, "predict the step on the grids of several numbers of ranks")
    one.add_argument("directory", metavar="DIR", help="directory of the study")
    one.add_argument("--ranks", type=wholes, required=True, metavar="N,N", help="numbers of ranks")
    one.add_argument("--node-ranks", type=whole(), metavar="N", help="ranks on each node (default: its cores)")
    what = "seconds of a message between nodes (default: as measured)"
    one.add_argument("--latency", type=positive, metavar="X", help=what)
    what = "bytes per second from a node to others (default: as measured)"
    one.add_argument("--bandwidth", type=positive, metavar="X", help=what)
    one.add_argument("--json", action="store_true", help="print the predictions for all grids as JSON")
    one = add("check", check, "compare predictions with measured points")
    one.add_argument("directories", nargs="+", metavar="DIR", help="directories of studies")
    return parser


def calibrate(chosen: argparse.Namespace) -> int:
    """Start the jobs that measure. Returns 0, or the exit code of one that failed."""
    directory = Path(chosen.directory)
    settings = read_study(directory)["settings"]
    ranks = chosen.ranks or max(len(os.sched_getaffinity(0)) // parse(settings).threads, 1)
    command = [*launcher(chosen.launcher, ranks), sys.executable, "-m", "mpiml.predict.calibration"]
    check_program(command)
    target = (directory / MACHINE).absolute()
    target.mkdir(exist_ok=True)
    for _ in range(chosen.repeats):
        path = target / f"{len(list(target.iterdir())):03d}.json"
        done = subprocess.run([*command, str(path), *settings], check=False, env=environment())
        if done.returncode:
            return done.returncode
    print(describe(load_machine(directory)))
    return 0


def predict(chosen: argparse.Namespace) -> int:
    """Print the best grid for each number of ranks, or all grids as JSON."""
    predictor = Predictor(Path(chosen.directory), chosen.latency, chosen.bandwidth)
    node_ranks = chosen.node_ranks or max(predictor.machine.cores // predictor.config.threads, 1)
    grids = {ranks: list(predictor.grids(ranks, node_ranks)) for ranks in chosen.ranks}
    if chosen.json:
        predictions = [asdict(prediction) for ranks in chosen.ranks for prediction in grids[ranks]]
        print(to_json({"machine": asdict(predictor.machine), "predictions": predictions}, indent=1))
        return 0
    print(describe(predictor.machine, chosen.latency, chosen.bandwidth))
    needed = min(node_ranks, max(chosen.ranks)) * predictor.config.threads
    if needed > predictor.machine.cores:
        print(f"ASSUMED: nodes of {needed} cores, on each of which a rank computes as fast as here")
    one = max(predictor.grids(1, 1), key=lambda prediction: prediction.samples_per_second)
    print("\n".join(["", *_screen(grids, one, node_ranks)]))
    return 0


def _screen(grids: dict[int, list[Prediction]], one: Prediction, node_ranks: int) -> list[str]:
    """The best grid of each number of ranks, beside one rank."""
    rows = [["ranks", "best grid", "M", "batch", "step ms", "samples/s", "speed-up"]]
    rows[0] += ["compute", "waiting", "communication", "update"]
    refused = []
    for ranks, predictions in grids.items():
        if not predictions:
            refused.append(f"{plural(ranks, 'rank')}: the batch has too few rows for the micro-batches of any grid")
            continue
        best = max(predictions, key=lambda prediction: prediction.samples_per_second)
        time = best.step
        cells = [str(ranks), f"{best.stages} x {ranks // best.stages}", str(best.microbatches), str(best.batch)]
        cells += [f"{time.seconds * 1e3:.2f}", f"{best.samples_per_second:,.0f}"]
        cells += [f"{best.samples_per_second / one.samples_per_second:.1f}"]
        parts = (time.compute, time.waiting, time.communication, time.update)
        rows.append([*cells, *(f"{part / time.seconds:.0%}" for part in parts)])
    return [
        *table(rows, "r" * len(rows[0])),
        *refused,
        f"grids are stages x replicas, with {node_ranks} ranks a node; speed-up is against one rank as predicted",
        "left out: other jobs on nodes and network, ranks slower than others, file systems",
    ]


def check(chosen: argparse.Namespace) -> int:
    """Print predictions beside measurements. Returns 0 if the median error is at most GOAL; else 1, also where repeats
    differ too much to judge."""
    results = [compare(Path(directory)) for directory in chosen.directories]
    compared, left_out = [one for some, _ in results for one in some], sum(count for _, count in results)
    if not compared:
        raise ConfigError("nothing to compare: all points have more ranks than cores")
    rows = [["study", "grid", "batch", "M", "measured ms", "range of repeats", "predicted ms", "error"]]
    for one in compared:
        point = [one.point.grid, str(one.point.batch), str(one.point.microbatches)]
        rows.append(
            [
                one.study,
                *point,
                f"{one.measured * 1e3:.3f}",
                f"{one.spread:.0%}",
                f"{one.predicted * 1e3:.3f}",
                f"{one.error:+.0%}",
            ]
        )
    print("\n".join(table(rows, "l" + "r" * 7)))
    if left_out:
        print(f"left out because they have more ranks than cores: {plural(left_out, 'point')}")
    error = statistics.median(abs(one.error) for one in compared)
    spread = statistics.median(one.spread for one in compared)
    if error <= GOAL:
        verdict = "good"
    elif error <= spread:
        verdict = "undecided: repeats differ as much"
    else:
        verdict = f"predictions are off by more than {GOAL:.0%}, and by more than the repeats"
    worst = max(abs(one.error) for one in compared)
    print(f"{plural(len(compared), 'point')}: median error {error:.0%}, largest {worst:.0%}; ", end="")
    print(f"range of repeats {spread:.0%}; {verdict}")
    return int(error > GOAL)


if __name__ == "__main__":
    sys.exit(main())
