"""Models of PyTorch modules for plans, and a program that prints what runs allocate on pretended devices."""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any


def perceptron(shape: tuple[int, ...], outputs: int) -> list[Any]:
    """Modules that keep constants and running averages, too."""
    from torch import nn

    inputs, normal = nn.Linear(math.prod(shape), 300), nn.Sequential(nn.Linear(300, 20), nn.BatchNorm1d(20))
    inputs.bias.requires_grad_(False)
    return [nn.Sequential(nn.Flatten(), inputs, nn.ReLU()), normal, nn.Linear(20, outputs)]


def main() -> None:
    """Train with each of the lists of flags in the command line, which may begin with variables of the environment.
    Prints for each the bytes that each rank's device has given to vectors."""
    from mpi4py import MPI

    from mpiml import train
    from mpiml.devices import fake

    made: list[Any] = []

    class Noted(fake.Fake):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    fake.Fake = Noted  # type: ignore[misc]
    for flags in json.loads(sys.argv[1]):
        os.environ.update(flag.split("=") for flag in flags if "=" in flag)
        if train.main([flag for flag in flags if "=" not in flag]):
            break
        every = MPI.COMM_WORLD.gather(made[-1]._used)
        if every:
            print("USED", json.dumps(every), flush=True)


if __name__ == "__main__":
    main()
