"""A gpt that reads the bytes of Python's standard library, beside a bigram model that was fitted to the same bytes.

`mpirun -n 4 python -m mpiml.examples.gpt_stdlib`: about a minute on 2 cores. Settings of mpiml.train may follow. The
exit code is 1 if the gpt, on the bytes held out, is no better than the bigram model.
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

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpiml.api import Config, DataError, Dataset, Options, Split, open_dataset, train
from mpiml.clock import Clock
from mpiml.config import parse
from mpiml.run.failure import Guard, exit_code
from mpiml.team import Team

PROGRAM = "mpiml.examples.gpt_stdlib"
SETTINGS = (
    "--model gpt --context 64 --held-out 0.05 --steps 500 --batch 32 --microbatches 4 --lr 0.003 --warmup-steps 30 "
    "--decay cosine --clip 1 --save-every 0"
)
BYTES = 256
UNSEEN = 0.1  # is added to how often one byte follows another: none is impossible


def settings(arguments: Sequence[str]) -> Config:
    """The settings of the example, and what the command line makes of them.

    Raises DataError if there is no standard library to read.
    """
    library = sysconfig.get_path("stdlib")
    sources = os.path.join(glob.escape(library), "*.py")
    config = parse([*SETTINGS.split(), "--data", sources, *arguments], PROGRAM)
    if config.data == sources and not glob.glob(sources):
        raise DataError(
            f"there are no .py files in {library}, where Python says that its standard library is (it may lie in an "
            "archive); name another text with --data 'src/**/*.py'"
        )
    return config


def bigram_loss(dataset: Dataset) -> float:
    """Nats per byte, over the test rows, of a model that knows how often a byte follows another in training."""
    seen, asked = pairs(dataset.train) + UNSEEN, pairs(dataset.test)
    log_likelihood = np.log(seen / seen.sum(axis=1, keepdims=True))
    return float(-(asked * log_likelihood).sum() / asked.sum())


def pairs(split: Split) -> NDArray[np.float64]:
    """How often each byte (row) is followed by each other one (column)."""
    counts = np.zeros(BYTES * BYTES)
    for rows in np.array_split(np.arange(len(split)), len(split) // 1000 + 1):
        x, y = split.x.rows(rows).astype(np.intp), split.y.rows(rows).astype(np.intp)
        counts += np.bincount((BYTES * x + y).ravel(), minlength=len(counts))
    return counts.reshape(BYTES, BYTES)


def compare(config: Config, loss: float) -> bool:
    """Say which model knows the held-out bytes better; whether it is the gpt."""
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
