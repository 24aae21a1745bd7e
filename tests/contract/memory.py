"""A training script that tells how much memory a rank's data took and which rows it read: `python memory.py FLAGS`."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from mpiml.config import parse
from mpiml.data.dataset import Dataset, Split, open_dataset
from mpiml.data.sources import Source
from mpiml.train import train


class Counted:
    """A source that notes which rows are read."""

    def __init__(self, source: Source):
        self.source = source
        self.name, self.shape, self.dtype = source.name, source.shape, source.dtype
        self.read = np.zeros(len(source), bool)

    def __len__(self) -> int:
        return len(self.source)

    def hold(self, rows: Any) -> None:
        self.source.hold(rows)

    def rows(self, indices: Any) -> Any:
        self.read[indices] = True
        return self.source.rows(indices)


def resident(field: str) -> int:
    """Bytes of this process that are in memory: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


config = parse(sys.argv[1:])
opened = open_dataset(config.data)
x, y = Counted(opened.train.x), Counted(opened.train.y)
Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
before = resident("VmRSS")
train(config, data=Dataset(Split(x, y), opened.test, opened.name, opened.files))
mine = {"grown": resident("VmHWM") - before, "x": int(x.read.sum()), "y": int(y.read.sum()), "rows": len(x)}
everyone, together = MPI.COMM_WORLD.gather(mine), MPI.COMM_WORLD.reduce(x.read.astype(np.int8))
if everyone:
    print(json.dumps({"ranks": everyone, "once": bool((together == 1).all())}))
