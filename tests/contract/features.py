"""The rows of the table of features and layouts: what may be trained, with what settings, and how its data are made."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.data import samples
from tests.data.samples import ARRAYS, FORMATS

ALL = ("data", "pipe", "grid", "nodes", "early", "private", "resumed")
HALVED = ("halved", "twelve")  # as some nodes may sum; how many fit depends on the number of micro-batches
ROWS = ("data", "pipe", "grid", "resumed")  # which rows a rank reads and what is done to them: no matter to the sum
KEPT = ("data", "pipe", "early", "resumed")  # what is kept from the forward to the backward pass: no matter to the sum
FILES = ("data", "pipe")  # how rows are read: one rank reads inputs and labels, or either of them


@dataclass(frozen=True)
class Feature:
    """A row of the table.

    Attributes:
        flags: of mpiml.train; {here} stands for the directory that `write` writes its data and modules to.
        on: the kinds of layouts on which it is proven to be as on one rank.
        data: what it trains on, in flags, or another that must not matter; the run alone has `as_data` instead if that
            is given.
    """

    flags: str
    on: Sequence[str] = ALL
    write: Callable[[Path], object] = lambda here: None
    data: str = ""
    as_data: str = ""


# Everything that could tell layouts apart: ragged micro-batches, dropout, clipping at every step, several epochs.
PERCEPTRON = (
    "--steps 45 --batch 100 --microbatches 24 --hidden 48,40 --dropout 0.1 --activation gelu --clip 0.3 --seed 5 "
    "--lr 0.01 --decay cosine --warmup-steps 5 --log-every 3 --eval-every 20 --eval-rows 50 --save-every 20 --quiet"
)
# Another rule, whose norm is taken only at the steps that are logged.
DOUBLE = f"{PERCEPTRON} --dtype float64 --optimizer nesterov --clip 0"
SHORT = "--log-every 1 --eval-every 4 --eval-rows 8 --save-every 4 --steps 9 --quiet"
# Two epochs, of which a run that is resumed has seen a part of the first.
DIGITS = (
    "--microbatches 6 --batch 180 --hidden 8 --dropout 0.1 --steps 16 --save-every 6 --eval-every 6 --eval-rows 50 "
    "--log-every 1 --quiet"
)


def split(here: Path, x: np.ndarray, y: np.ndarray, rows: int) -> None:
    """Write a data set whose first rows are to train on."""
    np.savez(here / "data.npz", x_train=x[:rows], y_train=y[:rows], x_test=x[rows:], y_test=y[rows:])


def few_rows(here: Path) -> None:
    """So few that micro-batches stay empty."""
    random = np.random.default_rng(0)
    split(here, random.standard_normal((60, 6)), random.integers(0, 3, 60), 30)


def tokens(here: Path) -> None:
    """Of which later rows, and so later micro-batches, have ever more that do not count."""
    random = np.random.default_rng(0)
    rows = random.integers(0, 11, (90, 13), np.uint8)
    rows[:, 1::2] = rows[:, :-1:2] * 3 % 11  # every second one can be predicted
    x, y = rows[:, :-1], rows[:, 1:].astype(np.int16)
    y[np.arange(12) > 14 - np.arange(90)[:, None] % 60 // 5] = -1
    split(here, x, y, 60)


def images(here: Path) -> None:
    """So few that micro-batches stay empty, with labels of which not all count."""
    random = np.random.default_rng(0)
    split(here, random.standard_normal((90, 4, 5, 2)), random.integers(-1, 3, 90), 60)


OWN = """
import numpy as np
from mpiml.nn.layers import Linear, Tanh

def model(shape, outputs):
    return [Linear(*shape, 8), Tanh(), Linear(8, 1)]

def loss(y, labels):
    value, weight = labels[:, :1], labels[:, 1:]
    error = y - value
    return np.sum(weight * error**2, dtype=float), np.sum(weight, dtype=float), 2 * weight * error

class Error:
    name, columns = "error", 2

    def __init__(self, outputs):
        assert outputs == 2

    def sums(self, y, labels):
        return np.array([np.sum(labels[:, 1] * abs(y[:, 0] - labels[:, 0])), np.sum(labels[:, 1])])

    def value(self, totals):
        return totals[0] / totals[1]

def fall(step, steps):
    return 1 - step / steps * np.random.random()
"""


def own(here: Path) -> None:
    """A model, loss, metric and decay of one's own, for labels that are a value and its weight."""
    x = np.random.default_rng(0).standard_normal((90, 5))
    split(here, x, np.stack([x[:, 0] * x[:, 1], np.linspace(0, 4, 90) ** 2], axis=1), 60)
    (here / "own.py").write_text(OWN)


SHARED = """
import numpy as np
from mpiml.nn.base import Layer
from mpiml.nn.layers import Dropout, LayerNorm, Linear, Tanh

class Turn(Layer):
    def __init__(self, weight, turned):
        self.weight, self.turned = weight, turned

    def __call__(self, x, at):
        weight = self.weight.value.T if self.turned else self.weight.value

        def backward(dy, grads):
            grads[self.weight][...] = dy.T @ x if self.turned else x.T @ dy
            return dy @ weight.T

        return x @ weight, backward

    def output_shape(self, shape):
        return self.weight.shape[:1] if self.turned else self.weight.shape[1:]

def model(shape, outputs):
    first = Linear(*shape, 150)
    weight = Linear(150, 240, gain=1.0).weight
    turns = [Turn(weight, False), Turn(weight, True), Turn(weight, False)]
    between = [[Tanh(), Dropout(0.1)], [LayerNorm(150)], [LayerNorm(240), Dropout(0.1)]]
    return [first, *(layer for pair in zip(turns, between) for layer in (pair[0], *pair[1])), Linear(240, outputs)]
"""


def shared(here: Path) -> None:
    """A model in which three layers have one array, and rows for it."""
    x = np.random.default_rng(0).standard_normal((90, 5))
    split(here, x, (x[:, 0] * x[:, 1] > 0).astype(int), 60)
    (here / "shared.py").write_text(SHARED)


# PyTorch is imported by the call alone; a parameter is a single number; one block writes to its input.
TORCH = """
def net(shape, outputs):
    from torch import nn, ones

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = nn.Parameter(ones(()))

        def forward(self, x):
            return x * self.by

    conv = nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU())
    return nn.Sequential(
        conv, Scale(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(72, outputs),
    )
"""


# A stage of two consists of averages alone, in front of what is optimised; a block is computed again in its backward
# pass; averages of all kinds.
NORMS = """
def net(shape, outputs):
    import torch
    from torch import nn
    from torch.utils.checkpoint import checkpoint

    class Again(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=True)

    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(8, 8, dtype=torch.cfloat))

        def forward(self, x):
            if self.training:
                with torch.no_grad():
                    self.mean.lerp_(torch.fft.fft(x).mean(0), 0.1)
            return x - torch.fft.ifft(self.mean).real

    wide = nn.Conv2d(1, 8, 3, padding=1).requires_grad_(False)
    block = Again(nn.Conv2d(8, 6, 3, stride=2), nn.BatchNorm2d(6, momentum=None), nn.ReLU(True), nn.Dropout(0.1))
    fixed = nn.BatchNorm2d(8).eval().requires_grad_(False)
    return nn.Sequential(
        Centred(), nn.Unflatten(1, (1, 8)), nn.BatchNorm2d(1, affine=False), wide, fixed, block,
        nn.Flatten(), nn.utils.spectral_norm(nn.Linear(54, 16)), nn.SyncBatchNorm(16), nn.Linear(16, outputs),
    )
"""


# Weights, labels of 0 and 1 on two axes, and a metric that draws.
BINARY = """
import random
import numpy as np
from mpiml.api import Conv2d, Dataset, Tanh

def data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((90, 4, 5, 2))
    y = (x > 0.3).any(axis=3).astype(np.uint8)
    w = rng.integers(0, 3, 90) * (np.arange(90) > 8)
    return Dataset.from_arrays(x[:60], y[:60], x[60:], y[60:], w[:60], w[60:])

def net(shape, outputs):
    assert outputs == 20
    return [Conv2d(2, 4, 3), Tanh(), Conv2d(4, 1, 1)]

class Drawn:
    name, columns = "drawn", 1

    def __init__(self, outputs):
        pass

    def sums(self, y, labels):
        return np.array([random.random()])

    def value(self, totals):
        return totals[0]
"""
# Masks with -1, a loss of batches and one that draws.
MASKS = """
def net(shape, outputs):
    from torch import nn

    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, outputs, 1))

def loss(y, labels):
    import torch

    p = torch.softmax(y + 0.1 * torch.randn_like(y), 1)[:, 1] * (labels >= 0)
    hit = labels == 1
    dice = 1 - 2 * (p * hit).sum() / (p.sum() + hit.sum() + 1)
    return dice + torch.nn.functional.cross_entropy(y, labels, ignore_index=-1)
"""


def masks(here: Path) -> None:
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (90, 2, 4, 5), np.uint8)
    y = np.where(random.random((90, 4, 5)) < 0.2, 255, x[:, 0] > x[:, 1]).astype(np.uint8)
    y[:, 0, 0] = 0
    split(here, x, y, 60)
    (here / "masks.py").write_text(MASKS)


# Rows one by one, in a single object, with two inputs, one of integers; each draws noise from NumPy's generator.
ITEMS = """
import numpy as np


class Rows:
    def __len__(self):
        return 90

    def __getitem__(self, row):
        own = np.random.default_rng(row)
        image, words = own.random((3, 4), np.float32), own.integers(0, 7, 5)
        return {"image": image + np.random.normal(0, 0.1, (3, 4)), "words": words, "label": int(words[0] > 3)}


def net(shape, outputs):
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(7, 6), nn.Linear(18, 8)

        def forward(self, words, image):
            return torch.tanh(self.out(torch.cat([self.table(words).mean(1), image.flatten(1)], 1)))

    return nn.Sequential(Net(), nn.Dropout(0.2), nn.Linear(8, outputs))


def noisy(x, y, rng):
    return {"words": x["words"], "image": x["image"] + rng.normal(0, 0.1, x["image"].shape)}, y
"""


def noise(here: Path) -> None:
    lines = ["def noisy(x, y, random):", "    return x + random.normal(size=x.shape), y"]
    (here / "noise.py").write_text("\n".join(lines) + "\n")


def drawing(here: Path) -> None:
    """A transform that draws from generators of the process, and rows that nobody looks at before."""
    samples.csv(here)
    lines = ["import random", "import numpy", "def drawn(x, y, rng):"]
    lines += ["    return x + numpy.random.normal(size=x.shape) + random.random() + rng.random(), y"]
    (here / "drawing.py").write_text("\n".join(lines) + "\n")


def noise_and_csv(here: Path) -> None:
    noise(here)
    samples.csv(here)


def flowers(here: Path) -> None:
    """A table as people have it: names, words as labels, decimal commas, and gaps, more of them in later rows."""
    random = np.random.default_rng(0)
    for which, rows in (("train", 61), ("test", 20)):
        lines = ["name;long;wide;kind"]
        for row in range(rows):
            kind, gap = random.integers(3), random.integers(rows) < row // 2
            long, wide = (f"{1000 + kind + random.normal():.3f}".replace(".", ",") for _ in range(2))
            lines.append(f'"No; {row}";{long};{"NA" if gap else wide};{("rose", "aster", "iris")[kind]}')
        (here / f"{which}.csv").write_text("\n".join(lines) + "\n")


def body(here: Path) -> None:
    """A first layer of eight units, and a last one for three classes, as PyTorch has them."""
    random = np.random.default_rng(0)
    shapes = {"1.weight": (8, 64), "1.bias": (8,), "4.weight": (3, 8), "4.bias": (3,)}
    save_file({name: random.normal(0, 0.2, shape) for name, shape in shapes.items()}, here / "body.safetensors")


def of_format(name: str) -> Feature:
    """The same rows in files of a format; alone, in an .npz file."""

    def write(here: Path) -> None:
        (here / "d").mkdir()
        FORMATS[name](here / "d")
        np.savez(here / "plain.npz", **{key: samples.values(name, key) for key in ARRAYS})

    file = {"npz": "/d.npz", "compressed_npz": "/d.npz", "hdf5": "/d.h5", "chunked_hdf5": "/d.h5"}.get(name, "")
    flags = f"--hidden 8 --microbatches 3 --batch 6 --label kind {SHORT}"
    return Feature(flags, FILES, write, f"--data {{here}}/d{file}", "--data {here}/plain.npz")


DATA = "--data {here}/data.npz"
FEW = f"--hidden 8,8 --batch 7 --steps 20 --log-every 1 --save-every 8 --quiet {DATA}"
GPT = f"--model gpt --width 16 --heads 2 --optimizer sgd {SHORT} {DATA}"
MASKED = f"{GPT} --dtype float64 --steps 1 --batch 60"
AVERAGES = f"{DATA} --model resnet --norm batch --channels 4 --blocks 1 --ignore -1 --batch 9 --microbatches 13 {SHORT}"
AVERAGES += " --clip 0.3"
OWN_FLAGS = f"{DATA} --model own:model --loss own:loss --metric own:Error --dtype float64 {SHORT} --batch 60"
OWN_FLAGS += " --optimizer sgd --decay own:fall --lr-floor 0.01"
NOISY = f"--transform noise:noisy --label kind --hidden 8 --microbatches 6 --batch 9 {SHORT}"
FLOWERS = f"--data {{here}} --label kind --drop-columns name --fill mean --normalize --hidden 8 --batch 9 {SHORT}"
FLOWERS += " --microbatches 6"
DRAWN = NOISY.replace("noise:noisy", "drawing:drawn")

FEATURES = {
    "perceptron": Feature(PERCEPTRON, (*ALL, *HALVED)),
    "double": Feature(DOUBLE),
    "library": Feature(f"{DOUBLE} --allreduce mpi", ()),
    "momentum": Feature(f"{DIGITS} --optimizer momentum --activation tanh --weight-decay 0.01 --decay step"),
    "adam": Feature(f"{DIGITS} --optimizer adam --clip 0.3 --betas 0.8,0.95 --decay linear --lr-floor 0.0003"),
    # Matrices of several blocks, which replicas share.
    "lamb": Feature(
        f"{DIGITS} --optimizer lamb --lr 0.005 --lr-scaling sqrt --base-batch 45 --hidden 400,50 --log-every 4 "
        "--ema 0.8 --dtype float64",
        (*ALL, "halved"),
    ),
    "lars": Feature(
        f"{AVERAGES} --optimizer lars --weight-decay 0.01 --rates layers.0=0,layers.6=10,*.bias=3", write=images
    ),
    "images": Feature(f"--model cnn --channels 6 --batch 60 --microbatches 6 --dropout 0.1 --clip 0.3 {SHORT}"),
    "tokens": Feature(f"{GPT} --dropout 0.1 --batch 25 --microbatches 6", write=tokens),
    "tied": Feature(
        f"{GPT} --tie --dropout 0.1 --optimizer adamw --batch 25 --microbatches 6 --clip 0.3", write=tokens
    ),
    # An array of several blocks in three layers, which are on one stage or on three.
    "shared": Feature(
        f"{DATA} --model shared:model --optimizer lamb --lr 0.01 --ema 0.8 --batch 9 --microbatches 5 {SHORT}",
        (*ALL, "stages"),
        shared,
    ),
    "tokens-again": Feature(
        f"{GPT} --dropout 0.2 --batch 25 --microbatches 6 --noise-scale", KEPT, tokens, f"{DATA} --recompute", DATA
    ),
    "images-again": Feature(f"{AVERAGES} --dropout 0.1", KEPT, images, f"{DATA} --recompute", DATA),
    "masked": Feature(f"{MASKED} --microbatches 5", ("data", "pipe", "grid", "early"), tokens),
    "masked-whole": Feature(f"{MASKED} --microbatches 1", (), tokens),
    "averages": Feature(AVERAGES, write=images),
    "averages-double": Feature(f"{AVERAGES} --dtype float64", write=images),
    # Most micro-batches are empty, and steps whose only row does not count change nothing.
    "averages-of-a-row": Feature(f"{AVERAGES} --batch 1", write=images),
    # A beginning that is not trained but for its averages, parts in the middle and an end that are not trained.
    "rates": Feature(
        f"{AVERAGES} --rates layers.0=0,layers.1=0,layers.3.layers.2=0,layers.4=0,layers.6=10,layers.9=0",
        (*ALL, "stages"),
        images,
    ),
    "averages-cnn": Feature(f"{AVERAGES} --model cnn", write=images),
    "ema": Feature(f"{AVERAGES} --model cnn --batch 1 --ema 0.8", write=images),
    # Of gradients that are sent before the pass is over, beside running averages, and of labels that do not all count.
    "noise": Feature(
        "--model cnn --norm batch --channels 2 --batch 100 --microbatches 13 --ignore 7 --noise-scale --clip 0.3 "
        f"{SHORT} --log-every 2"
    ),
    # Six leaves of four micro-batches, whose gradients are looked at one by one; fewer than ranks where it goes on.
    "leaf": Feature(f"{DIGITS} --microbatches 24 --leaf 4 --clip 0.3 --noise-scale", (*ALL, *HALVED)),
    # Rounds on whose ends neither evaluations nor saves fall, and of which the last is short.
    "workers": Feature(
        f"{DIGITS} --microbatches 12 --hidden 20,8 --workers 4 --average-every 4 --clip 0.3 --save-every 5 "
        "--eval-every 3 --steps 18",
        (*ALL, "twelve"),
    ),
    # From the middle on, with all that is averaged, and parts that are not trained.
    "diloco": Feature(
        f"{AVERAGES} --model cnn --dropout 0.1 --microbatches 12 --workers 2 --average-every 3 --average-from 4 "
        "--outer-lr 0.7 --outer-momentum 0.9 --ema 0.8 --save-every 6 --rates layers.0=0,layers.4=0 --steps 14",
        (*ALL, "twelve"),
        images,
    ),
    # An array of two layers, on one stage or on two.
    "workers-tied": Feature(
        f"{GPT} --tie --batch 24 --microbatches 6 --workers 2 --average-every 2 --outer-lr 0.7 --outer-momentum 0.9",
        ("pipe", "grid", "resumed"),
        tokens,
    ),
    # More than replicas; many of them have no row in a step, and some in a whole round.
    "workers-without-rows": Feature(
        f"{FEW} --batch 1 --microbatches 24 --leaf 2 --workers 12 --average-every 2 --optimizer momentum "
        "--dtype float64 --log-every 3",
        ("data", "grid", "nodes", "private", "resumed"),
        few_rows,
    ),
    "own": Feature(f"{OWN_FLAGS} --microbatches 6", write=own),
    "own-whole": Feature(f"{OWN_FLAGS} --microbatches 1", (), own),
    "binary": Feature(
        f"--data binary:data --model binary:net --loss bce --metric binary:Drawn --microbatches 5 --batch 9 {SHORT}",
        ("pipe", "nodes", "resumed"),
        lambda here: (here / "binary.py").write_text(BINARY),
    ),
    "empty-29": Feature(f"{FEW} --microbatches 29", write=few_rows),
    "empty-30": Feature(f"{FEW} --microbatches 30", write=few_rows),
    # Of the 30 steps of an epoch about half have no row in any of the four micro-batches.
    "empty-steps": Feature(f"{FEW} --batch 1 --microbatches 4", [kind for kind in ALL if kind != "nodes"], few_rows),
    # Weights of PyTorch for a part of the model; the others are as drawn.
    "another-head": Feature(
        f"{DIGITS} --init {{here}}/body.safetensors --init-partial", ("pipe", "nodes", "private", "resumed"), body
    ),
    "digits": Feature(DIGITS, ROWS),
    "unshuffled": Feature(f"{DIGITS} --shuffle none", ROWS),
    "blocks": Feature(f"{DIGITS} --shuffle blocks --block-rows 3", ROWS),
    # Is over by step 14, saved between the steps of --save-every, and resumed from the best.
    "best": Feature(
        f"{DIGITS} --validation 0.2 --keep-best 2 --patience 3 --keep 1 --lr 0.3 --eval-every 2 --steps 40 --seed 5",
        ("data", "grid", "resumed"),
    ),
    # Much that a run goes on with, at once, in a model with running averages.
    "going-on": Feature(
        f"{DIGITS} --model cnn --norm batch --channels 2 --validation 0.2 --keep-best 2 --keep 1 --patience 6 "
        "--best accuracy --eval-every 2 --ema 0.3 --clip 0.3 --decay linear --lr 0.2 --lr-floor 0.01 --steps 24 "
        "--rates *=0.5,layers.1=0,*.bias=3 --seed 2",
        (*ALL, "halved"),
    ),
    "strided": Feature(f"{DIGITS} --shards strided", ROWS),
    "normalized": Feature(f"{DIGITS} --normalize", ROWS),
    "normalized-strided": Feature(f"{DIGITS} --normalize --shards strided", ROWS),
    "transformed": Feature(NOISY, ROWS, noise),
    "transformed-csv": Feature(f"{NOISY} --data {{here}}", ROWS, noise_and_csv),
    "flowers": Feature(FLOWERS, ROWS, flowers),
    "drawn": Feature(f"{DRAWN} --data {{here}} --look first --classes 3", ROWS, drawing),
    **{name: of_format(name) for name in FORMATS},
}
if importlib.util.find_spec("torch"):
    FLAGS = "--model net:net --batch 100 --lr 0.01 --microbatches 12 --clip 0.3"
    FEATURES["torch"] = Feature(
        f"{FLAGS} {SHORT}", ("grid", "private", "resumed"), lambda here: (here / "net.py").write_text(TORCH)
    )
    FEATURES["torch-rates"] = Feature(
        f"{FLAGS.replace('net', 'rated', 1)} --rates layers.0=0,layers.2=0,layers.6=10 {SHORT}",
        ("pipe", "grid", "resumed"),
        lambda here: (here / "rated.py").write_text(TORCH),
    )
    FEATURES["torch-averages"] = Feature(
        f"{FLAGS.replace('net', 'norms', 1)} {SHORT}",
        ("pipe", "grid", "private", "resumed"),
        lambda here: (here / "norms.py").write_text(NORMS),
    )
    FLAGS = f"{DATA} --model masks:net --loss masks:loss --ignore 255 --normalize --batch 30 --microbatches 6"
    FEATURES["masks"] = Feature(f"{FLAGS} --lr 0.01 {SHORT}", ("pipe", "private", "resumed"), masks)
    FLAGS = "--data items:Rows --model items:net --transform items:noisy --held-out 0.2 --microbatches 6 --batch 20"
    FLAGS += " --normalize"
    FEATURES["items"] = Feature(
        f"{FLAGS} {SHORT}",
        ROWS,
        lambda here: (here / "items.py").write_text(ITEMS),
    )
