"""A JAX loop of your own with the parts of mpiml, with the same weights on any number of ranks:
`mpirun -n 4 python -m mpiml.examples.own_loop_jax`."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from mpi4py import MPI

from mpiml.api import Rows, Sum, guard
from mpiml.data.dataset import DIGITS


@jax.jit
@jax.value_and_grad
def loss_and_gradient(w, x, y):
    """The mean cross-entropy over the rows."""
    scores = jax.nn.relu(x @ w["in"] + w["bias"]) @ w["out"]
    return -jnp.take_along_axis(jax.nn.log_softmax(scores), y[:, None], 1).mean()


with guard(), np.load(DIGITS) as digits:
    x, y = digits["x_train"].reshape(-1, 64).astype(np.float32), digits["y_train"].astype(np.int32)
    normal, zeros = np.random.default_rng(0).standard_normal, np.zeros(32, np.float32)
    w = {"in": 0.1 * normal((64, 32), np.float32), "bias": zeros, "out": 0.1 * normal((32, 10), np.float32)}
    data = Rows(len(x), batch=128, microbatches=8, seed=1)
    with Sum(like=(0.0, w), microbatches=8) as total:
        for step in range(1, 20 * data.steps_per_epoch + 1):
            for m, rows in data.mine(step):
                total.put(m, loss_and_gradient(w, x[rows], y[rows]), weight=len(rows))
            mean_loss, gradient = total.mean()
            w = jax.tree.map(lambda value, g: value - 0.5 * g, w, gradient)
    if MPI.COMM_WORLD.rank == 0:
        print(f"step {step}: loss {mean_loss:.3f}")
        print("weights_sha256", hashlib.sha256(b"".join(np.asarray(w[name]).tobytes() for name in w)).hexdigest())
