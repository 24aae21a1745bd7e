"""The device of each rank of a run: chosen alike on all ranks, or refused."""

from __future__ import annotations

from mpiml.config import Config
from mpiml.devices import choice
from mpiml.devices.host import HOST, Host
from mpiml.parallel.grid import Grid, nodes_of_ranks


def chosen(config: Config, grid: Grid) -> Host:
    """The device of this rank; collective. Raises ConfigError, on all ranks alike, if the ranks have none to use."""
    if choice.is_host(config.device):
        return HOST
    team = grid.team
    with team.clock.doing("model"):  # which loads libraries
        homes = nodes_of_ranks(team.comm)
        everyone = team.allgather(choice.candidate(config.device, homes, team.rank))
        team.together(lambda: choice.check(config.device, everyone, config.share_devices))
        return team.together(lambda: choice.opened(config.device, everyone, team.rank, config.tf32))


def remarks(config: Config, device: Host) -> list[str]:
    """What a person should know of it."""
    if not device.there:
        unused = choice.unused() if config.device == "auto" else 0
        return [f"GPUs here that are not used: {unused}; --device cuda would"] if unused else []
    used = (
        f"each rank has a device to itself, {device.name}"
        if device.alone
        else f"ranks share devices, {device.name}: each has a copy of the model there"
    )
    early = f"; --bucket {config.bucket:g} does nothing here: gradients leave a device when all are there"
    return [used + early * (config.bucket > 0)]
