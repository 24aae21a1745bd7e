"""A GPU of NVIDIA's, by PyTorch: memory, transfers on a stream of their own, and page-locked memory of the host."""

from __future__ import annotations

import os
import warnings
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from mpiml.devices.device import Array, Device
from mpiml.errors import ConfigError

# Products of cuBLAS have the same bits in each call only with work areas of fixed sizes; and cuDNN chooses algorithms
# by the memory that is free, unless their work areas are limited (in MiB). Both are read when the libraries start.
FIXED = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "CUDNN_CONV_WSCAP_DBG": "1024"}
ANY_CONTEXT = 1  # CUDA's flag of locked memory that it counts as locked in every context


def seen(node: str) -> list[tuple[str, str]]:
    """The GPUs that this process sees: for each its type, and a text that no other GPU has. `node` is such a text for
    the node.

    Raises ConfigError if there are none, and says why as far as that is known.
    """
    if not torch.backends.cuda.is_built():
        raise ConfigError(
            f"--device cuda: PyTorch {torch.__version__} is built without CUDA; install a build for GPUs, or leave "
            "--device out"
        )
    set_environment()
    try:
        torch.cuda.init()
        every = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--device cuda: {reason}") from None
    if not every:
        raise ConfigError(
            "--device cuda: there is a driver, but no GPU that this process may use; ask SLURM for some (--gres), and "
            "look at CUDA_VISIBLE_DEVICES"
        )
    return [(one.name, str(getattr(one, "uuid", f"{node}, GPU {number}"))) for number, one in enumerate(every)]


def of_tensor(tensor: Tensor) -> Cuda:
    """The GPU on which a tensor lies."""
    set_environment()
    number = tensor.get_device()
    return Cuda(number, torch.cuda.get_device_name(number), alone=False)


def set_environment() -> None:
    """Set what CUDA's libraries read when they start, unless the user has."""
    os.environ.update({name: value for name, value in FIXED.items() if name not in os.environ})


class Cuda(Device):
    """A GPU. See Device. Raises ConfigError if it cannot be used."""

    def __init__(self, number: int, name: str, alone: bool):
        super().__init__("cuda", number, name, alone)
        self.torch = torch.device("cuda", number)
        try:
            torch.cuda.set_device(self.torch)
            self._copies = torch.cuda.Stream(self.torch)
        except RuntimeError as error:
            raise ConfigError(f"--device cuda: {name} cannot be used: {' '.join(str(error).split())}") from None

    def fix_arithmetic(self) -> None:
        torch.backends.cudnn.benchmark = False  # which chooses algorithms by how fast they are this time
        torch.backends.cudnn.deterministic = True
        if self.tf32 is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of names to come, which older versions do not have
                torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32

    def tensor(self, given: Tensor | Array) -> Tensor:
        if isinstance(given, Tensor):
            return given.to(self.torch)
        host = torch.from_numpy(given if given.flags.writeable else np.array(given))
        return (host.pin_memory() if host.numel() else host).to(self.torch, non_blocking=True)

    def on_host(self, tensor: Tensor) -> Tensor:
        if not tensor.is_cuda or tensor.layout != torch.strided:
            return tensor.detach().cpu()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor.detach(), non_blocking=True)
        torch.cuda.current_stream(self.torch).synchronize()
        return host

    def memory(self) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info(self.torch)
        kept = torch.cuda.memory_reserved(self.torch) - torch.cuda.memory_allocated(self.torch)
        return free + kept, total

    def settle(self) -> None:
        torch.cuda.current_stream(self.torch).wait_stream(self._copies)
        self._copies.synchronize()

    def wait(self) -> None:
        torch.cuda.synchronize(self.torch)

    def _begin(self, source: Tensor, target: Tensor) -> None:
        self._copies.wait_stream(torch.cuda.current_stream(self.torch))
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)

    def _empty(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.torch)

    def _pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def _lock(self, address: int, size: int) -> bool:
        if int(torch.cuda.cudart().cudaHostRegister(address, size, ANY_CONTEXT)) == 0:
            return True
        with suppress(RuntimeError):  # CUDA lets the next kernel that starts raise this error, and forgets it then
            torch.ones(1, device=self.torch).add_(1)
        return False

    def _unlock(self, address: int) -> None:
        torch.cuda.cudart().cudaHostUnregister(address)
