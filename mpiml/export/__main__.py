"""`python -m mpiml.export metrics|onnx RUN`: writes what other programs take of a run; no MPI."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mpiml.command import Parser, run_command
from mpiml.errors import ConfigError

PROGRAM = "mpiml.export"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code of an error, or 0."""
    return run_command(PROGRAM, lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    chosen = _parser().parse_args(arguments)
    written, notes = _metrics(chosen) if chosen.command == "metrics" else _onnx(chosen)
    for note in notes:
        print(f"{PROGRAM}: warning: {note}", file=sys.stderr)
    for text in written:
        print(text)
    return 0


def _metrics(chosen: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Write metrics. Returns what has been written, and warnings; as `_onnx`."""
    from mpiml.export import metrics

    written, notes = metrics.export(chosen.run, chosen.to, chosen.out)
    return written, notes


def _onnx(chosen: argparse.Namespace) -> tuple[list[str], list[str]]:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"ONNX files are written by PyTorch ({error}): pip install 'mpiml[onnx]'") from None
    from mpiml.export import onnx

    made = onnx.export(chosen.run, chosen.checkpoint, chosen.model, chosen.out, chosen.raw_weights)
    what = "the average of the weights" if made.average else "the weights"
    checked = "not checked, for there is no onnxruntime"
    if made.difference is not None:
        checked = f"checked: outputs of onnxruntime differ by at most {made.difference:.1g} of the largest"
    text = f"{made.file}: {what} after step {made.step}; {made.inputs} -> {made.outputs}; {checked}"
    return [text], made.notes


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=f"python -m {PROGRAM}", description="Write what other programs take of a run.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="metrics|onnx")
    what = "write the lines of metrics.jsonl for other programs; the run may still be training"
    metrics = commands.add_parser("metrics", help=what, description=f"{what.capitalize()}.", allow_abbrev=False)
    _add_run(metrics)
    forms = "tensorboard: event files; csv: steps.csv and evaluations.csv, for pandas and spreadsheets"
    metrics.add_argument("--to", choices=["tensorboard", "csv"], required=True, help=forms)
    what = "directory to write to (default: RUN/tensorboard, or for csv RUN)"
    metrics.add_argument("--out", type=Path, metavar="DIR", help=what)
    what = "write the model of a run as an ONNX file"
    model = commands.add_parser("onnx", help=what, description=f"{what.capitalize()}.", allow_abbrev=False)
    _add_run(model)
    add = model.add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="a checkpoint, instead of the run's newest")
    what = "your own model, as for mpiml.train (default: as config.toml says); a checkpoint's word is not taken"
    add("--model", metavar="package.module:function", help=what)
    add("--out", type=Path, metavar="FILE", help="file to write (default: RUN/step-....onnx)")
    add("--raw-weights", action="store_true", help="the weights themselves, of a run with --ema too")
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")


if __name__ == "__main__":
    sys.exit(main())
