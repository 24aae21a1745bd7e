"""The job of a part of the check on a GPU: one rank, beside plain PyTorch on the same device. It prints rows as JSON.

`python -m mpiml.bench.gpu_job PART DEVICE ARGUMENTS...`, under mpirun.
"""

from __future__ import annotations

if __name__ == "__main__":
    from mpiml.run import start

    start.begin("mpiml.bench.gpu_job")
    start.start_mpi()

import copy
import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from mpi4py import MPI

from mpiml.bench import gpu_models, pairs
from mpiml.bench.gpu_models import GPT2, SMALL, Size
from mpiml.bench.gpu_rows import COPY, SPEED, Check, speed
from mpiml.bench.pairs import Action
from mpiml.command import plural
from mpiml.config import Config
from mpiml.data.dataset import Dataset
from mpiml.devices import choice
from mpiml.parallel.memory import SharedMemory
from mpiml.run.failure import run_job
from mpiml.run.process import prepare_process
from mpiml.team import Team
from mpiml.training.run import Run, unsaved

if __name__ == "__main__":
    start.begun()

WORLD = MPI.COMM_WORLD
PAIRS = {"cuda": 5, "fake": 1}
SPAN = {"cuda": 0.3, "fake": 0.05}  # seconds of steps that are timed together; of a pretended device speed says nothing
RATE = 1e-4
ROWS = 32  # of a step whose gradients are compared: a power of two, by which a sum is divided without rounding
NEAR = 1e-6  # of the largest element of an array: so far its elements may be from plain PyTorch's
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "--tf32": {"tf32": True},
    "--autocast bfloat16": {"autocast": "bfloat16"},
}


def gradients(kind: str) -> list[Check]:
    """A step of SGD of small models, and the same step by plain PyTorch from the same values on the same rows."""
    import torch

    torch.manual_seed(0)
    models = {  # all are made on the host, before a device is used
        "cnn": (gpu_models.images(), gpu_models.cnn((3, 16, 16), 10, dropout=0.0)),
        "gpt": (gpu_models.tokens(), SMALL.module()),
    }
    return [check for model, made in models.items() for check in gradients_of(kind, model, *made)]


def gradients_of(kind: str, model: str, data: Dataset, module: Any) -> list[Check]:
    """The same of one model."""
    plain = copy.deepcopy(module)
    settings = {"batch": ROWS, "microbatches": 1, "optimizer": "sgd", "lr": 0.1, "eval_every": 0}
    run = unsaved(WORLD, Config(device=kind, steps=9, **settings), data, module)  # type: ignore[arg-type]
    device = run.model.device
    batch: Any = run.data.ahead.batches(1)[0]
    rows = np.array(batch.select())
    run.step(1)
    sum_: Any = run.stage.sum
    ours, theirs = arrays(run, sum_.slots[0]), step_of_torch(plain.to(device.torch), device, data, rows)
    labels = np.float32(ROWS * math.prod(data.train.y.shape))
    slopes = {name: ours[name] / labels for name in theirs[0]}
    values = arrays(run, sum_.values.vector)
    of_model = f"{model}: %s after a step of SGD of {ROWS} rows"
    return [
        near(of_model % "gradients", slopes, theirs[0]),
        near(of_model % "weights and running averages", values, theirs[1]),
    ]


def arrays(run: Run, vector: Any) -> dict[str, np.ndarray]:
    """The parts of a flat vector on the device by their parameters' names."""
    array = run.model.device.array
    return {parameter.name: array(view) for parameter, view in run.model.layouts[0].views(vector)}


def step_of_torch(
    module: Any, device: Any, data: Dataset, rows: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The gradients that plain PyTorch computes, and what the module holds after a step."""
    import torch

    x, y = (torch.from_numpy(source.rows(rows)).to(device.torch) for source in (data.train.x, data.train.y))
    scores = module(x)
    torch.nn.functional.cross_entropy(scores.reshape(-1, scores.shape[-1]), y.flatten()).backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    slopes = {f"layers.{name}": tensor.grad.cpu().numpy() for name, tensor in module.named_parameters()}
    held = {f"layers.{name}": tensor.cpu().numpy() for name, tensor in module.state_dict().items()}
    return slopes, {name: array for name, array in held.items() if array.dtype.kind == "f"}


def near(text: str, ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> Check:
    """How far arrays are from those of plain PyTorch."""
    units, most, where = 0, 0.0, ""
    for name, other in theirs.items():
        own = ours[name].reshape(other.shape)
        units = max(units, int(np.abs(_ordered(own) - _ordered(other)).max()))
        apart = float(np.abs(own - other).max() / (np.abs(other).max() or 1.0))
        apart = math.inf if math.isnan(apart) else apart
        if apart > most:
            most, where = apart, name
    value = (
        f"at most {units:,} units in the last place; {most:.1e} of the largest in {where}" if units else "equal bits"
    )
    figures = {"units_in_the_last_place": float(units), "relative": most}
    return Check("gradients", text, value, f"within {NEAR:g}", most <= NEAR, correctness=True, figures=figures)


def _ordered(array: np.ndarray) -> np.ndarray:
    """Integers in the order of the float32 numbers, neighbours one apart."""
    bits = np.ascontiguousarray(array, np.float32).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


class Loop:
    """The training loop of plain PyTorch, as its users write it: rows travel from page-locked memory.

    Args:
        settings: of torch.optim.AdamW.
        autocast: whether PyTorch may compute in bfloat16.
        deterministic: whether algorithms must be deterministic, as they are in the package.
    """

    def __init__(self, module: Any, device: Any, data: Dataset, rows: int, autocast: bool):
        import torch

        self.module, self._device, self._data, self._rows, self._autocast = module, device, data, rows, autocast
        self._torch, self._order, self._at = torch, np.random.default_rng(1).permutation(len(data.train)), 0
        self.deterministic, self.optimizer = False, self.adamw()

    def adamw(self, **settings: bool) -> Any:
        """An optimizer of the module."""
        return self._torch.optim.AdamW(self.module.parameters(), lr=RATE, **settings)

    def step(self) -> None:
        torch, index = self._torch, self._order[self._at : self._at + self._rows]
        self._at = (self._at + self._rows) % (len(self._order) - self._rows + 1)
        torch.use_deterministic_algorithms(self.deterministic)
        x, y = self._there(self._data.train.x, index), self._there(self._data.train.y, index)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(self._device.torch).type, torch.bfloat16, enabled=self._autocast):
            scores = self.module(x)
            loss = torch.nn.functional.cross_entropy(scores.flatten(0, -2), y.flatten())
        loss.backward()
        self.optimizer.step()
        torch.use_deterministic_algorithms(True)

    def _there(self, source: Any, index: np.ndarray) -> Any:
        rows = self._torch.from_numpy(source.rows(index))
        if self._device.kind == "cuda":
            return rows.pin_memory().to(self._device.torch, non_blocking=True)
        return self._device.tensor(rows)


def speeds(kind: str, *precisions: str) -> list[Check]:
    """Samples/s of a step with AdamW over those of plain PyTorch's loop, in turn."""
    import torch

    torch.manual_seed(0)
    size = GPT2 if kind == "cuda" else SMALL
    module = size.module()  # on the host, before a device is used
    rows = fitting(opened(kind).memory()[1])
    return [check for precision in precisions for check in speeds_of(kind, size, module, rows, precision)]


def speeds_of(kind: str, size: Size, module: Any, rows: int, precision: str) -> list[Check]:
    """The same in one precision, one of PRECISIONS."""
    data = Dataset.from_arrays(*size.rows(8 * rows), *size.rows(1))
    settings = {"batch": rows, "microbatches": 1, "optimizer": "adamw", "lr": RATE, "classes": size.tokens}
    settings |= {"device": kind, "steps": 10**9, "eval_every": 0} | PRECISIONS[precision]
    plain = copy.deepcopy(module)
    run = unsaved(WORLD, Config(**settings), data, copy.deepcopy(module))  # type: ignore[arg-type]
    loop = Loop(plain.to(run.model.device.torch), run.model.device, data, rows, "autocast" in settings)
    against = duel(run, loop, kind, rows)
    of_model = f"gpt of {size.parameters / 1e6:.3g} M parameters, {plural(rows, 'row')} of {size.places} tokens"
    what = f"{of_model}, {precision}: samples/s / plain PyTorch's"
    checks = [against(what, SPEED)]
    loop.deterministic = True
    checks.append(against(f"{what} with deterministic algorithms", None))
    loop.deterministic, loop.optimizer = False, loop.adamw(fused=True)
    return [*checks, against(f"{what} with its fused AdamW", None)]


def duel(run: Run, loop: Loop, kind: str, rows: int) -> Callable[[str, float | None], Check]:
    """What times steps of a run and of plain PyTorch's loop, as it is then, in turn, and makes a row of that."""
    device, steps = run.model.device, itertools.count(1)
    step = together(lambda: run.step(next(steps)), 1, device)
    step()
    repeats = max(1, int(SPAN[kind] / pairs.seconds(step, 1)))
    ours, theirs = together(lambda: run.step(next(steps)), repeats, device), together(loop.step, repeats, device)

    def against(what: str, at_least: float | None) -> Check:
        ratio = pairs.ratio(WORLD, theirs, ours, 1, pairs=PAIRS[kind])
        each = rows * repeats / pairs.seconds(ours, 1)
        more = f"; {each:,.1f} samples/s"
        return speed("speed", what, ratio, more, marked(kind, at_least), samples_per_second=each)

    return against


def marked(kind: str, at_least: float | None) -> float | None:
    """A mark of speed; a pretended device has none."""
    return at_least if kind == "cuda" else None


def opened(kind: str) -> Any:
    """The first device of that kind."""
    everyone = [choice.candidate(kind, [0], 0)]
    choice.check(kind, everyone, False)
    return choice.opened(kind, everyone, 0, False)


def fitting(memory: int) -> int:
    """So many rows of `GPT2` that a step of float32, and two copies of the model, are well within the memory."""
    return next(rows for rows, least in ((12, 60e9), (4, 20e9), (1, 0)) if memory >= least)


def together(step: Callable[[], object], repeats: int, device: Any) -> Action:
    """So many steps, which are over when the device has done them."""

    def action() -> None:
        for _ in range(repeats):
            step()
        device.wait()

    return action


def transfers(kind: str) -> list[Check]:
    """`fetch` and `put` of a vector as long as the model of which speed is measured, against a copy by PyTorch between
    the device and memory that PyTorch has page-locked."""
    import torch

    device = opened(kind)
    length = GPT2.parameters if kind == "cuda" else 10**6
    there = device.vectors.zeros(length, np.float32)
    memory = SharedMemory(WORLD, 2 * 4 * length + 4096, 0)  # as a node's ranks have it
    ((locked, unlocked),) = memory.own(2, length, np.float32)
    locked[...] = unlocked[...] = 1
    device.lock(locked)
    pinned = torch.ones(length, pin_memory=kind == "cuda")
    copies = {
        "fetch": lambda: pinned.copy_(there, non_blocking=True),
        "put": lambda: there.copy_(pinned, non_blocking=True),
    }
    checks = []
    for array, how, at_least in ((locked, "page-locked", COPY), (unlocked, "through a staging buffer", None)):
        if how == "page-locked" and device.locked < array.nbytes:
            checks.append(Check("transfers", "memory that ranks share can be page-locked", "no", "yes", False))
        verbs = {"fetch": (there, array), "put": (array, there)}
        for verb, ends in verbs.items():
            own = together(lambda verb=verb, ends=ends: getattr(device, verb)(*ends), 1, device)  # type: ignore[misc]
            plain = together(copies[verb], 1, device)
            ratio = pairs.ratio(WORLD, plain, own, 3, pairs=PAIRS[kind])
            spent = pairs.milliseconds(WORLD, own, 3).median
            more = f"; {spent:.1f} ms, {array.nbytes / spent / 1e6:.1f} GB/s"
            text = f"{verb} of {array.nbytes / 1e6:,.0f} MB, {how}: rate / of a copy by PyTorch from locked memory"
            checks.append(speed("transfers", text, ratio, more, marked(kind, at_least), milliseconds=spent))
    device.free()
    return checks


PARTS: dict[str, Callable[..., list[Check]]] = {"gradients": gradients, "speed": speeds, "transfers": transfers}


def measure(team: Team, part: str, *arguments: str) -> None:
    """Look at a part and print its rows."""
    prepare_process(1)
    print(json.dumps([asdict(check) for check in PARTS[part](*arguments)]), flush=True)


def main() -> int:
    """The job. Returns the exit code."""
    return run_job("mpiml.bench.gpu_job", lambda team: measure(team, *sys.argv[1:]))


if __name__ == "__main__":
    start.end(main())
