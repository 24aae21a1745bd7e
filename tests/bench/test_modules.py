"""The benchmark of modules: both sides train the same module on the same rows to the same weights."""

from __future__ import annotations

import numpy as np
import pytest

from mpiml.bench.modules import Case, case
from tests.nn.cases import named

torch = pytest.importorskip("torch")
MPI = pytest.importorskip("mpi4py.MPI")


def small(model: str) -> Case:
    """The case with a smaller module of the same kind."""
    from mpiml.bench import torch_eager

    modules = {
        "mlp": lambda: torch_eager.mlp([16]),
        "resnet": lambda: torch_eager.resnet(8),
        "gpt": lambda: torch_eager.gpt(256, 128, 16, 2, 1),
    }
    made = case(model)
    return Case(modules[model], made.x[:64], made.y[:64], 8, "momentum")


@pytest.mark.parametrize("model", ["mlp", "resnet", "gpt"])
def test_both_sides_learn_the_same(model: str) -> None:
    measured = small(model)
    ours = measured.ours(MPI.COMM_SELF)
    torch.manual_seed(0)
    theirs = measured.plain()
    for step in (1, 2):  # only the second has momentum
        (batch,) = ours.run.data.ahead.batches(step)
        rows = torch.from_numpy(np.array(batch.select()))
        ours.step()
        theirs.train(rows)
    (layout,) = ours.run.model.layouts
    values = named(layout, ours.run.stage.sum.values.vector)
    for name, parameter in theirs.module.named_parameters():
        np.testing.assert_allclose(values[f"layers.{name}"], parameter.detach(), rtol=1e-4, atol=1e-6, err_msg=name)
