"""A NumPy loop of your own with the parts of mpiml, with the same weights on any number of ranks: softmax regression.
`mpirun -n 4 python -m mpiml.examples.own_loop_numpy`."""

import hashlib
import sys
from typing import Any

import numpy as np
from mpi4py import MPI

from mpiml.api import Array, Rows, Sum, guard
from mpiml.data.dataset import DIGITS


def loss_and_gradient(w: Array, x: Array, y: Any) -> dict[str, Any]:
    """The mean cross-entropy of softmax(x w) over the rows, and its gradient."""
    p = np.exp(x @ w)
    p /= p.sum(axis=1, keepdims=True)
    loss = -np.log(p[np.arange(len(y)), y]).mean()
    return {"loss": float(loss), "w": x.T @ (p - np.eye(w.shape[1], dtype=w.dtype)[y]) / w.dtype.type(len(y))}


with guard() as job, np.load(DIGITS) as digits:
    x, y = digits["x_train"].reshape(-1, 64).astype(np.float32), digits["y_train"]
    w = np.zeros((64, 10), np.float32)
    data = Rows(len(x), batch=128, microbatches=8, seed=1)
    with Sum(like={"loss": 0.0, "w": w}, microbatches=8) as total:
        for step in range(1, 20 * data.steps_per_epoch + 1):
            for m, rows in data.mine(step):
                total.put(m, loss_and_gradient(w, x[rows], y[rows]), weight=len(rows))
            mean = total.mean()
            w -= 0.5 * mean["w"]
            if job.stop:
                break
    if MPI.COMM_WORLD.rank == 0:
        print(f"step {step}: loss {mean['loss']:.3f}")
        print("weights_sha256", hashlib.sha256(w.tobytes()).hexdigest())
sys.exit(job.exit_code)
