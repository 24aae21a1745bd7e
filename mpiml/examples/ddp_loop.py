"""A DistributedDataParallel script with mpiml.torch in its place: `mpirun -n 4 python -m mpiml.examples.ddp_loop`."""

import hashlib

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import mpiml.torch
from mpiml.data.dataset import DIGITS


def main(epochs: int = 3) -> None:
    rank, size = mpiml.torch.rank(), mpiml.torch.size()
    with np.load(DIGITS) as digits:
        x, y = torch.from_numpy(digits["x_train"].astype("float32")), torch.from_numpy(digits["y_train"].astype(int))
    torch.manual_seed(0)
    data = TensorDataset(x, y)
    sampler = DistributedSampler(data, num_replicas=size, rank=rank)
    loader = DataLoader(data, batch_size=128 // size, sampler=sampler)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    net = mpiml.torch.DataParallel(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
    weights = b"".join(tensor.numpy().tobytes() for tensor in net.state_dict().values())
    if rank == 0:
        print(f"loss {loss.item()!r}")
        print("weights_sha256", hashlib.sha256(weights).hexdigest())


if __name__ == "__main__":
    main()
