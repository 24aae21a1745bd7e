"""The rows of the benchmark: the measurement of each, its ranks, and the ratio to reach."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Widths of hidden layers so small that a step is mostly overhead.
SMALL_LAYERS = "128-127-126-125-124-123"
FRESH = "in a fresh process: rate / after a large product"


@dataclass(frozen=True)
class Ratio:
    """The ratio of two figures, measured several times: its median, and the range of the middle half."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: list[float]) -> Ratio:
        low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else 3 * ratios
        return cls(median, low, high)


@dataclass(frozen=True)
class Row:
    """A row.

    Attributes:
        call: the name of the measurement and its arguments (mpiml.bench.measurements); or "start" and what to start.
        at_most, at_least: the ratio to reach.
        nodes: ranks of each pretended node, as in MPIML_NODES.
        jobs: how many jobs; of several, each gives one figure instead of one for each pair.
        sides: 2 if each side of the comparison has so many ranks for itself, as its processes differ.
        avx512: whether the products of matrices of both sides may use AVX-512.
    """

    group: str
    text: str
    ranks: int
    call: tuple[str, ...]
    at_most: float | None = None
    at_least: float | None = None
    nodes: str = ""
    jobs: int = 1
    sides: int = 1
    avx512: bool = True

    @property
    def needs(self) -> str | None:
        """The package that the row needs and that is not installed, if any."""
        used = {"torch": self.call[0].startswith("torch"), "h5py": "hdf5" in self.call}
        return next((name for name in used if used[name] and not importlib.util.find_spec(name)), None)

    def verdict(self, median: float) -> str:
        """Whether the ratio is reached; empty for rows without one."""
        if self.at_most is not None:
            return f"at most  {self.at_most:4.2f}  {'reached' if median <= self.at_most else 'MISSED'}"
        if self.at_least is not None:
            return f"at least {self.at_least:4.2f}  {'reached' if median >= self.at_least else 'MISSED'}"
        return ""


STEP = "one rank's step: time / time of NumPy by hand"
LAYERS = "forward, backward and update on one core: samples/s / PyTorch's"
SUM = "all-reduce of the gradient: time / time of MPI_Allreduce"
RECORD = "the step record: time / time of MPI_Allreduce of the losses and weights of all micro-batches, and math.fsum"
DATA = "data-parallel training"
MODULES = "a PyTorch module: samples/s / PyTorch's"
LOOP = "PyTorch's loop with mpiml.torch.DataParallel: samples/s / of another loop"
PIPE = "pipeline"
SAVES = "a checkpoint of 286 MB, 784-4500-4500-10 with Adam, on a local disk"
FILES = "training on shuffled rows of a file of 200 MB: samples/s / on the same rows in memory"
OTHER = "start and memory"

ROWS = [
    *(
        Row(STEP, f"784-{h}-{h}-10, batch {b}", 1, ("by_hand", f"{h}-{h}", b, "1", "momentum"), at_most=1.10)
        for h, b in (("64", "64"), ("256", "64"), ("1024", "64"), ("2048", "128"))
    ),
    Row(
        STEP,
        "784-64-64-10 by hand, with a look whether loss and gradients are finite / without",
        1,
        ("hand_checked", "64-64", "64"),
    ),
    Row(STEP, "many small layers, batch 128, M = 4", 1, ("by_hand", SMALL_LAYERS, "128", "4", "sgd"), at_most=1.25),
    Row(STEP, "page faults of a step, 784-2048-2048-10", 1, ("page_faults", "2048-2048", "128"), at_most=1.0),
    Row(STEP, "with --trace / without, 784-256-256-10, batch 256, M = 4", 1, ("traced", "256-256", "256", "4"), 1.03),
    *(
        Row(LAYERS, text, 1, ("torch_step", images, *model), at_least=least)
        for text, images, model, least in (
            ("mlp 784-256-256-10, 64 rows", "channels_last", ("mlp", "256", "64"), 1.05),
            ("mlp 784-1024-1024-10, 64 rows", "channels_last", ("mlp", "1024", "64"), 1.05),
            ("mlp 784-2048-2048-10, 128 rows", "channels_last", ("mlp", "2048", "128"), 1.05),
            ("gpt, 4 blocks of width 256, 8 rows of 128 tokens", "channels_last", ("gpt",), 1.05),
            ("cnn, 64 images of 28 x 28, PyTorch's in channels_last", "channels_last", ("cnn",), 0.6),
            ("cnn, 64 images of 28 x 28, PyTorch's in its default format", "contiguous_format", ("cnn",), None),
        )
    ),
    Row(
        LAYERS, "that cnn's products of matrices alone / PyTorch's whole step in channels_last", 1, ("torch_products",)
    ),
    Row(
        LAYERS,
        "that cnn, PyTorch's in channels_last, both sides without AVX-512",
        1,
        ("torch_step", "channels_last", "cnn"),
        at_least=0.9,
        avx512=False,
    ),
    Row(LAYERS, "that gpt with --recompute: time / without", 1, ("recomputed",), at_most=1.40),
    Row(LAYERS, "that gpt: memory / PyTorch's, a process each", 2, ("torch_memory",), at_most=1.2),
    *(
        Row(SUM, f"{size} with SGD, node memory shared", ranks, ("allreduce", mb, "update", "shared"), at_most=limit)
        for ranks in (2, 4)
        for size, mb, limit in (("64 MB", "64", 0.30), ("256 kB", "0.25", 0.40))
    ),
    *(
        Row(SUM, "64 MB with SGD, node memory shared / its additions and updates alone", ranks, ("passes", "64"))
        for ranks in (2, 4)
    ),
    *(
        Row(SUM, f"{mb} MB, private memory", ranks, ("allreduce", mb, "bare", "private"))
        for ranks in (2, 4)
        for mb in ("1", "4", "16", "64")
    ),
    *(Row(SUM, f"{mb} MB, private memory, by hand", 2, ("sum_by_hand", mb)) for mb in ("1", "4", "16", "64")),
    *(
        Row(SUM, f"{size} with SGD, two nodes", 4, ("allreduce", mb, "update", "shared"), at_most=limit, nodes="2,2")
        for size, mb, limit in (("64 MB", "64", None), ("256 kB", "0.25", 1.5))
    ),
    *(
        Row(SUM, f"mpiml.api.Sum of {size}, {how}", ranks, ("own_sum", mb, how), at_most=limit, sides=2)
        for size, mb, how, limits in (
            ("64 MB", "64", "without copies", (0.42, 0.30)),
            ("64 MB", "64", "with copies", (0.70, 0.70)),
            ("256 kB", "0.25", "without copies", (0.60, 0.60)),
            ("256 kB", "0.25", "with copies", (None, None)),
        )
        for ranks, limit in zip((2, 4), limits, strict=True)
    ),
    *(
        Row(SUM, f"{text}: bytes/s / of all ranks copying", ranks, ("bandwidth", "64", what), at_least=least)
        for text, what, least in (("64 MB", "sum", 0.90), ("64 MB with SGD", "update", None))
        for ranks in (2, 4)
    ),
    Row(RECORD, "M = 16", 2, ("record", "16")),
    Row(RECORD, "M = 16, two nodes", 4, ("record", "16"), nodes="2,2"),
    Row(RECORD, "M = 64,000", 2, ("record", "64000"), at_most=1.0),
    Row(RECORD, "M = 64,000: milliseconds", 2, ("record_milliseconds", "64000"), at_most=1.0),
    *(
        Row(DATA, f"784-{h}-{h}-10, {b} rows a rank: samples/s / PyTorch's", 2, ("torch_ddp", f"{h}-{h}", b), None, x)
        for h, b, x in (("256", "64", 2.5), ("1024", "64", 2.0), ("2048", "128", 1.5))
    ),
    *(
        Row(DATA, f"the same, {text}, H = {h}", 2, ("weak_scaling", f"{h}-{h}", b, how), None, least)
        for text, how, least in (
            ("weak-scaling efficiency", "together", 0.95),
            ("of ranks that share no data but meet at every step", "apart", None),
        )
        for h, b in (("256", "64"), ("1024", "64"), ("2048", "128"))
    ),
    Row(
        DATA,
        "784-256-256-10, 64 rows a rank: samples/s of workers between averages / of ranks that each train alone",
        2,
        ("workers", "256-256", "64", "500", "apart"),
        at_least=0.97,
    ),
    Row(
        DATA,
        "the same, averages every 4 steps, two nodes / sums at every step",
        2,
        ("workers", "256-256", "64", "4", "together"),
        nodes="1,1",
    ),
    Row(
        DATA,
        "many small layers, M = 16: samples/s of 16 ranks / of one",
        16,
        ("oversubscribed", SMALL_LAYERS, "128", "16"),
        at_least=0.30,
    ),
    *(
        Row(MODULES, f"{text}, {how}", ranks, ("torch_module", model, against), at_least=least)
        for text, model, ahead in (
            ("mlp 784-1024-1024-10, 64 rows a rank", "mlp", 1.4),
            ("resnet with GroupNorm, 32 images of 32 x 32 a rank", "resnet", 1.05),
            ("gpt, 4 blocks of width 256, 8 rows of 128 tokens a rank", "gpt", 1.05),
        )
        for how, ranks, against, least in (
            ("in one process", 1, "plain", 0.97),
            ("data-parallel over gloo", 2, "distributed", ahead),
            ("two processes that never communicate", 2, "apart", None),
        )
    ),
    Row(
        MODULES,
        "that mlp, PyTorch's loop with a flat vector and NumPy's update, in one process",
        1,
        ("torch_flat", "mlp"),
    ),
    *(
        Row(LOOP, f"{text}{how}", ranks, ("torch_own_loop", model, rows, against), at_least=least, sides=2)
        for text, model, rows, ahead in (
            ("mlp 784-1024-1024-10, 64 rows a rank", "mlp", "64", 1.3),
            ("resnet with GroupNorm, 16 images of 32 x 32 a rank", "resnet", "16", 1.1),
            ("gpt, 4 blocks of width 256, 4 rows of 128 tokens a rank", "gpt", "4", 1.1),
            ("200 small parameters, 64 rows a rank", "small", "64", 1.3),
        )
        for how, ranks, against, least in (
            (" / with DistributedDataParallel over gloo", 2, "distributed", ahead),
            (" / of ranks that never communicate", 2, "apart", None),
            (", one process / plain PyTorch", 1, "apart", 0.98),
        )
    ),
    *(
        Row(PIPE, f"8 x Linear({h}) + ReLU, batch {b}: samples/s / PyTorch's", 2, ("torch_pipeline", h, b), at_least=x)
        for h, b, x in (("256", "256", 1.6), ("512", "256", 1.4), ("1024", "512", 1.0))
    ),
    Row(PIPE, "throughput / that of one rank x 2 x (1 - bubble)", 2, ("pipeline", "1024", "1024", "8"), at_least=0.90),
    Row(
        PIPE,
        "zb-h1, H = 1024, M = 4 of 256 rows: time by the simulator, from that of each pass / measured",
        2,
        ("simulated", "1024", "1024", "4", "zb-h1"),
        at_least=0.95,
    ),
    Row(
        PIPE,
        "zb-h1, H = 1024, M = 4 of 256 rows: samples/s / those of 1F1B",
        2,
        ("schedules", "1024", "1024", "4", "zb-h1"),
    ),
    *(
        Row(SAVES, text, 2, call, at_most, at_least)
        for text, call, at_most, at_least in (
            ("saved while training waits: bytes/s / of dd or SHA-256, the slower here", ("save", "4500"), None, 0.8),
            ("saved in the background: milliseconds that training stands still", ("save_stall", "4500"), 110, None),
            (
                "steps meanwhile, with all cores busy: time / without",
                ("save_beside", "4500", "measured"),
                1.05,
                None,
            ),
            ("the same, if only the CPU time of a save were added", ("save_beside", "4500", "least"), None, None),
            ("read and verified: bytes/s / of SHA-256", ("resume", "4500"), None, 0.8),
        )
    ),
    *(
        Row(FILES, text, 1, ("from_file", name, "200"), at_least=least)
        for text, name, least in (
            ("784-64-64-10, .npy", "npy", 0.90),
            ("784-64-64-10, .npz", "npz", 0.90),
            ("784-64-64-10, MNIST's format", "idx", 0.90),
            ("784-64-64-10, HDF5 in one piece", "hdf5", 0.90),
            ("256-64-256 by token, tokens of 16 bits", "tokens", 0.90),
            ("784-64-64-10, compressed .npz", "npz_compressed", None),
            ("784-64-64-10, .npy in column order", "npy_columns", None),
        )
    ),
    *(
        Row(OTHER, f"{' x '.join(shape)} {FRESH}", 1, ("small_product", *shape), at_least=0.95, jobs=9)
        for shape in (("32", "256", "256"), ("64", "784", "256"))
    ),
    Row(OTHER, "train --steps 1: time / NumPy, mpi4py, one Allreduce", 16, ("start", "train"), at_most=1.3),
    Row(OTHER, "of it, importing train beside these", 16, ("start", "import")),
    Row(OTHER, "of it, importing empty modules in the place of the package's", 16, ("start", "empty")),
    Row(OTHER, "100 M parameters, Adam: resident / what is needed", 4, ("memory", "1e8"), at_most=1.10),
]


def table(report: Mapping[str, Any]) -> str:
    """The figures that --json has written as a Markdown table, with the ratios to reach from ROWS."""
    figures = {(row["group"], row["text"], row["ranks"]): row for row in report["rows"]}
    lines, group = ["| measured | ranks | ratio (middle half) | to reach |", "|---|---:|---|---|"], ""
    for row in ROWS:
        if row.group != group:
            group = row.group
            lines.append(f"| **{group}** | | | |")
        result = figures.get((row.group, row.text, row.ranks), {"error": "not measured"})
        verdict = " ".join(row.verdict(result["median"]).split()) if "median" in result else ""
        lines.append(f"| {row.text} | {row.ranks} | {figure(result)} | {verdict} |")
    return "\n".join(lines)


def figure(result: Mapping[str, Any]) -> str:
    """A result of jobs.measure_row as text."""
    return result.get("error") or f"{result['median']:.2f} ({result['low']:.2f} to {result['high']:.2f})"
