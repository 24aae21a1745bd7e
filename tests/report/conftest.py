"""Run directories as jobs leave them, written by hand: each test says what is special about its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mpiml.clock import SHARES

ROWS = 120  # of a step
STEPS_PER_EPOCH = 12


def step_line(step: int, speed: float = 1200.0, **fields: Any) -> dict[str, Any]:
    """A line of a step that took 0.1 seconds."""
    seconds = {name: {"min": 0.01, "max": 0.02 * (place + 1)} for place, name in enumerate(SHARES)}
    line = {"step": step, "epoch": (step - 1) // STEPS_PER_EPOCH + 1, "loss": 2.0 / step, "accuracy": 1 - 1 / step}
    more = {"learning_rate": 0.001, "gradient_norm": 1.0, "samples_per_second": speed, "seconds": seconds}
    return {**line, **more, **fields}


def evaluation_line(step: int, loss: float = 0.5) -> dict[str, Any]:
    epoch = (step - 1) // STEPS_PER_EPOCH + 1
    return {"step": step, "epoch": epoch, "evaluation": {"loss": loss, "accuracy": 0.75, "rows": 360}}


LINES = [*map(step_line, range(1, 25)), evaluation_line(24)]
ENVIRONMENT = {
    "mpiml": "0.1.0",
    "mpi": "MPICH 5.0.2",
    "packages": {"numpy": "2.4.6"},
    "data": [["x_train", "1,440 rows of (8, 8) float16"], ["x_test", "360 rows of (8, 8) float16"]],
    "ranks": [{"host": "n1", "cpu": "A", "blas": "B", "cores": 2, "threads": 1}],
    "jobs": [{"after": 0, "ranks": 4, "pipe": 2, "steps_per_epoch": STEPS_PER_EPOCH, "rows_per_step": float(ROWS)}],
}
RESULT = {"status": "done", "reason": None, "step": 24, "ranks": 4, "pipe": 2, "weights_sha256": "abcdef0123456789"}
CONFIG = 'model = "mlp"\nbatch = 120\nsteps = 24\nlr = 0.001\n'

Make = Callable[..., Path]


@pytest.fixture
def made(tmp_path: Path) -> Make:
    """`made("name", lines=[...])` is a run directory of that name."""

    def make(
        name: str = "run",
        lines: Sequence[dict[str, Any]] = LINES,
        config: str | None = CONFIG,
        environment: dict[str, Any] | None = ENVIRONMENT,
        result: dict[str, Any] | None = RESULT,
        checkpoints: Sequence[int] = (),
    ) -> Path:
        run = tmp_path / name
        (run / "checkpoints").mkdir(parents=True)
        for step in checkpoints:
            (run / "checkpoints" / f"step-{step:09d}.safetensors").touch()
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for file, content in (("environment.json", environment), ("result.json", result)):
            if content is not None:
                (run / file).write_text(json.dumps(content))
        if config is not None:
            (run / "config.toml").write_text(config)
        return run

    return make
