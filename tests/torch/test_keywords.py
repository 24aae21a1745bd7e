"""Keywords of DistributedDataParallel: those that are used, those that change nothing, and those that are refused."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from mpiml.errors import ConfigError

torch = pytest.importorskip("torch")
nn = torch.nn

from mpiml.torch import DataParallel, keywords, rank  # noqa: E402
from tests.torch.modules import WORLD, several_ranks  # noqa: E402

pytestmark = pytest.mark.mpi


def test_all_keywords_of_the_installed_torch_are_known() -> None:
    assert keywords.of_torch() <= {*keywords.USED, *keywords.ACCEPTED, *keywords.REFUSED}
    DataParallel(nn.Linear(1, 1), None, find_unused_parameters=True, static_graph=True, process_group=None)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"process_group": 1}, "pass an MPI communicator as comm="),
        ({"device_ids": [0]}, "leave it out"),
        ({"static_grph": True}, "did you mean static_graph"),
        ({"forward_sync_bufers": False}, "did you mean forward_sync_buffers"),
        ({"broadcast_buffers": "x"}, "broadcast_buffers 'x': must be True or False"),
        ({"forward_sync_buffers": 1}, "forward_sync_buffers 1: must be True or False"),
        ({"init_sync": "no"}, "init_sync 'no': must be True or False"),
        ({"stall_timeout": -1}, "stall_timeout -1: must be a number of seconds, 0 or more"),
        ({"stall_timeout": "a"}, "stall_timeout 'a': must be a number of seconds"),
        ({"comm": 3}, "comm is a int: must be a communicator of mpi4py"),
    ],
)
def test_keywords_that_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DataParallel(nn.Linear(1, 1), **wrong)


def test_a_size_of_buckets_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="bucket_cap_mb") if rank() == 0 else contextlib.nullcontext():
        DataParallel(nn.Linear(1, 1), bucket_cap_mb=25)


@several_ranks
@pytest.mark.parametrize(
    ("given", "averaged"),
    [
        ({}, True),
        ({"broadcast_buffers": None}, True),
        ({"broadcast_buffers": False}, False),
        ({"forward_sync_buffers": False}, False),
        ({"forward_sync_buffers": True, "broadcast_buffers": False}, True),
    ],
)
def test_whether_buffers_are_averaged(given: dict[str, bool], averaged: bool) -> None:
    net = DataParallel(nn.BatchNorm1d(1), **given)
    net(torch.tensor([[0.0], [10.0 * rank()]])).sum().backward()
    means = {value.item() for value in WORLD.allgather(net.module.running_mean)}
    assert len(means) == (1 if averaged else WORLD.size)
