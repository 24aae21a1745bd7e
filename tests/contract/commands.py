"""A script that runs several commands of mpiml.train in one MPI job, one after the other: `python commands.py FILE`.

FILE is JSON: each command's environment and its arguments. What all ranks print during command N goes to FILE.N.out and
FILE.N.err, and the exit codes of all ranks to FILE.N.codes. Each command is the real one but for the start and the end
of Python and MPI. With HALVE=1 in its environment nodes exchange by halving, and it fails where they cannot.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as mpiml.train does before NumPy is loaded

from mpi4py import MPI

from mpiml.parallel import halving
from mpiml.train import main


def always(nodes: Sequence[int], microbatches: int, *_: Any) -> bool:
    """That halving is faster."""
    assert halving.fits(nodes, microbatches), f"{nodes} nodes cannot halve the sum of {microbatches}"
    return True


comm, file, usual = MPI.COMM_WORLD, sys.argv[1], halving.faster
for number, (environment, arguments) in enumerate(json.loads(Path(file).read_text())):
    for stream, kind in ((sys.stdout, "out"), (sys.stderr, "err")):
        stream.flush()
        printed = os.open(f"{file}.{number}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(printed, stream.fileno())
        os.close(printed)
    os.environ.update(environment)
    halving.faster = always if "HALVE" in environment else usual
    codes = comm.gather(main(arguments))
    for name in environment:
        del os.environ[name]
    if codes:
        Path(f"{file}.{number}.codes").write_text(json.dumps(codes))
