"""The log of a run: metrics.jsonl, which rank 0 writes, event files, the terminal, and times."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml import documents
from mpiml.clock import SHARES
from mpiml.run import environment
from mpiml.run.console import Console, Shown
from mpiml.run.directory import TENSORBOARD, named_errors
from mpiml.run.step_times import StepTimes, median
from mpiml.run.stragglers import Pace
from mpiml.team import Team

if TYPE_CHECKING:
    from mpiml.run.tensorboard import Events


class Noise(NamedTuple):
    """The fields of a step's line on the noise of its gradient; None where they are not known (training/noise.py).

    Attributes:
        noise_scale: in rows, by the logged steps so far; the next two are estimates by this step alone.
        gradient_variance: of one row, the sum over all parameters.
        gradient_square: the squared norm of the gradient, without what noise adds to it.
    """

    noise_scale: float | None
    gradient_variance: float | None
    gradient_square: float | None


class Step(NamedTuple):
    """A step that is done.

    Attributes:
        loss: the mean over all rows; None within a round of workers, in steps that are not logged.
        score: the metric, if it was measured.
        norm: of the gradient, if it was computed; of workers the mean.
        seconds: that it took on this rank; 0 if an earlier job has begun its round.
        stop: whether any rank asks to stop after it.
        logged: whether it has a line; then there is the score.
        shares: seconds in each of SHARES (default: as the clock has them), and sent: bytes sent to other nodes, on this
            rank in this job up to the step's end.
        workers: in a round of workers what the line says of them.
        noise: of the gradient, if it was measured.
    """

    step: int
    epoch: int
    loss: float | None
    score: float | None
    rate: float
    norm: float | None
    seconds: float
    stop: bool
    logged: bool = False
    shares: Sequence[float] = ()
    sent: int = 0
    workers: dict[str, Any] | None = None
    noise: Noise | None = None


class Evaluation(NamedTuple):
    """The scores of the rows that are evaluated, after a step."""

    step: int
    epoch: int
    loss: float
    score: float
    rows: int


class Log:
    """Collective: every rank calls every method.

    Args:
        team: all ranks.
        metrics: the file that rank 0 writes.
        rows: of a step on average, for samples per second.
        metric: its name.
        pace: names the rank that is slow.
        known: the last results, as fields of result.json; an attribute too, which is kept up to date.
        evaluated: what the rows are called that are evaluated: test or validation.
    """

    def __init__(
        self,
        team: Team,
        metrics: Path,
        rows: float,
        metric: str,
        pace: Pace,
        known: Mapping[str, Any] | None = None,
        evaluated: str = "test",
    ):
        self.team, self.metrics, self.rows, self.metric, self.evaluated = team, metrics, rows, metric, evaluated
        self.pace, self.known = pace, dict(known or {})
        self._host = functools.cache(lambda rank: environment.host(metrics.parent, rank))
        self._named: set[int] = set()  # the slow ranks that a warning has named
        self.times = StepTimes()
        self._recent, self._recent_seconds = 0, 0.0  # steps since the last line
        self._shares, self._sent = np.array(team.clock.shares()), 0
        self._before = self._shares  # what was spent before the first step
        self._console: Console | None = None
        self._score: float | None = None  # the last
        self._events: Events | None = None  # on rank 0

    def open_console(self, first: int, last: int, quiet: bool) -> None:
        """Let rank 0 show steps `first` to `last` on the terminal, unless `quiet`."""
        if self.team.rank == 0 and not quiet:
            self._console = Console(first, last)

    def open_events(self) -> None:
        """Let rank 0 write event files too: of all lines that the metrics have by now, and of those to come. Raises
        OutputError, on all ranks alike, if they cannot be written."""

        def begin() -> None:
            from mpiml.run import tensorboard  # on one rank, of a few runs

            directory, progress = self.metrics.parent / TENSORBOARD, self.team.clock.progress
            self._events, _ = tensorboard.of_run(self.metrics, directory, self.evaluated, progress)

        self.team.clock("log")
        self.team.on_rank_0(begin)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        if self._console:
            self._console.close()

    def say(self, text: str) -> None:
        """Print a line on the terminal."""
        if self._console:
            self._console.line(text)

    def timed(self, done: Step) -> None:
        """Note how long a step took on this rank."""
        if done.seconds:
            self.times.add(done.seconds)
        self._recent, self._recent_seconds = self._recent + 1, self._recent_seconds + done.seconds
        self.known |= {"step": done.step} if done.loss is None else {"step": done.step, "loss": done.loss}
        if self._console and done.loss is not None and done.seconds:
            self._score = self._score if done.score is None else done.score
            speed = self.rows / done.seconds
            self._console.progress(done.step, Shown(done.epoch, done.loss, self.metric, self._score, speed))

    def moved(self, step: int) -> None:
        """Show on the terminal that this rank has done a step, of which more is known later; not collective."""
        if self._console:
            self._console.progress(step)

    def step(self, done: Step, newest: bool = True) -> None:
        """Write the line of a step, with the least and the most time of any rank since the last such line. It may be
        shown on the terminal too if it is the `newest`."""
        shares = np.array(done.shares or self.team.clock.shares())
        own = np.array([*(shares - self._shares), self._recent_seconds, self.pace.crowded, done.sent - self._sent])
        self._shares, self._sent = shares, done.sent
        steps, self._recent, self._recent_seconds = self._recent, 0, 0.0
        noise = done.noise._asdict() if done.noise else {}
        self.known |= {"noise_scale": done.noise.noise_scale} if done.noise else {}
        everyones = np.empty((self.team.size, len(own)))
        self.team.wait([self.team.comm.Igather(own, everyones)])

        def entry() -> dict[str, Any]:
            speed, times = self._times(everyones, steps)
            if self._console and newest:
                score = f"{self.metric} {done.score:.4f}"
                text = f"step {done.step}  epoch {done.epoch}  loss {done.loss:.4f}  {score}  {speed:,.0f} samples/s"
                self._console.now_and_then(done.step, text)
            workers = {"workers": done.workers} if done.workers else {}
            return {
                "step": done.step,
                "epoch": done.epoch,
                "loss": done.loss,
                self.metric: done.score,
                "learning_rate": done.rate,
                "gradient_norm": done.norm,
                **noise,
                "samples_per_second": round(speed, 1),
                "seconds": times,
                **workers,
            }

        self._write(entry)

    def _times(self, everyones: NDArray[np.float64], steps: int) -> tuple[float, dict[str, Any]]:
        """Samples per second and the times of a line, from a row per rank: its seconds for each of SHARES, its seconds
        in all steps, pace.crowded, and the bytes that it has sent."""
        low, high = everyones.min(axis=0).tolist(), everyones.max(axis=0).tolist()
        *_, slowest_step, crowded, _ = high
        times: dict[str, Any] = {
            name: {"min": round(a, 6), "max": round(b, 6)} for name, a, b in zip(SHARES, low, high, strict=False)
        }
        times["bytes_sent"] = {"min": int(low[-1]), "max": int(high[-1])}
        slow = None if crowded else self.pace.slowest(everyones[:, : len(SHARES)], slowest_step, steps)
        if slow:
            host = self._host(slow.place)
            times["slowest"] = {
                "rank": slow.rank,
                "host": host,
                "activity": slow.activity,
                "times_median": round(slow.times, 2),
            }
            if slow.rank not in self._named:
                self._named.add(slow.rank)
                self.say(
                    f"warning: the others wait for rank {slow.rank} (on {host}): its time in {slow.activity} is "
                    f"{slow.times:.1f} times that of the other replicas"
                )
        return steps * self.rows / slowest_step if slowest_step else 0.0, times

    def evaluation(self, done: Evaluation) -> None:
        """Write the line of an evaluation."""
        step, epoch, loss, score, rows = done
        result = {"loss": loss, self.metric: score, "rows": rows}
        self._write(lambda: {"step": step, "epoch": epoch, "evaluation": result})
        which = self.evaluated
        self.say(f"step {step}  epoch {epoch}  {which} loss {loss:.4f}  {which} {self.metric} {score:.4f}")
        self.known |= {self.metric: score, f"{which}_loss": loss}

    def samples_per_second(self) -> float | None:
        """Rows of a step / median step time, which is that of the slowest rank; collective.

        The first steps are left out, and very long runs are sampled. None if there were no steps."""
        if not self.times.steps:
            return None
        slowest = self.times.sample()
        self.team.wait([self.team.comm.Iallreduce(MPI.IN_PLACE, slowest, MPI.MAX)])
        return round(self.rows / median(slowest), 1)

    def where_the_time_went(self) -> dict[str, float]:
        """The mean over ranks of each share of the time of all steps."""
        own = self.team.clock.shares() - self._before
        total = np.empty_like(own)
        self.team.wait([self.team.comm.Iallreduce(own, total)])
        return dict(zip(SHARES, (total / max(total.sum(), 1e-9)).tolist(), strict=True))

    def _write(self, entry: Callable[[], dict[str, Any]]) -> None:
        self.team.clock("log")

        def append() -> None:
            line = documents.finite(entry() | {"time": round(time.time(), 3)})
            with named_errors("write", self.metrics), open(self.metrics, "a", encoding="utf-8") as file:
                file.write(documents.to_json(line) + "\n")
            if self._events:
                self._events.add(line)

        self.team.on_rank_0(append)
