"""A gpt trained on the bytes of Python's standard library, compared with a bigram model fitted to the same bytes.

`mpirun -n 4 python -m mpiml.examples.gpt_stdlib` takes about a minute on 2 cores; settings of mpiml.train may follow.
They change gpt_stdlib.toml, beside this file, or another file that `--config` names: nanogpt.toml, say.
The exit code is 1 if the gpt's loss on the held-out bytes is not below the bigram model's.
"""

from __future__ import annotations

if __name__ == "__main__":
    from mpiml.run import start

    start.begin("mpiml.examples.gpt_stdlib")
    start.start_mpi()

import glob
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml.api import Config, DataError, Dataset, Options, Split, open_dataset, train
from mpiml.clock import Clock
from mpiml.config import parse
from mpiml.run.failure import Guard, exit_code
from mpiml.team import Team

PROGRAM = "mpiml.examples.gpt_stdlib"
SETTINGS = Path(__file__).with_suffix(".toml")  # unless --config names others
BYTES = 256
UNSEEN = 0.1  # added to the count of every pair of bytes, so that no pair has probability 0


def settings(arguments: Sequence[str]) -> Config:
    """The example's settings, changed by the command line's. Raises DataError if the standard library is missing."""
    library = sysconfig.get_path("stdlib")
    sources = os.path.join(glob.escape(library), "*.py")
    config = parse(["--config", str(SETTINGS), "--data", sources, *arguments], PROGRAM)
    if config.data == sources and not glob.glob(sources):
        raise DataError(
            f"there are no .py files in {library}, where Python's standard library should be (it may be in an archive "
            "instead); name another text with --data 'src/**/*.py'"
        )
    return config


def bigram_loss(dataset: Dataset) -> float:
    """The loss on the test rows, in nats per byte, of a model that predicts from pairs counted in the training rows."""
    train, test = pairs(dataset.train) + UNSEEN, pairs(dataset.test)
    log_likelihood = np.log(train / train.sum(axis=1, keepdims=True))
    return float(-(test * log_likelihood).sum() / test.sum())


def pairs(split: Split) -> NDArray[np.float64]:
    """How often each byte (row) is followed by each byte (column)."""
    counts = np.zeros(BYTES * BYTES)
    for rows in np.array_split(np.arange(len(split)), len(split) // 1000 + 1):
        x, y = split.x.rows(rows).astype(np.intp), split.y.rows(rows).astype(np.intp)
        counts += np.bincount((BYTES * x + y).ravel(), minlength=len(counts))
    return counts.reshape(BYTES, BYTES)


def compare(config: Config, loss: float) -> bool:
    """Print both models' losses on the held-out bytes. Returns whether the gpt's is lower."""
    dataset = open_dataset(config.data, Options(context=config.context, held_out=config.held_out))
    bigram = bigram_loss(dataset)
    verdict = "the gpt is below" if loss < bigram else "the gpt is NOT below"
    print(f"held-out loss in nats per byte: gpt {loss:.3f}, bigram model {bigram:.3f}: {verdict}", flush=True)
    return loss < bigram


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    team = Team(MPI.COMM_WORLD, Clock())
    try:
        with Guard(team, PROGRAM):
            config = team.together(lambda: settings(sys.argv[1:] if arguments is None else arguments))
        result = train(config, team.comm)
        if result["status"] != "done" or "test_loss" not in result:
            return int(result["exit_code"])
        with Guard(team, PROGRAM):
            return int(not team.on_rank_0(lambda: compare(config, result["test_loss"])))
    except BaseException as error:  # reported already
        return exit_code(error)


if __name__ == "__main__":
    start.begun()
    start.end(main())
