"""On devices, a layout never changes the answer: whether each rank has one or several share it, and where the update is
made. They are pretended ones, whose memory is NaN until something has been copied there."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from tests.contract.on_devices import ON_DEVICES
from tests.contract.table import Table, assert_same, saved

pytestmark = pytest.mark.contract
PAIRS = [(layout, name) for name, feature in ON_DEVICES.items() for layout in feature.on]


@pytest.mark.parametrize(("layout", "feature"), PAIRS)
def test_same_bits(table: Table, layout: str, feature: str) -> None:
    """As on one rank that has a device to itself."""
    assert_same(table.on(layout, feature), table.on("owner", feature))


@pytest.mark.parametrize("layout", ["owner"])
@pytest.mark.parametrize("feature", list(ON_DEVICES))
def test_a_device_computes_what_the_processor_does(table: Table, layout: str, feature: str) -> None:
    """But for rounding; and the first step that is compared has an effect on the next."""
    job, plain = table.on(layout, feature), table.alone(feature)
    assert job.code == 0, job.err
    losses, expected = ([line["loss"] for line in one.metrics if "loss" in line] for one in (job, plain))
    assert losses == pytest.approx(expected, rel=1e-4)
    assert len(set(losses)) == len(losses) == 5
    ours, plains = saved(job), saved(plain)
    assert list(ours) == list(plains)
    tolerance = 2e-3 if "bfloat16" in feature else 2e-5
    for name, array in ours.items():
        np.testing.assert_allclose(array, plains[name], rtol=tolerance, atol=tolerance, err_msg=name)
