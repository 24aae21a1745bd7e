"""What is trained on pretended devices, for the table of features and layouts: models of PyTorch modules, of all kinds
that could tell devices from each other or from the host."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.contract.features import Feature, split, tokens

STEPS = "--log-every 1 --eval-every 3 --eval-rows 16 --save-every 3 --steps 5 --quiet"

# Running averages, dropout, parts that are not trained and their averages, and a block that is computed again.
CONV = """
def net(shape, outputs):
    from torch import nn
    from mpiml.api import Recompute

    fixed = nn.BatchNorm2d(6).eval().requires_grad_(False)
    block = [nn.Conv2d(6, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.2)]
    return [
        nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.GELU(), fixed, Recompute(*block),
        nn.Flatten(), nn.Linear(32, outputs),
    ]
"""
# Ids of tokens, masks made in the forward pass, a buffer of which checkpoints know nothing, and a weight in two places.
LANGUAGE = """
import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, width, length):
        super().__init__()
        self.norm, self.mixed = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.drop, self.out = nn.Dropout(0.1), nn.Linear(width, width)
        self.register_buffer("seen", torch.ones(length, length, dtype=torch.bool).tril(), persistent=False)

    def forward(self, x):
        q, k, v = self.mixed(self.norm(x)).chunk(3, dim=-1)
        scores = (q @ k.transpose(1, 2)).masked_fill(~self.seen, float("-inf"))
        return x + self.drop(self.out(torch.softmax(scores, -1) @ v))


class Language(nn.Module):
    def __init__(self, length, words, width=12):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(Block(width, length), Block(width, length))
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.head(self.blocks(self.words(ids) + self.places(places)))


def net(shape, outputs):
    return Language(*shape, outputs)


def parts(shape, outputs):
    return nn.Sequential(nn.Embedding(outputs, 12), Block(12, *shape), Block(12, *shape), nn.Linear(12, outputs))
"""
# Rows and labels with weights, of which some are 0; losses and metrics of one's own, in PyTorch and in NumPy.
OWN = """
import numpy as np
from mpiml.api import Dataset


def rows(labels):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((90, 6)).astype("f4")
    y, w = labels(x), rng.integers(0, 3, 90) * (np.arange(90) > 8)
    return Dataset.from_arrays(x[:60], y[:60], x[60:], y[60:], w[:60], w[60:])


def values():
    return rows(lambda x: np.stack([x[:, 0] * x[:, 1], abs(x[:, 2]), x[:, 3] ** 2], 1))


def bits():
    return rows(lambda x: (x[:, :4] > 0.3).astype(np.uint8))


def net(shape, outputs):
    from torch import nn

    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.1), nn.Linear(12, outputs))


def torch_loss(y, labels):
    import torch

    return torch.nn.functional.smooth_l1_loss(y + 0.1 * torch.randn_like(y), labels, reduction="none")


def numpy_loss(y, labels, weights):
    error, weights = y - labels, weights[:, None] * np.ones(labels.shape[1:])
    return np.sum(weights * error**4, dtype=float), np.sum(weights, dtype=float), 4 * weights * error**3


class Error:
    name, columns = "error", 2

    def __init__(self, outputs):
        pass

    def sums(self, y, labels):
        return np.array([np.sum(abs(y - labels), dtype=float), labels.size])

    def value(self, totals):
        return totals[0] / totals[1]
"""
# Several inputs, of which one are ids; and a number among others by which the model itself chooses rows of a table. The
# loss has a tensor of its own.
CHOICES = """
import numpy as np
import torch
from torch import nn
from mpiml.api import Dataset


def rows():
    rng = np.random.default_rng(0)
    words, amounts = rng.integers(0, 7, (90, 25)), rng.random((90, 3), np.float32)
    x = {"words": words, "amounts": amounts + rng.integers(0, 2, (90, 1))}
    y = (words[:, 0] > 3).astype(int)
    return Dataset.from_arrays(*({name: part[these] for name, part in x.items()} if of is x else of[these]
        for these in (slice(60), slice(60, 90)) for of in (x, y)))


class Net(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.words, self.kinds, self.out = nn.Embedding(7, 6), nn.Embedding(2, 6), nn.Linear(9, outputs)

    def forward(self, words, amounts):
        kinds = self.kinds(amounts[:, 0].long())
        return self.out(torch.cat([self.words(words).mean(1) * kinds, amounts], 1))


def net(shape, outputs):
    return Net(outputs)


weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]), reduction="none")
"""
# Blocks that PyTorch computes again, in both of its ways, one of which draws other numbers then.
AGAIN = """
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Again(nn.Sequential):
    def __init__(self, *layers, **how):
        super().__init__(*layers)
        self.how = how

    def forward(self, x):
        return checkpoint(super().forward, x, **self.how)


def net(shape, outputs):
    def block(**how):
        return Again(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.3), **how)

    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), block(use_reentrant=True), block(use_reentrant=False),
        block(use_reentrant=True, preserve_rng_state=False), nn.Linear(16, outputs),
    )


def plain(shape, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, outputs))
"""
# Shapes of masks: labels on two axes, some of which do not count.
MASKS = """
def net(shape, outputs):
    from torch import nn

    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, outputs, 1))
"""


def written(name: str, source: str) -> object:
    return lambda here: (here / f"{name}.py").write_text(source)


def language(here: Path) -> None:
    tokens(here)
    (here / "there_tokens.py").write_text(LANGUAGE)


def masks(here: Path) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((90, 2, 4, 5)).astype("f4")
    y = np.where(random.random((90, 4, 5)) < 0.2, -1, x[:, 0] > x[:, 1])
    y[:8] = -1
    split(here, x, y, 60)
    (here / "there_masks.py").write_text(MASKS)


def feature(module: str, source: str, flags: str, *on: str, data: str = "", write: object = None) -> Feature:
    """A feature that is trained on the processor, on one device, and on these kinds of layouts."""
    text = f"--model there_{module} {flags} {STEPS}"
    make = write or written(f"there_{module.partition(':')[0]}", source)
    return Feature(f"{text} {data}".strip(), on, make)  # type: ignore[arg-type]


DATA = "--data {here}/data.npz"
ROWS = "--batch 30 --microbatches 6 --lr 0.02"
ON_DEVICES = {
    "there-conv": feature(
        "conv:net",
        CONV,
        "--batch 60 --microbatches 6 --lr 0.01 --clip 0.3 --noise-scale --ema 0.8 --optimizer adamw",
        *("owners-pipe", "owners-grid", "owners-private", "sharers", "sharers-pipe", "unlocked"),
        *("to-sharers", "to-owners", "to-grid"),
    ),
    "there-lamb": feature(
        "conv:net",
        CONV,
        "--batch 60 --microbatches 12 --leaf 2 --lr 0.01 --optimizer lamb --rates layers.1.*=0,*.bias=3 "
        "--dtype float64",
        *("owners", "sharers-nodes", "to-sharers"),
    ),
    "there-bfloat16": feature(
        "conv:net", CONV, "--batch 60 --microbatches 6 --autocast bfloat16", "owners-grid", "sharers"
    ),
    "there-tokens": feature(
        "tokens:net", "", f"{ROWS} --optimizer adam", "owners", "sharers", "to-owners", data=DATA, write=language
    ),
    "there-parts": feature(
        *("tokens:parts", "", f"{ROWS} --optimizer momentum --noise-scale"),
        *("owners-four", "unlocked"),
        data=DATA,
        write=language,
    ),
    "there-again": feature("again:net", AGAIN, ROWS, "owners-grid", "sharers-pipe"),
    "there-workers": feature(
        "again:plain",
        AGAIN,
        "--batch 60 --microbatches 12 --workers 4 --average-every 2 --outer-lr 0.7 --outer-momentum 0.9 --ema 0.8",
        *("owners", "owners-grid", "sharers-nodes", "to-sharers"),
    ),
    "there-loss": feature(
        *("own:net", OWN, f"{ROWS} --data there_own:values --loss there_own:torch_loss --metric there_own:Error"),
        *("owners-pipe", "sharers"),
    ),
    "there-numpy-loss": feature(
        "own:net", OWN, f"{ROWS} --data there_own:values --loss there_own:numpy_loss", "owners", "sharers-pipe"
    ),
    "there-values": feature("own:net", OWN, f"{ROWS} --data there_own:values", "owners-grid", "sharers"),
    "there-bits": feature("own:net", OWN, f"{ROWS} --data there_own:bits --loss bce", "owners-pipe", "sharers"),
    "there-choices": feature(
        "choices:net",
        CHOICES,
        f"{ROWS} --data there_choices:rows --metric accuracy --loss there_choices:weighted",
        *("owners", "sharers"),
    ),
    "there-masks": feature("masks:net", "", ROWS, "owners", "sharers-pipe", data=DATA, write=masks),
}
