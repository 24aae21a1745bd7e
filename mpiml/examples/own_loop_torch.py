"""A PyTorch loop of one's own, with the same weights on any number of ranks:
`mpirun -n 4 python -m mpiml.examples.own_loop_torch`."""

import hashlib

import numpy as np
import torch
from torch import nn

from mpiml.api import Rows, guard
from mpiml.data.dataset import DIGITS
from mpiml.torch import DataParallel, rank


def main(epochs: int = 3) -> None:
    with np.load(DIGITS) as digits:
        x, y = torch.from_numpy(digits["x_train"].astype("float32")), torch.from_numpy(digits["y_train"].astype(int))
    torch.manual_seed(0)
    net = DataParallel(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Dropout(0.1), nn.ReLU(),
                                     nn.Linear(32, 10)))  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    rows = Rows(len(x), batch=128, microbatches=8, seed=1)
    loss = 0.0
    for step in net.steps(rows, last=epochs * rows.steps_per_epoch):
        for m in step:
            net.backward(nn.functional.cross_entropy(net(x[m.rows]), y[m.rows]), m)
        loss = net.step(optimizer)
    if rank() == 0:
        weights = b"".join(tensor.numpy().tobytes() for tensor in net.state_dict().values())
        print(f"loss {loss!r}")
        print("weights_sha256", hashlib.sha256(weights).hexdigest())


if __name__ == "__main__":
    with guard():
        main()
