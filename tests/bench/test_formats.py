"""The benchmark of file formats: both sides train on the same rows, those of a file really read from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpiml.bench.formats import FORMATS, TEST
from mpiml.data.dataset import Dataset, open_dataset
from mpiml.data.formats import Options


@pytest.mark.parametrize("name", FORMATS)
def test_both_sides_learn_the_same(tmp_path: Path, name: str) -> None:
    if name == "hdf5":
        pytest.importorskip("h5py")
    kind = FORMATS[name]
    arrays = kind.arrays(0.5)
    size = arrays["x_train"].nbytes
    assert abs(size / 2**20 - 0.5) < 0.01
    data = open_dataset(str(kind.write(tmp_path, arrays)), Options(context=kind.context))
    assert (len(data.test), data.train.x.shape) == (TEST, arrays["x_train"].shape[1:])
    assert data.files
    values = []
    for of in (data, Dataset.from_arrays(*arrays.values())):
        trainer = kind.trainer(of)
        first = trainer.run.stage.sum.values.vector.copy()
        for _ in range(3):
            trainer.step()
        values.append(trainer.run.stage.sum.values.vector.copy())
        assert not np.array_equal(first, values[-1])
    np.testing.assert_array_equal(*values)
