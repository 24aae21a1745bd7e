"""What a plan says of memory on devices: against numbers worked out by hand, and against runs on pretended devices."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mpiml.config import parse
from mpiml.errors import ConfigError
from mpiml.plan.screen import screen
from mpiml.plan.sizing import Plan, plan
from mpiml.training.job import Job, job_of
from mpiml.training.resolve import open_data
from tests.conftest import launch

pytest.importorskip("torch")
MODEL = "--model tests.plan.on_devices:perceptron --seed 3"


def job(ranks: int, flags: str = "", node_ranks: int = 0, devices: int | None = None, kind: str = "cuda") -> Job:
    config = parse([*MODEL.split(), "--device", kind, *flags.split()], "test")
    return job_of(config, ranks, node_ranks or ranks, open_data(config), devices)


def made(*given: Any, **named: Any) -> Plan:
    return plan(job(*given, **named), "digits")


def on_host(stage: Any) -> tuple[int, ...]:
    return stage.values, stage.gradients, stage.state, stage.mirror


SIZES = {"weights": 64 * 300 + 300 * 20 + 200, "biases": 64 + 64 + 64, "fixed": 320, "running": 64 + 64, "scale": 64}
UPDATED = 4 * (64 * 300 + 300 * 20 + 256 + 4 * 64 + 64 + 64)
