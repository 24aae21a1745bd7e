"""PyTorch's tensors, threads and random numbers, used so that the bits do not depend on the layout."""

from __future__ import annotations

import math
import sys
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpiml import vectors
from mpiml.devices.device import Device
from mpiml.devices.host import HOST, Host
from mpiml.errors import ConfigError
from mpiml.nn.base import Array
from mpiml.nn.parameters import Init, Shape
from mpiml.random import generator

# What torch raises for rows that a module cannot take.
WRONG = RuntimeError, ValueError, TypeError, IndexError, torch.jit.Error


def one_line(error: BaseException) -> str:
    """The message of an error of torch, which may have many lines, as one that is not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]}..."


def naming(what: str, call: Callable[[], object], errors: Any = WRONG) -> None:
    """Make the call, with `what` before its error."""
    try:
        call()
    except ConfigError:
        raise
    except errors as error:
        raise ConfigError(f"{what} {one_line(error)}") from error


def prepare_torch(threads: int, device: Host = HOST) -> None:
    """Make torch use `threads` threads and deterministic algorithms, on the host and on the device."""
    device.fix_arithmetic()
    torch.set_num_threads(threads)
    with suppress(RuntimeError):  # raised if it has been set, or such threads have been started, before
        torch.set_num_interop_threads(1)
    if "torch._dynamo" in sys.modules:  # modules may be compiled, of which the compiler is to know, too
        torch.use_deterministic_algorithms(True)
    else:
        torch.set_deterministic_debug_mode("error")  # the same, but it does not load the compiler for seconds
    torch.utils.deterministic.fill_uninitialized_memory = False  # only helps to find bugs, and is slow


def as_tensor(array: Array) -> Tensor:
    """The array as a tensor: a view if its memory is writeable and starts on a 64-byte boundary, else an aligned copy.

    Torch's bits depend on alignment. They may depend on strides too, and NumPy's strides of axes of length 1 are
    arbitrary, so the tensor gets torch's own.
    """
    flat = array.reshape(-1)
    if flat.ctypes.data % vectors.ALIGNMENT or not flat.flags.writeable:
        aligned = vectors.empty(flat.size, flat.dtype)
        np.copyto(aligned, flat)
        flat = aligned
    return torch.from_numpy(flat).view(array.shape)


def tensor_on(device: Host, given: Array | Tensor) -> Tensor:
    """An array, or what a layer on the device returned, as a tensor where modules compute."""
    return device.tensor(given) if isinstance(device, Device) else as_tensor(given)


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """NumPy's type of the same kind."""
    kind: np.dtype[Any] = torch.empty(0, dtype=dtype).numpy().dtype
    return kind


def write(slot: Any, values: Tensor | None) -> None:
    """Write values, or zeros, into an array, or into a vector on the device where the values are."""
    if isinstance(slot, Tensor):
        slot.zero_() if values is None else slot.copy_(values)
    else:
        np.copyto(slot, 0 if values is None else values.numpy())


@contextmanager
def constant(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Within the block, these parameters require no gradient."""
    for tensor in tensors:
        tensor.requires_grad_(False)
    try:
        yield
    finally:
        for tensor in tensors:
            tensor.requires_grad_(True)


@contextmanager
def kept(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Within the block, these parameters may get other memory; afterwards they have their own."""
    own = [tensor.data for tensor in tensors]
    try:
        yield
    finally:
        for tensor, data in zip(tensors, own, strict=True):
            tensor.data, tensor.grad = data, None


def in_order(tensor: Tensor, boundary: int = vectors.ALIGNMENT) -> Tensor:
    """The tensor, or a copy or view of it, in memory as `as_tensor` has it, which begins on such a boundary."""
    if tensor.is_contiguous() and 1 not in tensor.shape and not tensor.data_ptr() % boundary:
        return tensor
    flat = tensor.reshape(-1)
    return (flat.clone() if flat.data_ptr() % boundary else flat).view(tensor.shape)


def drawn(size: Shape, dtype: torch.dtype) -> Tensor:
    """Random numbers to try a module on, so that normalisations see other than constants; integers are 0 and 1."""
    draw = generator(0, "trial")
    if dtype.is_floating_point:
        return torch.from_numpy(draw.standard_normal(size)).to(dtype)
    return torch.from_numpy(draw.integers(0, 2, size))


def is_whole(tensor: Tensor) -> bool:
    """Whether the tensor holds integers, or truth values."""
    return not (tensor.is_floating_point() or tensor.is_complex())


def real_shape(tensor: Tensor) -> Shape:
    """The shape of the tensor's values in the flat vector, where a complex number is a pair of real ones."""
    return (*tensor.shape, 2) if tensor.is_complex() else tuple(tensor.shape)


def as_real(tensor: Tensor) -> Tensor:
    """The tensor's values, complex numbers as pairs of real ones on one more axis; a view where that can be."""
    tensor = tensor.detach().resolve_neg()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def as_kind_of(tensor: Tensor, values: Tensor) -> Tensor:
    """The reverse of `as_real`: `values` as numbers of the tensor's kind; integers are rounded, others may be views."""
    if tensor.is_complex():
        return torch.view_as_complex(values)
    return values.round().to(tensor.dtype) if is_whole(tensor) else values


def first_values(tensor: Tensor) -> Init:
    """An init that returns the tensor's values in order. It does not keep the tensor alive: memory of modules that
    belong to another stage can be freed."""
    reference, taken, size = weakref.ref(tensor), 0, math.prod(real_shape(tensor))

    def init(random: np.random.Generator, count: int) -> NDArray[np.float64]:
        nonlocal taken
        tensor = reference()
        assert tensor is not None, "a stage that writes first values holds the module that they come from"
        values: NDArray[np.float64] = as_real(tensor).reshape(-1)[taken : taken + count].numpy()
        taken = (taken + count) % size
        return values

    return init


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the tensor's values."""
    checksum = 0
    for part in parts(plain(tensor.detach())).values():
        checksum = zlib.crc32(part.contiguous().view(-1).view(torch.uint8).cpu().numpy(), checksum)
    return checksum


def arrays(tensor: Tensor) -> dict[str, NDArray[Any]]:
    """The parts of a tensor as views of its memory."""
    return {name: part.numpy() for name, part in parts(tensor).items()}


def parts(tensor: Tensor) -> dict[str, Tensor]:
    """The tensor's own memory as real tensors: one, named "", or if it is sparse one for each of its parts, such as
    ".indices" and ".values". Complex numbers are pairs of reals, on a last axis of 2."""
    tensor = tensor.detach()
    if tensor.layout == torch.strided:
        memory = {"": tensor}
    elif tensor.layout == torch.sparse_coo:
        memory = {".indices": tensor._indices(), ".values": tensor._values()}
    else:  # compressed by rows or by columns
        by_rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
        names = ("crow_indices", "col_indices") if by_rows else ("ccol_indices", "row_indices")
        memory = {f".{name}": getattr(tensor, name)() for name in (*names, "values")}
    return {name: torch.view_as_real(part) if part.is_complex() else part for name, part in memory.items()}


def plain(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its elements do not lie in memory as they are, each at a place of its own: a
    conjugate that is not worked out yet, or an axis that repeats one element."""
    if tensor.layout != torch.strided:
        return tensor
    repeats = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.contiguous() if repeats else tensor.resolve_conj().resolve_neg()
