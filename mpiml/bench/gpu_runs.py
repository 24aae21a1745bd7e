"""Runs of `mpiml.train` on a device for the check on a GPU: on several layouts, as a pipeline, killed and resumed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpiml.bench import gpu_models, jobs
from mpiml.bench.gpu_models import flag
from mpiml.bench.gpu_rows import Check, failed, same
from mpiml.command import plural
from mpiml.errors import RunError
from mpiml.run.launcher import environment

TIMES = ("seconds", "samples_per_second", "time")  # in lines of metrics.jsonl
LIMIT = 120.0  # seconds until the first checkpoint of a run that is to be killed, and until a killed job is gone
PAUSE = 0.02  # seconds between two looks whether there is one
KILLED = 2  # ranks of the run that is killed
STEPS = {"cuda": (400, 20), "fake": (24, 3)}  # of that run, and those between its checkpoints


class JobError(RunError):
    """A job of the check has failed."""


@dataclass(frozen=True)
class Ended:
    """What a run has left.

    Attributes:
        metrics: its lines, without times; speed: samples/s, the median of its later lines.
    """

    sha256: str
    metrics: list[dict[str, Any]]
    speed: float

    @classmethod
    def of(cls, run: Path) -> Ended:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        speeds = [line["samples_per_second"] for line in lines if "samples_per_second" in line]
        metrics = [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
        sha256 = json.loads((run / "result.json").read_text())["weights_sha256"]
        return cls(sha256, metrics, statistics.median(speeds[1:] or speeds or [0.0]))

    def differs(self, other: Ended) -> str:
        """How the other's bits differ from these; empty if they do not."""
        for one, another in zip(self.metrics, other.metrics, strict=False):
            if one != another:
                return f"metrics differ from step {one['step']} on"
        if len(self.metrics) != len(other.metrics):
            return f"{len(other.metrics)} lines of metrics instead of {len(self.metrics)}"
        return "" if self.sha256 == other.sha256 else "weights differ, metrics do not"


@dataclass(frozen=True)
class Runs:
    """Runs on one kind of device, below a directory.

    Args:
        devices: how many there are.
        short: whether only a few are made, for a test.
    """

    kind: str
    devices: int
    scratch: Path
    short: bool = False
    ended: dict[tuple[object, ...], Ended] = field(default_factory=dict)

    def run(self, ranks: int, flags: str, owners: bool = False) -> Ended:
        """What a run leaves, on ranks that share the first device, or are its `owners`. Raises JobError if it fails."""
        key = ranks, flags, owners
        if key not in self.ended:
            self.ended[key] = self.train(ranks, flags, Path(tempfile.mkdtemp(dir=self.scratch)), owners)
        return self.ended[key]

    def train(self, ranks: int, flags: str, out: Path, owners: bool = False) -> Ended:
        """The same, in a directory that may hold a run."""
        done = jobs.run(ranks, self.arguments(flags, out), variables=self.visible(ranks if owners else 1))
        if done.returncode:
            raise JobError(jobs.error_of(done)["error"])
        alone = owners or ranks == 1
        said = "each rank has a device to itself" if alone else "ranks share devices"
        if said not in done.stdout + done.stderr:
            raise JobError(f"the run does not say that {said}")
        return Ended.of(out)

    def arguments(self, flags: str, out: Path) -> list[str]:
        common = f"--device {self.kind} --share-devices --microbatches 4 --seed 3"
        return ["-m", "mpiml.train", *common.split(), *flags.split(), "--out", str(out)]

    def visible(self, devices: int) -> dict[str, str]:
        """The variables by which a process sees so many devices."""
        if self.kind == "fake":
            from mpiml.devices.fake import DEVICES  # needs PyTorch

            return {DEVICES: ",".join(["fake"] * devices)}
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = given.split(",") if given else [str(number) for number in range(self.devices)]
        return {"CUDA_VISIBLE_DEVICES": ",".join(names[:devices])}


def small(model: str) -> str:
    """Flags of a run of a small model."""
    cnn, gpt = (gpu_models.cnn, gpu_models.images), (gpu_models.gpt, gpu_models.tokens)
    made, data = {"cnn": cnn, "gpt": gpt}[model]
    return f"--model {flag(made)} --data {flag(data)} --batch 64 --steps 8 --log-every 2 --eval-every 4 --save-every 0"


def longer(runs: Runs) -> str:
    """Flags of a run that is long enough to be killed."""
    steps, every = STEPS[runs.kind]
    return small("cnn") + f" --steps {steps} --save-every {every} --log-every {every} --eval-every 0"


def bits(runs: Runs) -> Iterator[Check]:
    """Small models on 1 rank, which updates on the device, and on ranks that share it and update on the host."""
    models = {"cnn": "cnn with batch norm and dropout", "gpt": "gpt"}
    for model, what in list(models.items())[: 1 if runs.short else None]:
        for ranks in (2,) if runs.short else (2, 4):
            text = f"{what}: {ranks} ranks that share the device / 1 that has it to itself"
            yield _compared("bits", text, runs, longer(runs) if runs.short else small(model), ranks)
    if runs.devices > 1 and not runs.short:
        yield _compared("bits", "gpt: 2 ranks with a device each / 1", runs, small("gpt"), 2, owners=True)


def _compared(part: str, text: str, runs: Runs, flags: str, ranks: int, owners: bool = False) -> Check:
    def check() -> Check:
        return same(part, text, runs.run(1, flags).differs(runs.run(ranks, flags, owners)))

    return _tried(part, text, check)


def pipe(runs: Runs) -> Iterator[Check]:
    """A model cut into two stages, on ranks that share the device."""
    flags = small("gpt")
    if runs.kind == "cuda":
        of_model = f"--model {flag(gpu_models.gpt2)} --data {flag(gpu_models.gpt2_tokens)} --lr 0.0001"
        flags = f"{of_model} --batch 8 --steps 8 --log-every 2 --eval-every 0 --save-every 0"
    text = "gpt, --pipe 2 on 2 ranks that share the device / 1 rank"

    def check() -> Check:
        whole, cut = runs.run(1, flags), runs.run(2, f"{flags} --pipe 2")
        row = same("pipe", text, whole.differs(cut))
        figures = {"samples_per_second": cut.speed, "samples_per_second_of_one_rank": whole.speed}
        value = row.value
        if runs.kind == "cuda":  # of a pretended device speed says nothing
            value += f"; {cut.speed:,.1f} samples/s, 1 rank {whole.speed:,.1f}"
        return Check("pipe", text, value, row.mark, row.reached, True, figures)

    yield _tried("pipe", text, check)


def resume(runs: Runs) -> Iterator[Check]:
    """A run whose ranks are killed after a checkpoint goes on with another number of ranks."""
    flags = longer(runs)
    for ranks in (1, 4) if runs.kind == "cuda" else (1,):
        text = f"cnn: killed on {KILLED} ranks, resumed on {ranks} / never stopped"

        def check(ranks: int = ranks, text: str = text) -> Check:
            never, out = runs.run(1, flags), Path(tempfile.mkdtemp(dir=runs.scratch))
            kill(runs, flags, out)
            return same("resume", text, never.differs(runs.train(ranks, f"{flags} --resume", out)))

        yield _tried("resume", text, check)


def kill(runs: Runs, flags: str, out: Path) -> None:
    """Start a run and kill its ranks when it has saved twice. Raises JobError if that does not come about."""
    variables = environment() | runs.visible(1)
    job = subprocess.Popen(
        jobs.command(KILLED, runs.arguments(flags, out)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=variables,
        cwd=runs.scratch,
    )
    try:
        saved, until = out / "checkpoints", time.monotonic() + LIMIT
        while len(list(saved.glob("*.safetensors"))) < 2 and job.poll() is None and time.monotonic() < until:
            time.sleep(PAUSE)
        ranks = [process for process in below(job.pid) if str(out) in _read(process, "cmdline")]
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        job.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise JobError(f"{LIMIT:g} s after its ranks were killed, mpirun is still there") from None
    finally:
        job.kill()
    status = json.loads((out / "result.json").read_text())["status"]
    if status == "done" or not ranks:
        raise JobError(f"it was to be killed after 2 checkpoints, but is {status}; {plural(len(ranks), 'rank')} killed")


def below(process: int) -> list[int]:
    """The processes that a process has started, and those that these have."""
    parents: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (stat := _read(int(entry.name), "stat")):
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found, todo = list[int](), [process]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


def _read(process: int, file: str) -> str:
    """A file in /proc of a process that may be gone: then empty."""
    with contextlib.suppress(OSError):
        return Path("/proc", str(process), file).read_text(errors="replace")
    return ""


def _tried(part: str, text: str, check: Callable[[], Check]) -> Check:
    """A row, which says so if a job of it has failed."""
    try:
        return check()
    except JobError as error:
        return failed(part, text, str(error))
    except subprocess.TimeoutExpired as error:
        return failed(part, text, f"a job has not ended after {error.timeout:g} s")
    except (OSError, ValueError, KeyError) as error:  # of files that a run should have left
        return failed(part, text, f"{type(error).__name__}: {error}")
