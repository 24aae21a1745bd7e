"""The keywords of DistributedDataParallel that change nothing here, and those that are refused."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

from mpiml.errors import ConfigError
from mpiml.flags import guess
from mpiml.loop.checks import check_stall_timeout, check_switch

# Whatever their value, gradients, weights and messages are right.
ACCEPTED = {
    "bucket_cap_mb": "all gradients are one bucket",
    "bucket_cap_mb_list": "all gradients are one bucket",
    "batched_grad_copy": "gradients are copied at once",
    "find_unused_parameters": "they are always noticed",
    "check_reduction": "it is always checked",
    "gradient_as_bucket_view": "gradients are tensors of their own",
    "static_graph": "the graph may change",
    "skip_all_reduce_unused_params": "they are always noticed",
    "dim": "it is of devices",
}
USED = ("broadcast_buffers", "forward_sync_buffers", "init_sync", "comm", "memory", "stall_timeout")
DEVICES = ("device_ids", "output_device")  # accepted if they name the GPU on which the module is
REFUSED = {
    "device_ids": "the module computes where it is: leave it out",
    "output_device": "outputs stay where the module is: leave it out",
    "process_group": "pass an MPI communicator as comm=",
    "device_mesh": "pass an MPI communicator as comm=",
    "mixed_precision": "use torch.autocast",
    "delay_all_reduce_named_params": "all gradients are averaged at once",
    "param_to_hook_all_reduce": "all gradients are averaged at once",
}


def check(keywords: dict[str, Any], switches: dict[str, Any], stall_timeout: Any, gpus: Sequence[int] = ()) -> None:
    """Raise ConfigError for a keyword that is refused or unknown, and for a value that does not work. `gpus` are those
    on which the module is."""
    check_stall_timeout(stall_timeout)
    for name, value in switches.items():
        if value is not None:
            check_switch(name, value)
    for name, value in keywords.items():
        if name in DEVICES and gpus and _numbers(value) == list(gpus):
            continue
        if name in REFUSED and value not in (None, []):
            raise ConfigError(f"DataParallel({name}=...): {REFUSED[name]}")
        if name not in REFUSED | ACCEPTED:
            hint = guess(name, [*ACCEPTED, *REFUSED, *USED])
            raise ConfigError(f"DataParallel({name}=...): there is no such keyword{hint}")


def _numbers(value: Any) -> list[Any]:
    """The numbers of the GPUs that a value of a keyword names."""
    every = value if isinstance(value, list | tuple) else [value]
    return [getattr(one, "index", None) if hasattr(one, "type") else one for one in every]


def warn(keywords: dict[str, Any]) -> None:
    """Warn of keywords that change nothing, and of which more is expected."""
    for name, value in keywords.items():
        if name.startswith("bucket_cap") and value is not None:
            warnings.warn(f"DataParallel({name}=...) changes nothing: {ACCEPTED[name]}", stacklevel=3)


def of_torch() -> set[str]:
    """The keywords of the DistributedDataParallel that is installed."""
    from torch.nn.parallel import DistributedDataParallel

    return set(inspect.signature(DistributedDataParallel.__init__).parameters) - {"self", "module"}
