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
from mpiml.predict import held_out
from mpiml.predict.machine import MACHINE, load_machine
from mpiml.predict.predictor import Prediction, Predictor, compare, describe
from mpiml.run.launcher import check_program, environment, launcher
from mpiml.scaling.epochs import EpochsLaw
from mpiml.scaling.laws import rounded
from mpiml.scaling.points import read_study, unmeasured
from mpiml.scaling.report import fits_text

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
    what = (
        "batches that the law of epochs is fitted to, for the others (default: each batch is predicted by the others)"
    )
    one.add_argument("--fit", type=wholes, metavar="N,N", help=what)
    return parser


def calibrate(chosen: argparse.Namespace) -> int:
    """Start the jobs that measure. Returns 0, or the exit code of one that failed."""
    directory = Path(chosen.directory)
    settings = unmeasured(read_study(directory)["settings"])
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
        law = asdict(predictor.law.fit) if predictor.law is not None else None
        print(to_json({"machine": asdict(predictor.machine), "law": law, "predictions": predictions}, indent=1))
        return 0
    print(describe(predictor.machine, chosen.latency, chosen.bandwidth))
    needed = min(node_ranks, max(chosen.ranks)) * predictor.config.threads
    if needed > predictor.machine.cores:
        print(f"ASSUMED: nodes of {needed} cores, on each of which a rank computes as fast as here")
    one = max(predictor.grids(1, 1), key=lambda prediction: prediction.samples_per_second)
    best = {ranks: max(some, key=lambda one: one.samples_per_second) for ranks, some in grids.items() if some}
    print("\n".join(["", *_screen(best, one, node_ranks, predictor.target if predictor.law else None)]))
    workers, given = predictor.config.workers, predictor.config.microbatches
    few = f"--microbatches {given} are too few for" if given else "the batch has too few rows for the micro-batches of"
    for ranks in sorted(grids.keys() - best.keys()):
        or_workers = f", or no grid can share {workers} workers" if workers else ""
        print(f"{plural(ranks, 'rank')}: {few} any grid{or_workers}")
    if predictor.law is not None:
        print("\n".join(_to_target(list(best.values()), predictor.law)))
    return 0


def _screen(grids: dict[int, Prediction], one: Prediction, node_ranks: int, target: float | None) -> list[str]:
    """The best grid of each number of ranks, beside one rank."""
    rows = [["ranks", "best grid", "M", "batch", "step ms", "samples/s", "speed-up"]]
    rows[0] += ["compute", "waiting", "communication", "update"]
    rows[0] += [] if target is None else [f"epochs to {target:g}", "seconds to it (95 %)"]
    for ranks, best in grids.items():
        time = best.step
        cells = [str(ranks), f"{best.stages} x {ranks // best.stages}", str(best.microbatches), str(best.batch)]
        cells += [f"{time.seconds * 1e3:.2f}", f"{best.samples_per_second:,.0f}"]
        cells += [f"{best.samples_per_second / one.samples_per_second:.1f}"]
        parts = (time.compute, time.waiting, time.communication, time.update)
        cells += [f"{part / time.seconds:.0%}" for part in parts]
        if best.epochs_to_target and best.seconds_to_target:
            cells += [rounded(best.epochs_to_target.value), best.seconds_to_target.text()]
        rows.append(cells)
    return [
        *table(rows, "r" * len(rows[0])),
        f"grids are stages x replicas, with {node_ranks} ranks a node; speed-up is against one rank as predicted",
        "left out: other jobs on nodes and network, ranks slower than others, file systems",
    ]


def _to_target(best: Sequence[Prediction], law: EpochsLaw) -> list[str]:
    """The law of epochs, and where more ranks stop paying."""
    lines = fits_text([law.fit]).removeprefix("- ").splitlines()
    known = [(one, one.seconds_to_target.value) for one in best if one.seconds_to_target]
    if known:
        least, seconds = min(known, key=lambda pair: pair[1])
        more = "more ranks take longer" if least.ranks < best[-1].ranks else "more ranks may take less"
        where = f"{plural(least.ranks, 'rank')} with a batch of {least.batch}, {rounded(seconds)} s; {more}"
        lines += [
            f"least seconds to the target: on {where}",
            "intervals of seconds are those of the epochs: errors of predicted times are not in them",
        ]
    if beyond := [one.batch for one, _ in known if not law.smallest <= one.rows <= law.largest]:
        runs = f"runs have {rounded(law.smallest)} to {rounded(law.largest)} rows a step"
        lines.append(
            f"ASSUMED: the law of epochs also for batches of {', '.join(map(str, sorted(set(beyond))))}; {runs}"
        )
    return lines


def check(chosen: argparse.Namespace) -> int:
    """Print predictions beside measurements: epochs of training runs, if there are any to hold out, and times of steps,
    if the machine is calibrated. Returns 0 if both median errors are at most GOAL; else 1."""
    directories = [Path(directory) for directory in chosen.directories]
    trained = [one for directory in directories for one in held_out.held_out(directory, chosen.fit)]
    bad = 0
    if trained:
        print("\n".join(held_out.describe(trained, chosen.fit, GOAL)))
        bad = int(held_out.median_error(trained) > GOAL)
        directories = [directory for directory in directories if (directory / MACHINE).is_dir()]
    return max(bad, _check_steps(directories)) if directories else bad


def _check_steps(directories: Sequence[Path]) -> int:
    """Print predicted beside measured times. Returns 0 if the median error is at most GOAL; else 1, also where repeats
    differ too much to judge."""
    results = [compare(directory) for directory in directories]
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
