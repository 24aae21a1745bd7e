"""Random numbers as a pure function of the seed and their purpose, so that no layout and no restart changes them."""

import hashlib

import numpy as np


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A generator keyed by the run's seed and a purpose, such as ("dropout", "layers.2", step, microbatch).

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox).
    """
    return np.random.Generator(np.random.Philox(key=key(seed, *purpose)))


def key(seed: int, *purpose: str | int) -> int:
    """The 128-bit key of `generator(seed, *purpose)`, to seed other libraries' generators with."""
    words = repr((seed, *purpose)).encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=16).digest(), "little")
