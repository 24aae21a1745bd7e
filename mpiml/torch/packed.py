"""State dicts as arrays and JSON, from which they come back exactly: keys that are no text, tuples, every dtype."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpiml.errors import ConfigError, OutputError

Arrays = dict[str, NDArray[Any]]
BITS = {1: torch.uint8, 2: torch.int16}  # of dtypes that NumPy has not, by their bytes
MAPPINGS: dict[str, Any] = {"dict": dict, "ordered": OrderedDict, "counter": Counter}


def pack(tree: Any, name: str, arrays: Arrays) -> Any:
    """What JSON can say of a tree, of which all arrays and tensors are put into `arrays`, under names that begin with
    `name`. Raises ConfigError, naming it, for what is neither."""
    if tree is None or type(tree) in (bool, int, str):
        return tree
    if type(tree) is float:
        return tree if np.isfinite(tree) else {"float": str(tree)}
    if type(tree) is list:
        return [pack(item, f"{name}.{index}", arrays) for index, item in enumerate(tree)]
    if type(tree) is tuple:
        return {"tuple": pack(list(tree), name, arrays)}
    for kind, mapping in MAPPINGS.items():
        if type(tree) is mapping:
            items = [[pack(k, f"{name}.key", arrays), pack(v, f"{name}.{k}", arrays)] for k, v in tree.items()]
            return {kind: items}
    if isinstance(tree, Tensor):
        return _pack_tensor(tree.detach(), name, arrays)
    if isinstance(tree, (np.ndarray, np.generic)) and tree.dtype.kind in "biuf":
        kind = "array" if isinstance(tree, np.ndarray) else "number"
        return {kind: _add(np.array(tree), name, arrays)}
    raise ConfigError(
        f"{name}: {type(tree).__name__} cannot be saved: checkpoints hold tensors, arrays, numbers, texts, lists, "
        "tuples and dicts"
    )


def _pack_tensor(tensor: Tensor, name: str, arrays: Arrays) -> Any:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ConfigError(f"{name} is sparse or quantized: checkpoints hold dense tensors")
    dtype = str(tensor.dtype).removeprefix("torch.")
    tensor = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    if tensor.is_complex():
        tensor, name = torch.view_as_real(tensor), f"{name}.pairs_of_{dtype}"
    try:
        array = tensor.numpy()
    except TypeError:
        array, name = tensor.view(BITS[tensor.element_size()]).numpy(), f"{name}.bits_of_{dtype}"
    return {"tensor": _add(array, name, arrays), "dtype": dtype}


def _add(array: NDArray[Any], name: str, arrays: Arrays) -> str:
    """Put an array under a name of its own: keys such as 1 and "1" look the same in names."""
    while name in arrays:
        name += "_"
    arrays[name] = array
    return name


def unpack(packed: Any, arrays: Arrays) -> Any:
    """The tree that has been packed. Raises OutputError for what `pack` does not write."""
    try:
        return _unpack(packed, arrays)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise OutputError(f"the checkpoint is not one of a PyTorch loop: {error!r}") from None


def _unpack(packed: Any, arrays: Arrays) -> Any:
    if isinstance(packed, list):
        return [_unpack(item, arrays) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if "tensor" in packed:
        return _unpack_tensor(torch.from_numpy(arrays[packed["tensor"]].copy()), getattr(torch, packed["dtype"]))
    kind, content = next(iter(packed.items()))
    if kind in MAPPINGS:
        return MAPPINGS[kind]({_unpack(key, arrays): _unpack(value, arrays) for key, value in content})
    if kind == "tuple":
        return tuple(_unpack(content, arrays))
    if kind == "float":
        return float(content)
    array = arrays[content]
    return array if kind == "array" else array[()]


def _unpack_tensor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.is_complex:
        return torch.view_as_complex(tensor)
    return tensor if tensor.dtype == dtype else tensor.view(dtype)
