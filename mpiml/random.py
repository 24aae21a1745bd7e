"""Random numbers as a pure function of the seed and their purpose, so that no layout and no restart changes them."""

import hashlib
import pickle
import random
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np

NOTHING_DRAWN: AbstractContextManager[None] = nullcontext()


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A generator keyed by the run's seed and a purpose, such as ("dropout", "layers.2", step, microbatch).

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox).
    """
    return np.random.Generator(np.random.Philox(key=key(seed, *purpose)))


def key(seed: int, *purpose: str | int) -> int:
    """The 128-bit key of `generator(seed, *purpose)`, to seed other libraries' generators with."""
    words = repr((seed, *purpose)).encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=16).digest(), "little")


class Global(NamedTuple):
    """A library's generator that belongs to the whole process, from which a user's code may draw."""

    seed: Callable[[int], object]  # with a 64-bit number
    state: Callable[[], Any]
    restore: Callable[[Any], object]


NUMPY = Global(lambda n: np.random.seed([n >> 32, n & 0xFFFFFFFF]), np.random.get_state, np.random.set_state)  # noqa: NPY002
PYTHON = Global(random.seed, random.getstate, random.setstate)


def global_generators() -> dict[str, Global]:
    """The generators of the process, by library; PyTorch's only where PyTorch has been imported."""
    torch = sys.modules.get("torch")
    own = {"NumPy": NUMPY, "Python": PYTHON}
    if torch is None:
        return own

    def restore(state: Any) -> None:
        torch.set_rng_state(torch.from_numpy(state))

    seed = torch.default_generator.manual_seed
    # As arrays, because pickles of equal tensors differ, and by these `Draws` knows whether something has been drawn.
    of_host = Global(seed, lambda: torch.get_rng_state().numpy(), restore)
    return own | {"PyTorch": of_host} | ({"CUDA": _of_gpu(torch)} if torch.cuda.is_initialized() else {})


def _of_gpu(torch: Any) -> Global:
    """PyTorch's generator of the GPU that it uses."""
    cuda = torch.cuda
    return Global(
        cuda.manual_seed,
        lambda: cuda.get_rng_state().numpy(),
        lambda state: cuda.set_rng_state(torch.from_numpy(state)),
    )


def keyed(which: Collection[str], seed: int, *purpose: str | int) -> AbstractContextManager[None]:
    """Within the block, what is drawn from these generators of the process, named as `global_generators` does, is a
    function of seed and purpose alone; afterwards they go on as if nothing had been drawn."""
    return _keyed(which, seed, *purpose) if which else NOTHING_DRAWN


@contextmanager
def _keyed(which: Collection[str], seed: int, *purpose: str | int) -> Iterator[None]:
    chosen = [each for name, each in global_generators().items() if name in which]
    before = [each.state() for each in chosen]
    for each in chosen:
        each.seed(key(seed, *purpose) >> 64)
    try:
        yield
    finally:
        for each, state in zip(chosen, before, strict=True):
            each.restore(state)


class Draws:
    """From which generators of the process a block draws: `which`, known after it. They are keyed within it.

    with Draws(seed, "trial") as draws:
        function()
    draws.which  # such as {"NumPy"}
    """

    def __init__(self, seed: int, *purpose: str | int):
        self.which: frozenset[str] = frozenset()
        self._generators = global_generators()
        self._keyed = keyed(self._generators, seed, *purpose)

    def __enter__(self) -> "Draws":
        self._keyed.__enter__()
        self._before = {name: pickle.dumps(each.state()) for name, each in self._generators.items()}
        return self

    def __exit__(self, *error: Any) -> None:
        states = {name: pickle.dumps(each.state()) for name, each in self._generators.items()}
        self.which = frozenset(name for name, state in states.items() if state != self._before[name])
        self._keyed.__exit__(*error)
