"""Random numbers as a pure function of what they are for, so that no layout and no restart can change them."""

import hashlib

import numpy as np


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A generator keyed by the run's seed and the purpose: ("dropout", "layers.2", step, microbatch), say.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox).
    """
    return np.random.Generator(np.random.Philox(key=key(seed, *purpose)))


def key(seed: int, *purpose: str | int) -> int:
    """The key of that generator, 128 bits, for random numbers of another kind."""
    words = repr((seed, *purpose)).encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=16).digest(), "little")
