"""The training runs of a study: when each reached the target, and the law of epochs fitted to them; no MPI."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpiml.run.result import read_result
from mpiml.scaling.epochs import EpochsLaw, Reached, fit_epochs, mean_of
from mpiml.scaling.jobs import evaluations, points_to_train, run_directory
from mpiml.scaling.laws import rounded
from mpiml.scaling.points import Point


@dataclass(frozen=True)
class Target:
    """A training run, and when it reached the target.

    Attributes:
        point: has its batch and micro-batches.
        offset: is added to the study's seed.
        best: the best score of the run.
        steps: steps until an evaluation reached the target; None if none did.
        every: steps between evaluations.
        reached: the same in epochs, with the evaluation before; None also in studies that do not know how many rows the
            training set has.
        noise_scale: as measured by --noise-scale, in rows.
    """

    point: Point
    offset: int
    best: float
    steps: int | None
    every: int
    reached: Reached | None = None
    noise_scale: float | None = None


def target_of(about: Mapping[str, Any], directory: Path, point: Point, offset: int = 0) -> Target | None:
    """A training run for a point's batch and micro-batches; None if there is none, or it has not ended.

    `about` is the content of the study's file.
    """
    run = run_directory(directory, point, about["max_epochs"], offset)
    result = read_result(run)
    if result.get("status") != "done":
        return None
    _, scores = evaluations(run)
    steps = next((step for step, score in scores if score >= about["target"]), None)
    reached = None
    if steps and (rows := about.get("rows")):
        before = max((step for step, _ in scores if step < steps), default=0)
        each = math.ceil(rows / point.batch)
        reached = Reached(rows / each, before / each, steps / each)
    best = max(score for _, score in scores)
    return Target(point, offset, best, steps, scores[0][0], reached, result.get("noise_scale"))


def training_runs(about: Mapping[str, Any], directory: Path) -> list[Target]:
    """All training runs of a study that have ended, in the order of batches."""
    if about.get("target") is None:
        return []
    points = sorted(points_to_train(about["points"]), key=lambda point: (point.batch, point.microbatches))
    offsets = range(about.get("trainings", 1))
    runs = (target_of(about, directory, point, offset) for point in points for offset in offsets)
    return [run for run in runs if run]


def missed(runs: Sequence[Target]) -> set[int]:
    """The batches with a run that did not reach the target: nothing is concluded from the others of such a batch, which
    are the quick ones."""
    return {run.point.batch for run in runs if not run.steps}


def law_of(runs: Sequence[Target], target: float, batches: Collection[int] | None = None) -> EpochsLaw:
    """The law fitted to the runs of all batches that always reached the target, or of some of these."""
    known = {run.point.batch for run in runs if batches is None or run.point.batch in batches} - missed(runs)
    return fit_epochs([run.reached for run in runs if run.reached and run.point.batch in known], target)


def several(runs: Sequence[Target]) -> bool:
    """Whether there are runs with several batches."""
    return len({run.point.batch for run in runs}) > 1


def median_noise(runs: Sequence[Target]) -> float | None:
    """The median of the noise scales that runs have measured; None if none has."""
    scales = [run.noise_scale for run in runs if run.noise_scale is not None]
    return statistics.median(scales) if scales else None


def training_rows(runs: Sequence[Target], law: EpochsLaw) -> list[dict[str, Any]]:
    """A row of figures for each training run, as in scaling.json; "error" is the law's, over the run's own epochs."""
    rows = []
    for run in runs:
        reached, fitted = run.reached, law.at(run.reached.batch).value if law and run.reached else None
        rows.append(
            {
                "batch": run.point.batch,
                "microbatches": run.point.microbatches,
                "seed_offset": run.offset,
                "rows": reached.batch if reached else None,
                "best_score": run.best,
                "steps_to_target": run.steps,
                "epochs_before_target": reached.after if reached else None,
                "epochs_to_target": reached.by if reached else None,
                "fitted_epochs": fitted,
                "error": fitted / reached.epochs - 1 if reached and fitted else None,
                "noise_scale": run.noise_scale,
            }
        )
    return rows


def training_table(runs: Sequence[Target], law: EpochsLaw, target: float) -> list[list[str]]:
    """The runs of each batch with their mean epochs, beside those of the law and measured noise scales; heads first."""
    scaled = median_noise(runs) is not None
    heads = ["batch", "runs", f"steps to {target:g}", "epochs to it", "fitted", "error"]
    heads += ["measured noise scale"] if scaled else []
    lines = [heads]
    for batch in sorted({run.point.batch for run in runs}):
        some = [run for run in runs if run.point.batch == batch]
        steps = [str(run.steps or f"not reached ({run.best:.4g})") for run in some]
        cells = [str(batch), str(len(some)), ", ".join(steps), *_epochs(some, law)]
        if scaled:
            noise = median_noise(some)
            cells.append("" if noise is None else f"{rounded(noise)} rows")
        lines.append(cells)
    return lines


def _epochs(runs: Sequence[Target], law: EpochsLaw) -> tuple[str, str, str]:
    """Mean epochs of runs with one batch, those of the law, and its error, as cells; empty if a run did not reach the
    target."""
    reached = [run.reached for run in runs if run.reached]
    if len(reached) < len(runs):
        return "", "", ""
    mean = mean_of(reached)
    fitted = law.at(mean.batch).value if law else None
    cells = ("", "") if fitted is None else (f"{fitted:.3g}", f"{fitted / mean.epochs - 1:+.0%}")
    return mean.text, *cells


def about_epochs(runs: Sequence[Target]) -> str:
    """What explains the table and the law."""
    text = (
        "Epochs over the batch: E(B) = E0 (1 + B / B_noise), after McCandlish et al. 2018 (arXiv 1812.06162). Small "
        "batches take E0 epochs, one of B_noise rows takes twice as many, and with larger ones the steps hardly become "
        "fewer. That is so if the learning rate suits each batch. Epochs are known to the time between two "
        "evaluations, and intervals include that."
    )
    if (noise := median_noise(runs)) is not None:
        text += f" Measured noise scale: {rounded(noise)} rows, the median of all runs that measured it."
    if left_out := sorted(missed(runs)):
        text += f" Left out, because a run did not reach the target: a batch of {', '.join(map(str, left_out))}."
    return text
