"""The same module on all ranks of a DataParallel, with the same values."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Module, SyncBatchNorm

from mpiml.errors import ConfigError, first_few
from mpiml.nn.torch_state import tensors
from mpiml.nn.torch_tensors import parts
from mpiml.team import Team

WRAPPERS = "DataParallel", "DistributedDataParallel"  # mpiml's or PyTorch's


def compare(team: Team, module: Module) -> None:
    """Raise ConfigError, on all ranks alike, for a module that cannot be averaged, or another one on other ranks."""
    team.together(lambda: _check(module))
    kinds = {name: f"{str(t.dtype).removeprefix('torch.')} {_kind(t)}" for name, t in tensors(module).items()}
    team.check_alike(kinds, "all ranks must make the same module")


def _check(module: Module) -> None:
    if not isinstance(module, Module):
        raise ConfigError(f"DataParallel takes a torch.nn.Module, and not a {type(module).__name__}")
    lazy = [n for n, t in [*module.named_parameters(), *module.named_buffers()] if torch.nn.parameter.is_lazy(t)]
    if lazy:
        raise ConfigError(f"{first_few(lazy)} has no shape yet: call the module once, with inputs like its own, before")
    if wrapped := [name or "the module" for name, part in module.named_modules() if type(part).__name__ in WRAPPERS]:
        raise ConfigError(f"{first_few(wrapped)} averages gradients already: pass what it wraps, its .module")
    devices = {str(tensor.device): name for name, tensor in tensors(module).items()}
    if len(devices) > 1:
        where = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ConfigError(f"the module lies on several devices, {where}: module.to(mpiml.torch.device()) first")
    if other := [device for device in devices if device.partition(":")[0] not in ("cpu", "cuda")]:
        raise ConfigError(f"the module is on {other[0]}: ranks train on the CPU, or on CUDA's GPUs")
    if synced := [name or "the module" for name, part in module.named_modules() if isinstance(part, SyncBatchNorm)]:
        raise ConfigError(f"{first_few(synced)} is a SyncBatchNorm, which needs a process group: use BatchNorm")
    if not any(p.requires_grad for p in module.parameters()):
        raise ConfigError(f"{type(module).__name__} has no parameter that requires a gradient: nothing to average")


def _kind(tensor: Tensor) -> str:
    trained = ", trained" if tensor.requires_grad else ""
    return f"{tuple(tensor.shape)}{trained}"


def broadcast(team: Team, values: Iterable[Tensor], root: int = 0) -> None:
    """Give all ranks the values that these tensors have on rank `root`; collective."""
    for tensor in values:
        for part in parts(tensor).values():
            whole = part.contiguous().cpu()
            team.broadcast_array(whole.reshape(-1).view(torch.uint8).numpy(), root)
            if whole is not part and not torch.equal(part.cpu(), whole):
                part.copy_(whole)
