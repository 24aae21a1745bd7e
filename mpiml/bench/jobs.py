"""Measuring a row of the benchmark: in jobs of its own, each started by mpirun."""

from __future__ import annotations

import compileall
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
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
    """Time of a job over that of the least that any MPI job in Python does. It trains for one step ("train"), imports
    the trainer ("import"), or imports as many empty modules and what the trainer needs of Python and NumPy ("empty").
    All files are compiled before."""
    least = "import numpy, mpi4py.MPI as M; M.COMM_WORLD.Allreduce(M.IN_PLACE, numpy.zeros(1))"
    compileall.compile_dir(Path(mpiml.__file__).parent, quiet=1)
    with tempfile.TemporaryDirectory() as directory:
        other = {
            "train": ["-m", "mpiml.train", "--steps", "1"],
            "import": ["-c", f"import mpiml.train; {least}"],
            "empty": ["-c", f"{_empty(Path(directory))}; {least}"],
        }[what]
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


def _empty(directory: Path) -> str:
    """Make an empty module in a directory for each of the package's that the trainer loads. Returns the statements that
    import them, and all else that it loads."""
    code = "import sys, mpiml.train; print(*(name for name in sys.modules if '__' not in name))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    own = [f"empty{number}" for number, name in enumerate(loaded) if name.split(".")[0] == "mpiml"]
    others = [name for name in loaded if name.split(".")[0] in {*sys.stdlib_module_names, "numpy"}]
    for name in own:
        (directory / f"{name}.py").touch()
    compileall.compile_dir(directory, quiet=1)
    return f"import sys; sys.path.insert(0, {str(directory)!r}); import {', '.join([*others, *own])}"


def error_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return {"error": f"exit code {done.returncode}: {fault_line(done.stderr, *FAULT)}"}


def run(
    ranks: int,
    arguments: Sequence[str],
    nodes: str = "",
    avx512: bool = True,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.CompletedProcess[str]:
    """A job of Python on some ranks, in a temporary directory; `nodes` as in MPIML_NODES; `variables` are put into its
    environment."""
    env = environment() | ({"MPIML_NODES": nodes} if nodes else {}) | ({} if avx512 else AVX2) | dict(variables)
    with tempfile.TemporaryDirectory() as directory:
        return subprocess.run(
            command(ranks, arguments),
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=env,
            timeout=600,
            cwd=directory,
        )


def command(ranks: int, arguments: Sequence[str]) -> list[str]:
    """The command of a job of Python on some ranks."""
    return [mpirun(), "-n", str(ranks), sys.executable, *arguments]
