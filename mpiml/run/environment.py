"""environment.json: the hosts, processors, libraries and versions of a run; no MPI."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mpiml
from mpiml.errors import OutputError
from mpiml.run.directory import ENVIRONMENT, read_fields
from mpiml.run.process import thread_pools

HISTORY = 50  # changes of the environment that are kept
PACKAGES = ("numpy", "mpi4py", "threadpoolctl", "safetensors")
KINDS = {  # the types of the fields that are read back
    "data": list[list[str]],
    "ranks": list[dict[str, Any]],
    "packages": dict[str, str | None],
    "earlier": list[dict[str, Any]],
    "jobs": list[dict[str, Any]],
}


def of_rank(threads: int, device: str = "") -> dict[str, Any]:
    """The environment of this rank, which computes on a `device` of that type, or on the processor."""
    return {
        "host": os.uname().nodename,
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "device": device or "the processor",
        "blas": blas(),
        "pid": os.getpid(),
    }


def of_job(
    ranks: list[dict[str, Any]], mpi: str, data: list[list[str]], look: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The content of environment.json, but `earlier` and `jobs`, from `of_rank` of all ranks, the name of the MPI
    library, the data set's fingerprint, and what a look at all of its rows has shown."""
    system = os.uname()
    return {
        "mpiml": mpiml.__version__,
        "python": sys.version.split()[0],
        "platform": f"{system.sysname} {system.release} {system.machine}",
        "mpi": mpi,
        "blas": blas(),
        "packages": {name: _version(name) for name in PACKAGES},
        "data": data,
        "look": look,
        "ranks": ranks,
    }


def read(run: Path) -> dict[str, Any]:
    """The content of environment.json in a run directory; empty if there is none. Raises OutputError if damaged."""
    return read_fields(run / ENVIRONMENT, KINDS, ())


def data(run: Path) -> list[list[str]] | None:
    """The fingerprint of the data of the run in a directory, or None if unknown. Raises OutputError as `read`."""
    return read(run).get("data")


def look(run: Path) -> Any:
    """What a look at the run's data has shown, of any type, or None. Raises OutputError as `read`."""
    return read(run).get("look")


def host(run: Path, rank: int) -> str:
    """The host of a rank of the job in a run directory, by its environment.json; "unknown" without one."""
    try:
        return str(read(run)["ranks"][rank]["host"])
    except (OutputError, LookupError):
        return "unknown"


def essentials(job: Mapping[str, Any]) -> dict[str, str]:
    """What bits may depend on, from the content of an environment.json that any version of mpiml wrote."""
    ranks = job.get("ranks", ())
    texts = {
        "processor": "; ".join(sorted({str(rank["cpu"]) for rank in ranks if "cpu" in rank})),
        "device": "; ".join(sorted({str(rank["device"]) for rank in ranks if "device" in rank})),
        "BLAS": "; ".join(sorted({str(rank["blas"]) for rank in ranks if "blas" in rank})),
        "NumPy": job.get("packages", {}).get("numpy"),
        "Python": job.get("python"),
        "MPI": job.get("mpi"),
        "mpiml": job.get("mpiml"),
    }
    return {name: str(text) for name, text in texts.items() if text}


def going_on(before: Mapping[str, Any], job: Mapping[str, Any], step: int) -> tuple[dict[str, Any], list[str]]:
    """The content of environment.json for a job that resumes a run after `step`, and a warning if bits may now differ.

    `before` is the content that the last job wrote. Under `earlier` stands, in the order of the jobs, what differed in
    each job before, with the step `until` which it was so.
    """
    old, new = essentials(before), essentials(job)
    other = {name: text for name, text in old.items() if text != new.get(name, text)}
    kept = [*before.get("earlier", ()), *([{"until": step, **other}] if other else [])]
    changes = ", ".join(f"{name} is {new[name]} (was {text})" for name, text in other.items())
    warning = f"since the last job {changes}: bits may differ from those of a run that never stopped"
    return {**job, "earlier": kept[-HISTORY:]}, [warning] if other else []


def warnings(ranks: list[dict[str, Any]]) -> list[str]:
    """Warnings about ranks on different processors or BLAS libraries."""
    texts = []
    for key, what in (("cpu", "processors"), ("blas", "BLAS libraries or kernels")):
        kinds = sorted({rank[key] for rank in ranks})
        if len(kinds) > 1:
            texts.append(f"ranks run on different {what} ({'; '.join(kinds)}): bits may differ from another run's")
    return texts


def cpu_model() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return os.uname().machine


def blas() -> str:
    """The BLAS library of NumPy, its version and the kernels that it has chosen: bits depend on all three."""
    libraries = (library for library in thread_pools().info() if library["user_api"] == "blas")
    names = [f"{lib['internal_api']} {lib['version']} ({lib.get('architecture', '')})" for lib in libraries]
    return ", ".join(names) or "unknown"


def _version(name: str) -> str | None:
    """A package's __version__: importlib.metadata takes longer than a small job's first step."""
    version: str | None = None
    with contextlib.suppress(ModuleNotFoundError):
        version = getattr(importlib.import_module(name), "__version__", None)
    return version
