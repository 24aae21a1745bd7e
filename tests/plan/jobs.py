"""Jobs to plan, and their data."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.plan.activations import RowBytes
from mpiml.training.job import Job, job_of

NOTHING = RowBytes(0, 0)  # kept of a row
HIDDEN = (3000, 9)  # parameters of a few blocks, so that slices differ


def arrays(rows: int, features: int = 8, classes: int = 4) -> Dataset:
    x, y = np.ones((rows, features), np.float32), np.arange(rows) % classes
    return Dataset.from_arrays(x, y, x, y)


def job(ranks: int, node_ranks: int = 0, rows: int = 120, **settings: Any) -> Job:
    chosen = {"hidden": HIDDEN, "batch": 40} | settings
    return job_of(Config(**chosen), ranks, node_ranks or ranks, arrays(rows))
