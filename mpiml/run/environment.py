"""Where a run takes place: hosts, processors, libraries, versions."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from mpi4py import MPI

import mpiml
from mpiml import documents
from mpiml.errors import OutputError
from mpiml.run.directory import ENVIRONMENT, read_fields
from mpiml.run.process import thread_pools

PACKAGES = ("numpy", "mpi4py", "threadpoolctl", "safetensors")


def of_rank(threads: int) -> dict[str, Any]:
    """What this rank runs on."""
    return {
        "host": os.uname().nodename,
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "blas": blas(),
        "pid": os.getpid(),
    }


def to_json(ranks: list[dict[str, Any]], data: list[list[str]]) -> str:
    """The content of environment.json, from what each rank runs on and the data set's fingerprint."""
    system = os.uname()
    job = {
        "mpiml": mpiml.__version__,
        "python": sys.version.split()[0],
        "platform": f"{system.sysname} {system.release} {system.machine}",
        "mpi": mpi_library(),
        "blas": blas(),
        "packages": {name: _version(name) for name in PACKAGES},
        "data": data,
        "ranks": ranks,
    }
    return documents.to_json(job, indent=2) + "\n"


def data(run: Path) -> list[list[str]] | None:
    """The fingerprint of the data of the run in a directory, if it is known. Raises OutputError for a damaged file."""
    return read_fields(run / ENVIRONMENT, {"data": list[list[str]]}, ()).get("data")


def host(run: Path, rank: int) -> str:
    """Where a rank of the job that holds a run directory is, as its environment.json says."""
    try:
        ranks = read_fields(run / ENVIRONMENT, {"ranks": list[dict[str, Any]]}, ("ranks",)).get("ranks", ())
        return str(ranks[rank]["host"])
    except (OutputError, LookupError):
        return "unknown"


def warnings(ranks: list[dict[str, Any]]) -> list[str]:
    """What in the environment may surprise."""
    found = []
    for key, what in (("cpu", "processors"), ("blas", "BLAS libraries or kernels")):
        kinds = sorted({rank[key] for rank in ranks})
        if len(kinds) > 1:
            found.append(f"ranks run on different {what} ({'; '.join(kinds)}): bits may differ from another run's")
    return found


def mpi_library() -> str:
    """The MPI library and its version: "MPICH 5.0.2", "Open MPI v5.0.11"."""
    first = MPI.Get_library_version().splitlines()[0].strip("\x00 ").split(",")[0]
    return " ".join(word for word in first.split() if word != "Version:")


def cpu_model() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return os.uname().machine


def blas() -> str:
    """The BLAS library that NumPy uses, with its version and the kernels it has chosen: bits depend on them."""
    found = (library for library in thread_pools().info() if library["user_api"] == "blas")
    names = [f"{lib['internal_api']} {lib['version']} ({lib.get('architecture', '')})" for lib in found]
    return ", ".join(names) or "unknown"


def _version(name: str) -> str | None:
    """The version that a package gives itself: to ask importlib.metadata takes longer than a small job's first step."""
    try:
        version: str | None = getattr(importlib.import_module(name), "__version__", None)
    except ModuleNotFoundError:
        return None
    return version
