"""Names of a PyTorch module's parts, parameters and buffers: those of the user's own module, compiled or not."""

from __future__ import annotations

from torch.nn import Module

WRAPPERS = {"_orig_mod"}  # attributes by which modules hold the user's own: no part of names


def plain_name(name: str) -> str:
    """The name of a part, parameter or buffer as it is in the user's module, without torch.compile."""
    return ".".join(word for word in name.split(".") if word not in WRAPPERS)


def uncompiled(module: Module) -> Module:
    """The module that torch.compile was given, or the module itself."""
    original = getattr(module, "_orig_mod", None)
    return original if isinstance(original, Module) else module
