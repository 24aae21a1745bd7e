"""mpiml trains a model on MPI ranks: data-parallel, layer-split or both, with the same bits on every layout."""

import os
import sys

__version__ = "0.1.0"

_processes = sys.modules.get("multiprocessing.process")
_is_worker = _processes and getattr(_processes.current_process(), "_inheriting", False)
if _is_worker and {"PMI_RANK", "PMIX_RANK"} & os.environ.keys():
    # A rank has started this process by "spawn" or "forkserver", as a DataLoader's worker, and it imports what the
    # rank's program does. It is no rank: mpi4py must not start MPI, with variables that are the rank's.
    os.environ["MPI4PY_RC_INITIALIZE"] = "0"
