"""A script as in PyTorch's tutorials on DistributedDataParallel: `python tutorial.py PROCESSES EPOCHS SNAPSHOT`."""

import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset


class Trainer:
    def __init__(self, model: nn.Module, data: DataLoader, optimizer: torch.optim.Optimizer, rank: int, snapshot: str):
        self.data, self.optimizer, self.rank, self.snapshot, self.first = data, optimizer, rank, snapshot, 0
        if os.path.exists(snapshot):
            saved = torch.load(snapshot)
            model.load_state_dict(saved["model"])
            self.first = saved["epochs"]
        self.model = DDP(model)

    def run_batch(self, source: torch.Tensor, targets: torch.Tensor) -> float:
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.model(source), targets)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def run_epoch(self, epoch: int) -> None:
        self.data.sampler.set_epoch(epoch)
        losses = [self.run_batch(source, targets) for source, targets in self.data]
        if self.rank == 0:
            print(f"epoch {epoch} losses", *losses)

    def train(self, epochs: int) -> None:
        for epoch in range(self.first, epochs):
            self.run_epoch(epoch)
            if self.rank == 0:
                torch.save({"model": self.model.module.state_dict(), "epochs": epoch + 1}, self.snapshot)


def load_train_objs() -> tuple[Dataset, nn.Module, torch.optim.Optimizer]:
    draw = torch.Generator().manual_seed(0)
    dataset = TensorDataset(torch.randn(256, 20, generator=draw), torch.randn(256, 1, generator=draw))
    model = nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 1))
    return dataset, model, torch.optim.SGD(model.parameters(), lr=0.1)


def prepare_dataloader(dataset: Dataset, batch: int, rank: int, world_size: int) -> DataLoader:
    return DataLoader(dataset, batch, sampler=DistributedSampler(dataset, num_replicas=world_size, rank=rank))


def main(rank: int, world_size: int, epochs: int, snapshot: str, batch: int = 32) -> None:
    dist.init_process_group("gloo", init_method=f"file://{snapshot}.ranks", rank=rank, world_size=world_size)
    torch.manual_seed(rank)
    dataset, model, optimizer = load_train_objs()
    trainer = Trainer(model, prepare_dataloader(dataset, batch, rank, world_size), optimizer, rank, snapshot)
    trainer.train(epochs)
    dist.destroy_process_group()


if __name__ == "__main__":
    world_size, epochs, snapshot = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    mp.spawn(main, args=(world_size, epochs, snapshot), nprocs=world_size)
