"""Random numbers are a function of seed and purpose alone."""

import random
from typing import Any

import numpy as np
import pytest

from mpiml.random import Draws, generator, keyed


def numbers(seed: int, *purpose: str | int) -> list[int]:
    return generator(seed, *purpose).bit_generator.random_raw(4).tolist()


def test_same_key_same_numbers_whatever_was_drawn_before() -> None:
    first = numbers(1, "dropout", "layers.2", 5, 0)
    np.random.default_rng().random(3)
    generator(1, "dropout", "layers.2", 5, 0).random(7)
    assert numbers(1, "dropout", "layers.2", 5, 0) == first


@pytest.mark.parametrize(
    "other",
    [
        (2, "dropout", "layers.2", 5, 0),
        (1, "order", "layers.2", 5, 0),
        (1, "dropout", "layers.3", 5, 0),
        (1, "dropout", "layers.2", 0, 5),  # the order counts
        (1, "dropout", "layers.2", 50),  # and so does where one word ends
        (1, "dropout", "layers.2", "5", 0),
        (1, "dropout", "layers.2", 5),
    ],
)
def test_any_other_key_gives_other_numbers(other: tuple) -> None:
    assert numbers(*other) != numbers(1, "dropout", "layers.2", 5, 0)


def test_keys_do_not_depend_on_the_process() -> None:
    # Written down once: hash(), which Python salts, or another digest would make a resumed run draw other numbers.
    assert numbers(0, "order", 0, 0) == [
        *(6629014324746371640, 9289649223947522919),
        *(16477982032893219568, 14391438750861982755),
    ]


def test_large_seeds_are_told_apart() -> None:
    assert len({tuple(numbers(seed, "init")) for seed in (0, 2**32, 2**64, 2**128)}) == 4


def test_what_is_drawn_from_the_process_is_keyed_and_put_back() -> None:
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.random()
    random.seed(1)
    np.random.seed(1)
    with keyed(["NumPy", "Python"], 7, "forward", 3):
        first = random.random(), np.random.random()
    with keyed(["NumPy", "Python"], 7, "forward", 3):
        assert (random.random(), np.random.random()) == first
    with keyed(["NumPy", "Python"], 7, "forward", 4):
        assert random.random() != first[0]
        assert np.random.random() != first[1]
    assert (random.random(), np.random.random()) == expected


def test_draws_names_the_generators_that_are_drawn_from() -> None:
    before = np.random.get_state()[1].tolist()
    with Draws(0) as draws:
        pass
    assert draws.which == frozenset()
    with Draws(0) as draws:
        np.random.random()
    assert draws.which == {"NumPy"}
    with Draws(0) as draws:
        random.random()
    assert draws.which == {"Python"}
    assert np.random.get_state()[1].tolist() == before


class Gpu:
    """What torch.cuda has of the generator of a GPU, for a generator on the host."""

    def __init__(self, torch: Any):
        self.generator = torch.Generator()
        self.manual_seed, self.set_rng_state = self.generator.manual_seed, self.generator.set_state
        self.states: list[Any] = []  # which stay, so that each has memory of its own

    def get_rng_state(self) -> Any:
        self.states.append(self.generator.get_state())
        return self.states[-1]

    def is_initialized(self) -> bool:
        return True


def test_the_generator_of_a_gpu_is_keyed_with_that_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    gpu = Gpu(torch)
    monkeypatch.setattr(torch, "cuda", gpu)

    def drawn() -> tuple[float, float]:
        return float(torch.rand(())), float(torch.rand((), generator=gpu.generator))

    torch.default_generator.manual_seed(1)
    gpu.manual_seed(2)
    expected = drawn()
    torch.default_generator.manual_seed(1)
    gpu.manual_seed(2)
    both = ["PyTorch", "CUDA"]
    with keyed(both, 7, "forward", 3):
        first = drawn()
    with keyed(both, 7, "forward", 4):
        other = drawn()
    with keyed(both, 7, "forward", 3):
        assert drawn() == first
    assert all(one != two for one, two in zip(first, other, strict=True))
    assert drawn() == expected


def test_draws_knows_what_is_drawn_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    gpu = Gpu(torch)
    monkeypatch.setattr(torch, "cuda", gpu)
    with Draws(0) as draws:
        pass
    assert draws.which == frozenset()
    with Draws(0) as draws:
        torch.rand((), generator=gpu.generator)
    assert draws.which == {"CUDA"}
