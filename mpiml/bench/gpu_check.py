"""`python -m mpiml.bench.gpu_check`: what needs a real GPU to be looked at, in some minutes, as a table and as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from mpiml.bench import gpu_runs, jobs
from mpiml.bench.gpu_rows import Check, failed, table
from mpiml.bench.gpu_runs import Runs
from mpiml.command import Parser, run_command
from mpiml.devices import choice
from mpiml.errors import ConfigError, OutputError
from mpiml.run.environment import cpu_model

PRECISIONS = ("float32", "--tf32", "--autocast bfloat16")


def gradients(runs: Runs) -> Iterator[Check]:
    """Gradients beside plain PyTorch's."""
    return job(runs, "gradients")


def speed(runs: Runs) -> Iterator[Check]:
    """Samples/s beside plain PyTorch's. On a GPU each precision has a job, and so all of the memory, to itself."""
    for precisions in [[one] for one in PRECISIONS] if runs.kind == "cuda" else [PRECISIONS]:
        yield from job(runs, "speed", *precisions)


def transfers(runs: Runs) -> Iterator[Check]:
    """Rates of copies beside PyTorch's."""
    return job(runs, "transfers")


PARTS: dict[str, Callable[[Runs], Iterator[Check]]] = {
    "bits": gpu_runs.bits,
    "gradients": gradients,
    "speed": speed,
    "transfers": transfers,
    "pipe": gpu_runs.pipe,
    "resume": gpu_runs.resume,
}


def job(runs: Runs, part: str, *arguments: str) -> Iterator[Check]:
    """The rows of a part that a job of one rank makes."""
    text = " ".join([part, *arguments])
    try:
        done = jobs.run(1, ["-m", "mpiml.bench.gpu_job", part, runs.kind, *arguments], variables=runs.visible(1))
    except subprocess.TimeoutExpired as error:
        yield failed(part, text, f"the job has not ended after {error.timeout:g} s")
        return
    if done.returncode:
        yield failed(part, text, jobs.error_of(done)["error"])
    else:
        yield from (Check(**row) for row in json.loads(done.stdout.strip().splitlines()[-1]))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 1 if a row of correctness fails or a job of the check does; marks of speed do not count."""
    return run_command("mpiml.bench.gpu_check", lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m mpiml.bench.gpu_check",
        description="Check runs on a GPU: the same bits on all layouts, gradients and speed beside plain PyTorch, "
        "transfers, a pipeline, a run that is killed and resumed.",
        allow_abbrev=False,
    )
    kinds = ("cuda", "fake")
    parser.add_argument("--device", choices=kinds, default="cuda", help="fake: a pretended one (default: cuda)")
    parser.add_argument("--only", metavar="PART,PART", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--short", action="store_true", help="make few runs, for a test of the check itself")
    parser.add_argument("--json", metavar="FILE", help="write all rows to this file")
    chosen = parser.parse_args(arguments)
    parts = [part for part in PARTS if part in chosen.only.split(",")]
    if unknown := [part for part in chosen.only.split(",") if part not in PARTS]:
        raise ConfigError(f"--only {chosen.only}: there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if chosen.json and not os.access(Path(chosen.json).resolve().parent, os.W_OK):
        raise OutputError(f"--json {chosen.json}: its directory is not there, or cannot be written to")
    machine, began = about(chosen.device), time.monotonic()
    print("; ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    checks: list[Check] = []
    with tempfile.TemporaryDirectory() as scratch:
        runs = Runs(chosen.device, int(machine["devices"]), Path(scratch), chosen.short)
        for part in parts:
            print(f"\n{part}")
            for check in PARTS[part](runs):
                checks.append(check)
                print(f"  {check.text}\n      {check.value}  {check.mark} {check.verdict}".rstrip(), flush=True)
    minutes = (time.monotonic() - began) / 60
    print(f"\n{minutes:.1f} minutes; as Markdown:\n\n{table(checks)}", end="")
    if chosen.json:
        rows = [asdict(check) | {"verdict": check.verdict} for check in checks]
        text = json.dumps({**machine, "minutes": round(minutes, 2), "rows": rows}, indent=2)
        Path(chosen.json).write_text(text + "\n")
    return int(any(check.correctness and not check.reached for check in checks))


def about(kind: str) -> dict[str, str]:
    """The device, and what drives it. Raises ConfigError if there is none."""
    everyone = [choice.candidate(kind, [0], 0)]
    choice.check(kind, everyone, False)
    import torch

    driver = Path("/proc/driver/nvidia/version")
    first = driver.read_text().splitlines()[0] if kind == "cuda" and driver.exists() else ""
    version = first.partition(":")[2] or "none"
    return {
        "device": everyone[0].name,
        "devices": str(torch.cuda.device_count() if kind == "cuda" else 2),
        "PyTorch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "driver": " ".join(version.split()),
        "processor": f"{os.cpu_count()} cores, {cpu_model()}",
    }


if __name__ == "__main__":
    sys.exit(main())
