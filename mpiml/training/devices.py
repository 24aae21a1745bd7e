"""The device of each rank of a run: chosen alike on all ranks, or refused."""

from __future__ import annotations

import os

from mpiml.config import Config
from mpiml.devices import choice
from mpiml.devices.host import HOST, Host
from mpiml.parallel.grid import Grid
from mpiml.team import broadcast


def chosen(config: Config, grid: Grid) -> Host:
    """The device of this rank; collective. Raises ConfigError, on all ranks alike, if the ranks have none to use."""
    if choice.is_host(config.device):
        return HOST
    team, node = grid.team, grid.node
    with team.clock.doing("model"):  # which loads libraries
        host, first = os.uname().nodename, broadcast(node, team.rank)
        everyone = team.allgather(choice.candidate(config.device, host, f"{host} {first}", node.rank, node.size))
        team.together(lambda: choice.check(config.device, everyone, config.share_devices))
        return team.together(lambda: choice.opened(config.device, everyone, team.rank, config.tf32))


def remarks(config: Config, device: Host) -> list[str]:
    """What a person should know of it."""
    if not device.there:
        unused = choice.unused() if config.device == "auto" else 0
        return [f"{unused} GPUs here are not used; with --device cuda they are"] if unused else []
    used = (
        f"each rank has a device to itself, {device.name}"
        if device.alone
        else f"ranks share devices, {device.name}: each has a copy of the model there"
    )
    early = f"; --bucket {config.bucket:g} does nothing here: gradients leave a device when all are there"
    return [used + early * (config.bucket > 0)]
