"""The model of a run as an ONNX file: from inputs as the run's data hold them to the model's outputs.

PyTorch writes it, from a module that does the same; onnxruntime, if it is there, checks it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpiml.config import Config
from mpiml.data.fill import Filling
from mpiml.data.normalize import Normalization
from mpiml.errors import ConfigError, OutputError
from mpiml.nn.torch_equivalents import module_of, takes_ids
from mpiml.nn.torch_tensors import one_line
from mpiml.run import checkpoint, step_files
from mpiml.run.directory import CHECKPOINTS, CONFIG, named_errors, replacing
from mpiml.training.export import trained
from mpiml.training.saved import code_of, settings_in, settings_of
from mpiml.training.task import Task

INPUT, OUTPUT, ROWS = "inputs", "outputs", "rows"  # names in the file: of the arrays, and of their first axis
CLOSE = 1e-4  # of the largest output, by which what onnxruntime computes may differ
TRIED = (3, 1)  # numbers of rows that it is checked with


@dataclass(frozen=True)
class Exported:
    """What has been written.

    Attributes:
        difference: between outputs of onnxruntime and of PyTorch, the largest by the largest output; None if there is
            no onnxruntime.
    """

    file: Path
    step: int
    average: bool
    inputs: str
    outputs: str
    difference: float | None
    notes: list[str]


class Whole(nn.Module):
    """A model with what is done to its inputs before: gaps filled, then normalised in float64, as in the run."""

    def __init__(self, model: nn.Module, arrays: dict[str, Any], dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype
        self.fills, self.normalizes = Filling.NAMES[0] in arrays, Normalization.NAMES[0] in arrays
        for name, array in arrays.items():
            self.register_buffer(name.replace(".", "_"), torch.from_numpy(np.array(array)))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.fills:
            inputs = torch.where(inputs.isnan(), self.data_fill.to(inputs.dtype), inputs)
        if self.normalizes:
            inputs = ((inputs.double() - self.data_mean) * self.data_scale).to(self.dtype)
        y: Tensor = self.model(inputs)
        return y


def export(run: Path, file: Path | None, model: str | None, out: Path | None, raw: bool) -> Exported:
    """Write the model of a run's newest checkpoint, or of the checkpoint `file`, as ONNX to `out`.

    `model` is where the user's own code is; by default where config.toml says. Of a run with --ema it is the average of
    the weights, unless they are wanted `raw`.

    Raises ConfigError for a model that cannot be exported, or that names code which the user has not, OutputError for
    what cannot be read or written.
    """
    _check_exporter()
    if not run.is_dir():
        what = "is not a directory" if run.exists() else "does not exist"
        raise OutputError(f"{run} {what}; give the directory of a run, as runs/digits-mlp-001")
    file, notes = (file, []) if file else _newest(run)
    if model is None and (run / CONFIG).exists():
        model = code_of(settings_in(run / CONFIG)).get("model")
    saved = checkpoint.load(file, lambda name: name.startswith("data."))
    task, config = Task.of_checkpoint(saved), settings_of(saved, ("model",), {"model": model})
    if task.inputs:
        raise ConfigError(f"{file}: rows have the inputs {task.shapes}; a model with one input can be exported")
    average = bool(config.ema) and not raw
    layers, shape = trained(file, model, average)
    ids = takes_ids(layers, shape)
    whole = Whole(module_of(layers, shape), _prepares(config, saved.arrays), _dtype(config))
    example = _example(max(TRIED), shape, ids, task, config)
    out = out or run / f"{file.stem}.onnx"
    _write(whole, example, out)
    y = whole(example)
    return Exported(
        out,
        saved.step,
        average,
        f"{INPUT} {example.numpy().dtype} ({ROWS}, {', '.join(map(str, shape))})",
        f"{OUTPUT} {config.dtype} ({ROWS}, {', '.join(map(str, y.shape[1:]))})",
        _difference(whole, example, out),
        notes,
    )


def _check_exporter() -> None:
    """Raise ConfigError unless the libraries are there that PyTorch's exporter needs."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"ONNX files are written by onnx and onnxscript ({error}): pip install 'mpiml[onnx]'"
        ) from None


def _newest(run: Path) -> tuple[Path, list[str]]:
    """A run's newest whole checkpoint, and warnings about newer ones."""
    directory = run / CHECKPOINTS
    if not directory.is_dir():
        raise OutputError(f"{run} is not the directory of a run: there is no {CHECKPOINTS} in it")

    def load(path: Path) -> Path:
        checkpoint.load(path, checkpoint.is_of_model)
        return path

    file, problems = step_files.newest(directory, load)
    if not file:
        raise OutputError(f"{run} has no checkpoint yet")
    return file, [f"skipped {problem}" for problem in problems]


def _prepares(config: Config, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a checkpoint with which inputs are filled and normalised."""
    names = [*(Filling.NAMES if config.fill is not None else ()), *(Normalization.NAMES if config.normalize else ())]
    if missing := [name for name in names if name not in arrays]:
        raise OutputError(f"the checkpoint has no {missing[0]}, which its settings need: it is damaged")
    return {name: arrays[name] for name in names}


def _dtype(config: Config) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype


def _example(rows: int, shape: Sequence[int], ids: bool, task: Task, config: Config) -> Tensor:
    """Rows of inputs."""
    random = np.random.default_rng(0)
    if ids:
        return torch.from_numpy(random.integers(0, max(task.vocabulary, 1), (rows, *shape)))
    return torch.from_numpy(random.random((rows, *shape)).astype(config.dtype))


def _write(module: nn.Module, example: Tensor, out: Path) -> None:
    """Write a module as a file, whose first axis may have any length. Raises ConfigError if PyTorch cannot."""
    size = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    if size >= 1 << 31:
        raise ConfigError(f"the model has {size / 1e9:.1f} GB, and one ONNX file holds at most 2; nothing is written")
    try:
        with _silent():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim(ROWS)},),
            )
        assert program is not None, "the exporter that returns a program was asked for"
        content = program.model_proto.SerializeToString()
    except Exception as error:  # of whatever the exporter meets in a user's module
        raise ConfigError(f"PyTorch cannot export the model: {one_line(error.__cause__ or error)}") from error
    with named_errors("create the directory of", out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as file:
        file.write(content)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Within the block nobody hears of the exporter's inner affairs."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        streams = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        with warnings.catch_warnings(), streams[0], streams[1], torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _difference(module: nn.Module, example: Tensor, file: Path) -> float | None:
    """As Exported.difference. Raises OutputError if it is large: then the file is removed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    largest = 0.0
    for rows in TRIED:
        x = example[:rows]
        with torch.no_grad():
            ours = module(x).numpy().astype(np.float64)
        (theirs,) = session.run([OUTPUT], {INPUT: x.numpy()})
        largest = max(largest, float(np.abs(theirs - ours).max() / max(np.abs(ours).max(), 1e-30)))
    if not largest <= CLOSE:
        file.unlink()
        raise OutputError(
            f"{file} is removed: in onnxruntime its outputs differ by {largest:.2g} of the largest from PyTorch's"
        )
    return largest
