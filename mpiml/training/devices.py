"""The device of each rank of a run: chosen alike on all ranks, or refused."""

from __future__ import annotations

import os

from mpiml.config import Config
from mpiml.devices import choice
from mpiml.devices.host import HOST, Host
from mpiml.parallel.grid import Grid


def chosen(config: Config, grid: Grid) -> Host:
    """The device of this rank; collective. Raises ConfigError, on all ranks alike, if the ranks have none to use."""
    if choice.is_host(config.device):
        return HOST
    team, node = grid.team, grid.node
    with team.clock.doing("model"):  # which loads libraries
        everyone = team.allgather(choice.candidate(config.device, os.uname().nodename, node.rank, node.size))
        team.together(lambda: choice.check(config.device, everyone, config.share_devices))
        return team.together(lambda: choice.opened(config.device, everyone, team.rank, config.tf32))


def remarks(config: Config, device: Host, ranks: int) -> list[str]:
    """What a person should know of it."""
    if not device.there:
        return []
    used = f"each rank computes on a {device.name} of its own" if device.alone else f"ranks share {device.name}"
    early = f"; --bucket {config.bucket:g} does nothing here: gradients leave a device when all are there"
    return [f"{ranks} ranks: {used}" + early * (config.bucket > 0)]
