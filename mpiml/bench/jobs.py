"""Measuring a row of the benchmark: in jobs of its own, each started by mpirun."""

from __future__ import annotations

import compileall
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mpiml
from mpiml.bench.rows import Ratio, Row
from mpiml.command import fault_line
from mpiml.run.launcher import FAULT, environment, mpirun

# OpenBLAS, oneDNN and PyTorch take no instructions beyond AVX2.
AVX2 = {"OPENBLAS_CORETYPE": "Haswell", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


def measure_row(row: Row) -> dict[str, Any]:
    """Measure a row: a dictionary with median, low and high, or with an error."""
    if row.needs:
        return {"error": f"needs {row.needs}"}
    if row.call[0] == "start":
        return measure_start(row.ranks, row.call[1])
    results = [measure_once(row) for _ in range(row.jobs)]
    failed = next((result for result in results if "error" in result), None)
    if failed or row.jobs == 1:
        return failed or results[0]
    return asdict(Ratio.of([result["median"] for result in results]))


def measure_once(row: Row) -> dict[str, Any]:
    """The result of one job of a row."""
    done = run(row.sides * row.ranks, ["-m", "mpiml.bench.measurements", *row.call], row.nodes, row.avx512)
    if done.returncode:
        return error_of(done)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def measure_start(ranks: int, what: str, pairs: int = 5) -> dict[str, Any]:
    """Time of a job that trains for one step, or only imports the trainer, over that of the least that any MPI job in
    Python does. All files are compiled before."""
    compileall.compile_dir(Path(mpiml.__file__).parent, quiet=1)
    least = "import numpy, mpi4py.MPI as M; M.COMM_WORLD.Allreduce(M.IN_PLACE, numpy.zeros(1))"
    other = ["-m", "mpiml.train", "--steps", "1"] if what == "train" else ["-c", f"import mpiml.train; {least}"]
    ratios = []
    for pair in range(pairs + 1):
        spent = []
        for arguments in (other, ["-c", least]):
            began = time.perf_counter()
            done = run(ranks, arguments)
            spent.append(time.perf_counter() - began)
            if done.returncode:
                return error_of(done)
        if pair:
            ratios.append(spent[0] / spent[1])
    return asdict(Ratio.of(ratios))


def error_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return {"error": f"exit code {done.returncode}: {fault_line(done.stderr, *FAULT)}"}


def run(ranks: int, arguments: Sequence[str], nodes: str = "", avx512: bool = True) -> subprocess.CompletedProcess[str]:
    """A job of Python on some ranks, in a temporary directory; `nodes` as in MPIML_NODES."""
    env = environment() | ({"MPIML_NODES": nodes} if nodes else {}) | ({} if avx512 else AVX2)
    with tempfile.TemporaryDirectory() as directory:
        command = [mpirun(), "-n", str(ranks), sys.executable, *arguments]
        return subprocess.run(command, check=False, capture_output=True, text=True, env=env, timeout=600, cwd=directory)
