"""A script that runs several commands of mpiml.train in one MPI job, one after the other: `python commands.py FILE`.

FILE is JSON: each command's environment and its arguments. What all ranks print during command N goes to FILE.N.out and
FILE.N.err, and the exit codes of all ranks to FILE.N.codes. Each command is the real one but for the start and the end
of Python and MPI.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as mpiml.train does before NumPy is loaded

from mpi4py import MPI

from mpiml.train import main

comm, file = MPI.COMM_WORLD, sys.argv[1]
for number, (environment, arguments) in enumerate(json.loads(Path(file).read_text())):
    for stream, kind in ((sys.stdout, "out"), (sys.stderr, "err")):
        stream.flush()
        printed = os.open(f"{file}.{number}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(printed, stream.fileno())
        os.close(printed)
    os.environ.update(environment)
    codes = comm.gather(main(arguments))
    for name in environment:
        del os.environ[name]
    if codes:
        Path(f"{file}.{number}.codes").write_text(json.dumps(codes))
